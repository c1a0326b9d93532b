"""The report of a comparison of a step on the mesh with the same step elsewhere."""

import dataclasses
from collections.abc import Iterable

from gshard_tf.verification.tolerances import Measure

# The largest number of differences that a report prints.
_ROWS = 20


class VerificationError(ValueError):
    """An error for a step on the mesh that differs from the one on one device."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One value of a step, compared with one reference.

    Attributes:
        reference: The reference: `"one device"` or `"TensorFlow"`.
        kind: `"output"` (losses and metrics, or predictions), `"weight"`,
            `"optimizer"` (slots and counters), `"metric"` or `"state"` (statistics,
            seeds, frozen weights).
        name: The output's name or the variable's path.
        measure: The difference, and how large it may be. For a variable, the change by
            the step is compared.
    """

    reference: str
    kind: str
    name: str
    measure: Measure

    @property
    def ok(self) -> bool:
        return self.measure.ok


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of a difference.

    Attributes:
        layer: The path of the layer that the instruction belongs to, or "".
        instruction: Name and opcode of the first instruction whose result differs.
        op_name: The TensorFlow operation that it stems from.
        measure: The difference of its result.
        inside: The opcode (`"while"`, `"conditional"` or `"call"`) of the instruction
            that it is a result of, when the difference arises within; else "".
        certain: Whether all its operands were equal.
    """

    layer: str
    instruction: str
    op_name: str
    measure: Measure
    inside: str
    certain: bool

    def __str__(self) -> str:
        begins = "begins in" if self.certain else "begins in or before"
        where = f"layer {self.layer!r}" if self.layer else "the step outside its layers"
        if "gradient" in self.op_name:
            where = f"the gradient of {where}"
        inside = f", inside the {self.inside} that it is a result of" * bool(
            self.inside
        )
        return (
            f"The difference {begins} {where}: instruction {self.instruction}{inside}, "
            f"operation {self.op_name!r}, {_numbers(self.measure)}"
        )


@dataclasses.dataclass(frozen=True)
class VerificationReport:
    """The result of `verify`; prints as a table.

    Attributes:
        title: The step, its model and mesh.
        tolerance: The allowed difference, relative to the largest number of an array,
            to which the effect of rounding is added.
        rows: Every compared value, once for each reference.
        origin: The origin of the first difference from one device, if it is known.
        notes: Limits of the comparison.
    """

    title: str
    tolerance: float
    rows: list[Row]
    origin: Origin | None
    notes: list[str]

    @property
    def ok(self) -> bool:
        """True if no value differs by more than it may."""
        return all(row.ok for row in self.rows)

    @property
    def differing(self) -> list[Row]:
        """The rows that differ by more than they may."""
        return [row for row in self.rows if not row.ok]

    def check(self) -> "VerificationReport":
        """Returns the report; raises `VerificationError` unless it is `ok`."""
        if not self.ok:
            raise VerificationError(str(self))
        return self

    def __str__(self) -> str:
        differing = self.differing
        verdict = f"{len(differing)} values DIFFER" if differing else "equal"
        lines = [f"{self.title}: {verdict} (tolerance {self.tolerance:g})"]
        if self.origin is not None:
            lines.append(str(self.origin))
        lines += _table(self._summary())
        if differing:
            lines += ["", "What differs:", *_table(_cells(differing[:_ROWS]))]
        if len(differing) > _ROWS:
            lines.append(f"... and {len(differing) - _ROWS} more")
        return "\n".join(lines + [f"! {note}" for note in self.notes])

    def _summary(self) -> list[list[str]]:
        """Returns a line for each reference and kind: the count, and the worst row."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.reference, row.kind), []).append(row)
        worst = [max(rows, key=_excess) for rows in groups.values()]
        cells = _cells(worst)
        counts = [str(len(rows)) for rows in groups.values()]
        return [
            [*line[:2], count, *line[2:]]
            for line, count in zip(cells, ["values", *counts], strict=True)
        ]


def _excess(row: Row) -> float:
    measure = row.measure
    if measure.difference == 0:
        return 0.0
    return measure.difference / measure.allowed if measure.allowed else float("inf")


def _cells(rows: Iterable[Row]) -> list[list[str]]:
    """Returns lines of cells, the first of which is the head."""
    lines = [["against", "what", "largest difference", "allowed", "ratio", "where"]]
    for row in rows:
        measure = row.measure
        at = f" {list(measure.where)}" if measure.difference and measure.where else ""
        lines.append(
            [
                row.reference,
                row.kind,
                f"{measure.difference:.1e}",
                f"{measure.allowed:.1e}",
                "-" if measure.ratio is None else f"{measure.ratio:.4g}",
                row.name + at + _not_finite(measure),
            ]
        )
    return lines


def _table(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    printed = [
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return [printed[0], "-" * max(map(len, printed)), *printed[1:]]


def _numbers(measure: Measure) -> str:
    ratio = (
        "" if measure.ratio is None else f", {measure.ratio:.4g} times the reference"
    )
    lost = _not_finite(measure)
    return f"{measure.difference:.1e} of its largest number{ratio}{lost}"


def _not_finite(measure: Measure) -> str:
    here, there = measure.not_finite
    return f", not finite: {here} here, {there} there" if here or there else ""
