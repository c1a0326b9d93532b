"""Splits of somebody's own text, which may be small and in few languages.

The rules of `split` suit catalogues: hundreds of messages are widely translated, and
the others hardly count.  Of six thousand pairs they would test on two.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gshard_examples.translation.split import MIN_WORDS, NEAR_COPY, assign_splits

log = logging.getLogger(__name__)

#: Messages to test on by default, if they are not more than `MOST_SHARE` of all.
WANTED = 1_000
MOST_SHARE = 0.1
#: A strict test is useful from so many messages, or a twentieth of them all.
LEAST = 50
#: Shares that are tried until there is a useful test that is strict.
_LARGER_SHARES = (0.1, 0.2, 0.3, 0.4)


def assign_own_splits(
    languages_of: Mapping[str, Iterable[str]],
    held_out: float | None = None,
    splits: Sequence[str] = ("dev", "test"),
) -> tuple[dict[str, str], dict[str, Any]]:
    """Gives every message of somebody's own text a split.

    Which messages are held out depends on hashes of them, as in `split`. Every message
    counts, in however few languages it is. Near-copies are kept apart; where so little
    is left to test on that it would be useless, more is held out, and where messages
    are all alike (a toy grammar, say) near-copies stay in `dev` and `test`, which the
    log says.

    Args:
        languages_of: Message key -> the languages that it is translated into.
        held_out: Share of the messages for the test, half as many for `dev`. None: as
            above.
        splits: Those to make; others come from elsewhere.

    Returns:
        Message key -> its split, and what was decided: `held_out` (and the argument
        as `asked_held_out`), `min_words`, `near_copy` (None: near-copies stay).

    Raises:
        ValueError: There are too few messages to hold any out.
    """
    long = sum(len(key.split()) >= MIN_WORDS for key in languages_of)
    # A word list, say, is tested on words.
    min_words = MIN_WORDS if 4 * long >= len(languages_of) else 1
    able = long if min_words == MIN_WORDS else len(languages_of)
    least = {"test": max(1, min(LEAST, able // 20))}
    least["dev"] = max(1, least["test"] // 2)

    def attempt(share: float, near_copy: float | None) -> dict[str, str]:
        return assign_splits(languages_of, share, 1, min_words, near_copy, splits)

    def enough(found: Mapping[str, str], least: Mapping[str, int]) -> bool:
        sizes = Counter(found.values())
        return all(sizes[split] >= least[split] for split in splits)

    first = min(MOST_SHARE, WANTED / max(1, able)) if held_out is None else held_out
    shares = [first]
    if held_out is None:
        shares += [share for share in _LARGER_SHARES if share > first]
    # With a share that was asked for, whatever it gives is what was meant.
    required = least if held_out is None else dict.fromkeys(least, 1)
    for near_copy in (NEAR_COPY, None):
        for share in shares:
            found = attempt(share, near_copy)
            if enough(found, required) or held_out == 0:
                if near_copy is None:
                    log.warning(
                        "The English messages are so alike that near-copies of "
                        "training messages stay in %s: scores tell less of new ones.",
                        " and ".join(splits),
                    )
                facts = {
                    "held_out": share,
                    "asked_held_out": held_out,
                    "min_words": min_words,
                    "near_copy": near_copy,
                }
                return found, facts
    raise ValueError(
        "There must be enough English messages to hold some out for "
        f"{' and '.join(splits)}; give files for these instead (--dev-tsv, "
        f"--test-tsv). Received: {len(languages_of)} messages, held_out={held_out}"
    )
