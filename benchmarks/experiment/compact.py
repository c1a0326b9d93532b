"""Tokens and initial states as small files."""

import io
import lzma
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gshard_tf.export import read_state, write_state
from gshard_tf.export.state_file import npz_bytes, read_npz
from gshard_tf.io.atomic_files import write_file

#: Values of an array that are carried; a larger one is drawn from as many quantiles.
KEPT = 1025
#: 16-bit ids: literals and matches are of two bytes.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lp": 1, "lc": 3, "pb": 1}]


def write_tokens(path: pathlib.Path, tokens: Any) -> None:
    """Writes a tokenized split, each English message once.

    Pairs are in the order of their messages then: like languages say like things, which
    compresses well.

    Raises:
        ValueError: when a number is too large for 16 bits.
    """
    starts, ids, numbers = tokens.target_starts, {}, []
    target = tokens.target.astype(np.uint16)
    for i in range(len(tokens)):
        message = target[starts[i] : starts[i + 1]].tobytes()
        numbers.append(ids.setdefault(message, len(ids)))
    number = np.array(numbers)
    order = np.lexsort((tokens.language, number))
    lengths = tokens.source_lengths[order]
    arrays = {
        "language": tokens.language[order].astype(np.uint16),
        "source": _gather(tokens.source, tokens.source_starts[:-1][order], lengths),
        "source_lengths": lengths,
        "of_message": np.bincount(number),
        "message": np.frombuffer(b"".join(ids), np.uint16),
        "message_lengths": np.array([len(message) // 2 for message in ids]),
    }
    if (largest := max(int(array.max()) for array in arrays.values())) >= 2**16:
        raise ValueError(
            "Ids, lengths and counts of a message's pairs must be less than 65,536. "
            f"Received: {largest}"
        )
    small = {name: array.astype(np.uint16) for name, array in arrays.items()}
    data = npz_bytes(small, {"languages": tokens.languages})
    write_file(path, lzma.compress(data, filters=_FILTERS))


def read_tokens(path: pathlib.Path) -> Any:
    """Returns a split that `write_tokens` wrote."""
    from gshard_examples.translation.tokens import TokenizedSplit

    arrays, meta = read_npz(io.BytesIO(lzma.decompress(path.read_bytes())))
    of_pair = np.repeat(
        np.arange(len(arrays["of_message"])), arrays["of_message"].astype(np.int64)
    )
    lengths = arrays["message_lengths"].astype(np.int64)
    target = _gather(
        arrays["message"], (np.cumsum(lengths) - lengths)[of_pair], lengths[of_pair]
    )
    return TokenizedSplit(
        tuple(meta["languages"]),
        arrays["language"].astype(np.int32),
        arrays["source"].astype(np.int32),
        _starts(arrays["source_lengths"]),
        target.astype(np.int32),
        _starts(lengths[of_pair]),
    )


def _gather(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns `counts[i]` values from `starts[i]` on, one piece after the other."""
    before = np.cumsum(counts) - counts
    return values[np.repeat(starts - before, counts) + np.arange(int(counts.sum()))]


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def write_start(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an initial state: of large arrays the distribution, as quantiles.

    Initial values are either all the same (zeros and ones, slots of the optimizer) or
    drawn independently, array by array, so a draw from it is as good as they are.
    """
    kept, shapes = {}, {}
    for name, array in arrays.items():
        if array.size <= KEPT:
            kept[name] = array
            continue
        shapes[name] = array.shape
        values = array.astype(np.float64)
        quantiles = np.quantile(values, np.linspace(0, 1, KEPT))
        kept[name] = quantiles.astype(array.dtype)
    write_state(path, kept, step=0, shapes=shapes)


def draw_start(path: pathlib.Path, seed: int) -> dict[str, np.ndarray]:
    """Returns the initial state of a file of `write_start`, its large arrays drawn.

    Args:
        path: The file.
        seed: Decides what is drawn.
    """
    arrays, meta = read_state(path)
    at = np.linspace(0, 1, KEPT)
    for name, shape in meta["shapes"].items():
        quantiles = arrays[name]
        if quantiles[0] == quantiles[-1]:
            arrays[name] = np.full(shape, quantiles[0])
            continue
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        drawn = np.interp(generator.random(shape), at, quantiles.astype(np.float64))
        arrays[name] = drawn.astype(quantiles.dtype)
    return arrays
