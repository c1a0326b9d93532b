"""Sentence pairs as several to a row, each at known places."""

import numpy as np


def sentences(count, vocabulary, longest=5, seed=0):
    """Pairs `(source, target)` of 1-D ids from 3 on, 1 to `longest` long."""
    rng = np.random.default_rng(seed)
    return [
        tuple(rng.integers(3, vocabulary, rng.integers(1, longest + 1)) for _ in "st")
        for _ in range(count)
    ]


def packed(pairs, per_row, length, where="right", seed=0):
    """The four inputs of a `Transformer`, and the places of each target's tokens.

    Args:
        pairs: From `sentences`.
        per_row: Sentences in a row.
        length: L and T.
        where: Padding is to the "right" or "left", of id 0 in segment 0; or "within",
            anywhere between the tokens, of id 0 in any segment; or "junk", the same of
            any id in segment 0.
        seed: Of places, names of segments and junk.
    """
    rng = np.random.default_rng(seed)
    count = -(-len(pairs) // per_row)
    # Any numbers: a sentence and its translation have the same.
    names = np.stack([1 + rng.permutation(90)[:per_row] for _ in range(count)])
    sides, places = [], {}
    for side in (0, 1):
        ids = np.zeros((count, length), int)
        segments = np.zeros((count, length), int)
        if where == "junk":
            ids = rng.integers(3, 9, ids.shape)
        for row in range(count):
            numbers = range(row * per_row, min((row + 1) * per_row, len(pairs)))
            parts = [pairs[i][side] for i in numbers]
            tokens = np.concatenate(parts)
            at = np.arange(len(tokens))
            if where == "left":
                at += length - len(tokens)
            elif where != "right":
                at = np.sort(rng.permutation(length)[: len(tokens)])
            if where == "within":
                segments[row] = rng.choice([0, *names[row]], length)
            ends = np.cumsum([len(part) for part in parts])
            each = zip(
                numbers, names[row], np.split(at, ends[:-1]), parts, strict=False
            )
            for i, name, place, part in each:
                ids[row, place], segments[row, place] = part, name
                places[i] = (row, place)
        sides.append((ids, segments))
    (source, source_segments), (target, target_segments) = sides
    return (source, target, source_segments, target_segments), places


def one_to_a_row(pairs):
    """Source and target `[sentences, longest]`, padded to the right with 0."""
    sides = []
    for side in (0, 1):
        parts = [pair[side] for pair in pairs]
        ids = np.zeros((len(parts), max(map(len, parts))), int)
        for row, part in enumerate(parts):
            ids[row, : len(part)] = part
        sides.append(ids)
    return tuple(sides)
