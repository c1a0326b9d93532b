"""Map of a weight on the mesh as SVG: the shard that each core holds."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from gshard_tf.layouts.partition_spec import axes_of

# More cells than this along an axis are too small to see: several cores share one.
MAX_COLUMNS = 64
MAX_ROWS = 32
# Up to so many cells, each has a tooltip.
_TITLED = 256

# A scale of evenly growing lightness, which the color-blind can read
# (matplotlib's viridis at a few points, without its darkest end).
_SCALE = [(68, 58, 131), (49, 104, 142), (33, 145, 140), (53, 183, 121),
          (144, 215, 67), (253, 231, 37)]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Split:
    """One dimension of a weight over axes of the mesh."""

    size: int
    axes: tuple[str, ...]
    parts: int

    def range_of(self, part: int) -> str:
        """Returns the indices of a part as a slice."""
        if self.parts == 1:
            return ":"
        length = math.ceil(self.size / self.parts)
        return f"{part * length}:{min((part + 1) * length, self.size)}"


def splits(
    shape: Sequence[int], layout: Sequence[str | None], mesh: dict[str, int]
) -> list[Split]:
    """Returns how each dimension of a weight is split."""
    dimensions = []
    for length, axis in zip(shape, layout, strict=True):
        axes = tuple(name for name in axes_of(axis) if name in mesh)
        dimensions.append(Split(length, axes, math.prod(mesh[name] for name in axes)))
    return dimensions


def weight_map(
    shape: Sequence[int], layout: Sequence[str | None], mesh: dict[str, int]
) -> str:
    """Returns SVG of the shard that each core holds: dimensions, then the mesh.

    Parts of the first split dimension differ in hue, those of the second in lightness;
    cores of one color hold the same shard.
    """
    dimensions = splits(shape, layout, mesh)
    return _dimension_bars(dimensions) + _mesh_grid(dimensions, mesh)


def color(first: float, second: float | None = None) -> str:
    """Returns the color of a part by its place, 0 to 1, in one or two dimensions."""
    place = min(max(first, 0.0), 1.0) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    rgb = [
        a + (place - low) * (b - a)
        for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True)
    ]
    if second is not None:
        towards = 255 if second < 0.5 else 0
        share = abs(second - 0.5) * (1.3 if second < 0.5 else 0.9)
        rgb = [value + share * (towards - value) for value in rgb]
    return "#" + "".join(f"{round(value):02x}" for value in rgb)


def _part_color(dimensions: Sequence[Split], parts: Sequence[int]) -> str | None:
    """Returns the color of a core's shard; None when it is the whole weight."""
    places = [
        part / max(split.parts - 1, 1)
        for split, part in zip(dimensions, parts, strict=True)
        if split.parts > 1
    ]
    return color(*places[:2]) if places else None


def _dimension_bars(dimensions: Sequence[Split]) -> str:
    if not dimensions:
        return '<p class="quiet">A scalar: every core holds it.</p>'
    width, height, gap, left, right = 530, 22, 10, 120, 210
    total = len(dimensions) * (height + gap)
    out = [
        f'<svg class="dims" viewBox="0 0 {left + width + right} {total}" role="img" '
        f'aria-label="{escape(_dimensions_in_words(dimensions))}">'
    ]
    split_before = 0
    for i, split in enumerate(dimensions):
        y = i * (height + gap) + gap / 2
        out.append(
            f'<text x="{left - 10}" y="{y + 16}" text-anchor="end">'
            f"dim {i}: {split.size:,}</text>"
        )
        shown = min(split.parts, MAX_COLUMNS)
        step = width / shown
        for n in range(shown):
            fill = "var(--whole)"
            if split.parts > 1:
                place = n / max(shown - 1, 1)
                fill = (
                    color(place)
                    if split_before == 0
                    else f"hsl(0 0% {88 - 64 * place:.0f}%)"
                )
            out.append(
                f'<rect x="{left + n * step:.2f}" y="{y}" width="{step:.2f}" '
                f'height="{height}" fill="{fill}" class="cell"/>'
            )
        split_before += split.parts > 1
        text = "whole"
        if split.parts > 1:
            text = f"{split.parts:,} parts over {'+'.join(split.axes)}"
        out.append(f'<text x="{left + width + 10}" y="{y + 16}">{escape(text)}</text>')
    out.append("</svg>")
    return "".join(out)


def _dimensions_in_words(dimensions: Sequence[Split]) -> str:
    return "; ".join(
        f"dimension {i} of {split.size:,}: "
        + (
            f"{split.parts:,} parts over {'+'.join(split.axes)}"
            if split.parts > 1
            else "whole"
        )
        for i, split in enumerate(dimensions)
    )


def _mesh_grid(dimensions: Sequence[Split], mesh: dict[str, int]) -> str:
    """Returns the mesh's cores: its last axis from left to right, others downwards."""
    *outer, last = mesh
    columns, rows = mesh[last], math.prod(mesh[name] for name in outer)
    per_column = math.ceil(columns / MAX_COLUMNS)
    per_row = math.ceil(rows / MAX_ROWS)
    shown_columns = math.ceil(columns / per_column)
    shown_rows = math.ceil(rows / per_row)
    cell = min(56, 704 / shown_columns)
    cell_height = min(cell, 40) if rows > 1 else max(min(cell, 40), 34)
    left, top = 120, 26
    width, height = shown_columns * cell, shown_rows * cell_height
    named = shown_columns * shown_rows <= _TITLED
    out = [
        f'<svg class="grid" viewBox="0 0 {left + 704 + 36} {top + height + 6:.0f}" '
        f'role="img" aria-label="{escape(_grid_in_words(dimensions, mesh))}">',
        f'<text x="{left}" y="16">{escape(last)} 0 to {columns - 1:,} &#8594;</text>',
    ]
    for r in range(shown_rows):
        row = r * per_row
        place = dict(zip(outer, _unravel(row, [mesh[n] for n in outer]), strict=True))
        y = top + r * cell_height
        if outer and (shown_rows <= 16 or r % 4 == 0):
            label = ", ".join(f"{name} {n}" for name, n in place.items())
            out.append(
                f'<text x="{left - 8}" y="{y + cell_height / 2 + 4:.1f}" '
                f'text-anchor="end">{escape(label)}</text>'
            )
        for c in range(shown_columns):
            column = c * per_column
            place[last] = column
            parts = [_part(split, place, mesh) for split in dimensions]
            fill = _part_color(dimensions, parts) or "var(--whole)"
            x = left + c * cell
            shape = (
                f'<rect class="cell" x="{x:.2f}" y="{y:.2f}" width="{cell:.2f}" '
                f'height="{cell_height:.2f}" fill="{fill}"'
            )
            if not named:
                out.append(f"{shape}/>")
                continue
            where = ", ".join(f"{name} {n}" for name, n in place.items())
            region = ", ".join(
                split.range_of(part)
                for split, part in zip(dimensions, parts, strict=True)
            )
            out.append(f"{shape}><title>{escape(where)}: [{region}]</title></rect>")
    out.append(
        f'<rect class="frame" x="{left}" y="{top}" width="{width:.2f}" '
        f'height="{height:.2f}"/></svg>'
    )
    cores = per_column * per_row
    even = columns % per_column == 0 and rows % per_row == 0
    each = f"{'' if even else 'up to '}{cores} neighbouring cores"
    caption = f"A cell is {'one core' if cores == 1 else each}."
    split = sum(dimension.parts > 1 for dimension in dimensions)
    if split:
        caption += " Cores of one color hold the same part."
    if split > 1:
        caption += (
            " The hue is the part of the first dimension that is split, the lightness "
            "that of the second."
        )
    return "".join(out) + f'<p class="quiet">{caption}</p>'


def _grid_in_words(dimensions: Sequence[Split], mesh: dict[str, int]) -> str:
    parts = math.prod(split.parts for split in dimensions)
    cores = math.prod(mesh.values())
    axes = " by ".join(f"{name} {size:,}" for name, size in mesh.items())
    return (
        f"The mesh, {axes}: {parts:,} different parts, each on {cores // parts:,} of "
        f"{cores:,} cores"
    )


def _part(split: Split, place: dict[str, int], mesh: dict[str, int]) -> int:
    part = 0
    for axis in split.axes:
        part = part * mesh[axis] + place[axis]
    return part


def _unravel(index: int, sizes: Sequence[int]) -> list[int]:
    indices = []
    for size in reversed(sizes):
        index, n = divmod(index, size)
        indices.append(n)
    return indices[::-1]
