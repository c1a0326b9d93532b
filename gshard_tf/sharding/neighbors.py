"""Weights that split a dimension along another mesh axis than most others do."""

import collections
from collections.abc import Mapping

from gshard_tf.layouts.partition_spec import PartitionSpec, parts_over


def splits_against_neighbors(
    weights: Mapping[str, tuple[tuple[int, ...], PartitionSpec]],
    axis_sizes: Mapping[str, int],
) -> list[str]:
    """Returns a sentence for each dimension that a few weights split as most do not.

    Weights that are multiplied one after the other share dimensions: the model's width
    is in nearly all of them. A weight that splits it over another mesh axis than most
    has, often, its axes in the wrong order. The numbers stay right, and each use moves
    the tensor. Dimensions count as the same when their sizes are: so a dimension of a
    square weight says nothing, and neither does a tie.

    Args:
        weights: Shape and layout of each weight by its path.
        axis_sizes: The size of each mesh axis.
    """
    by_size: dict[int, dict[str | None, list[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for path, (shape, spec) in weights.items():
        for size, axis in zip(shape, spec, strict=True):
            if size > 1 and shape.count(size) == 1:
                splits = parts_over(axis, axis_sizes) > 1
                by_size[size][axis if splits else None].append(path)
    sentences = []
    for size, groups in by_size.items():
        (most, usual), *others = sorted(
            groups.items(), key=lambda group: len(group[1]), reverse=True
        )
        for axis, paths in others:
            if axis is not None and len(paths) < len(usual):
                more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
                how = "leave it whole" if most is None else f"split it over {most!r}"
                sentences.append(
                    f"The dimension of {size} is split over {axis!r} in {paths[0]!r}"
                    f"{more}, while {len(usual)} others {how}: {usual[0]!r} is the "
                    "first. Each use then moves a tensor. The pattern's axes may be in "
                    "the wrong order."
                )
    return sentences
