"""A check that training does not silently leave out what is too long for a row."""

from __future__ import annotations

import logging

import numpy as np

from gshard_examples.translation.tokens import TokenizedSplit

log = logging.getLogger(__name__)

#: Shares of the pairs from which the log warns, and from which it is an error.
WARN_FROM, REFUSE_FROM = 0.03, 0.5
#: The share of the pairs that the lengths in the message keep.
KEPT = 0.99


def check_lengths(
    tokens: TokenizedSplit, most: tuple[int, int], option: str
) -> tuple[int, int]:
    """Checks that nearly all training pairs fit.

    Args:
        tokens: The training split.
        most: Ids that fit, of a source and of a target.
        option: What decides that, for the message: `"--row-lengths"`.

    Returns:
        How many pairs do not fit, and of how many.

    Raises:
        ValueError: Half of the pairs or more do not fit; 3 % or more are a warning in
            the log. Either says which lengths would do.
    """
    lengths = np.stack([tokens.source_lengths, tokens.target_lengths], axis=1)  # [n, 2]
    total = len(lengths)
    too_long = int(np.sum((lengths > most).any(axis=1)))
    share = too_long / total
    if share < WARN_FROM:
        return too_long, total
    source, target = np.quantile(lengths, KEPT, axis=0, method="higher")
    advice = (
        f"{100 * KEPT:.0f} % of the sources have at most {source} ids, of the targets "
        f"{target}: choose {option} accordingly, or more symbols (--vocab-size), which "
        "make texts shorter"
    )
    found = (
        f"{too_long:,} of {total:,} training pairs ({100 * share:.0f} %) are longer "
        f"than {most[0]} source or {most[1]} target ids"
    )
    if share >= REFUSE_FROM:
        raise ValueError(
            f"{option} must leave most pairs to train on. {advice}. Received: {found}"
        )
    log.warning("%s, and do not train. %s.", found, advice)
    return too_long, total
