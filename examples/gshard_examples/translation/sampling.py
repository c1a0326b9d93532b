"""Sampling of languages with a temperature: which pairs an epoch of training has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.temperature import temperature_shares
from gshard_examples.translation.tokens import TokenizedSplit


def draw_pairs(
    pairs: Sequence[Pair], most: int, generator: np.random.Generator
) -> list[Pair]:
    """Returns at most `most` of the pairs, drawn evenly, in the order they have."""
    if len(pairs) <= most:
        return list(pairs)
    chosen = generator.choice(len(pairs), most, replace=False)
    return [pairs[i] for i in sorted(chosen)]


class LanguageSampler:
    """Draws the pairs of an epoch, large languages less often than they occur.

    An epoch has as many pairs as can be drawn; with a temperature it has some of the
    large languages' pairs, others every epoch, and repeats the small ones'.

    Args:
        tokens: The split.
        usable: Integers `[n]`: the pairs that may be drawn, at least one.
        temperature: See `temperature.temperature_shares`.

    Attributes:
        shares: Language tag -> share of the pairs drawn.

    Raises:
        ValueError: The temperature is wrong.
    """

    def __init__(
        self, tokens: TokenizedSplit, usable: np.ndarray, temperature: float
    ) -> None:
        language = tokens.language[usable]
        self._members = {
            tokens.languages[i]: usable[language == i] for i in np.unique(language)
        }
        counts = {tag: len(rows) for tag, rows in self._members.items()}
        self.shares = temperature_shares(counts, temperature)
        self._total = len(usable)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Returns the pairs of an epoch in random order: integers, about `[n]`."""
        chosen = []
        for tag, members in self._members.items():
            exact = self.shares[tag] * self._total
            # Rounded at random, so that on average no language gets too little.
            count = int(exact) + int(generator.random() < exact % 1)
            repeats, rest = divmod(count, len(members))
            chosen.append(np.tile(members, repeats))
            chosen.append(generator.choice(members, rest, replace=False))
        return generator.permutation(np.concatenate(chosen))

    def mean(self, values: np.ndarray) -> float:
        """Returns the mean over the pairs drawn of a value of each pair of the split.

        Args:
            values: `[pairs of the split]`.
        """
        return float(
            sum(
                self.shares[tag] * values[members].mean()
                for tag, members in self._members.items()
            )
        )
