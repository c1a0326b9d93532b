"""What came of comparing a step on the mesh with the same step elsewhere."""

import dataclasses
from collections.abc import Iterable

from gshard_tf.verification.measures import Measure

# How many rows of differences a report prints.
_ROWS = 20


class VerificationError(ValueError):
    """A step on the mesh does not compute what one device does."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One value of a step, compared with one reference.

    Attributes:
        reference: What it is compared with: `"one device"` or `"TensorFlow"`.
        kind: `"output"` (losses and metrics, or predictions), `"weight"`,
            `"optimizer"` (slots and counters), `"metric"` or `"state"` (statistics,
            seeds, frozen weights).
        name: The output's name or the variable's path.
        measure: How large the difference is, and may be. Of a variable, what is
            compared is what the step added to it.
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
    """Where a difference begins.

    Attributes:
        layer: The path of the layer that the instruction belongs to, or "".
        instruction: Name and opcode of the first instruction whose result differs.
        op_name: The TensorFlow operation that it was made from.
        measure: By how much its result differs.
        inside: The opcode (`"while"`, `"conditional"` or `"call"`) of what it is a
            result of, when the difference arises in there; else "".
        certain: Whether all that it is computed from was found to be equal.
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
    """What `verify` found; prints as a table.

    Attributes:
        title: Which step of which model, on which mesh.
        tolerance: What differences may be, relative to the largest number of an array,
            before what rounding does to it is added.
        rows: Every value that was compared, once for each reference.
        origin: Where the first difference from one device begins, if there is any and
            it could be found.
        notes: What could not be compared, and what to know about it.
    """

    title: str
    tolerance: float
    rows: list[Row]
    origin: Origin | None
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing differs by more than it may."""
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
        """For each reference and kind: how many, and the one that is furthest off."""
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
    found = row.measure
    if found.difference == 0:
        return 0.0
    return found.difference / found.allowed if found.allowed else float("inf")


def _cells(rows: Iterable[Row]) -> list[list[str]]:
    """Lines of cells, the first one their heads."""
    lines = [["against", "what", "largest difference", "allowed", "ratio", "where"]]
    for row in rows:
        found = row.measure
        at = f" {list(found.where)}" if found.difference and found.where else ""
        lost = f", not finite: {found.not_finite[0]} here, {found.not_finite[1]} there"
        lines.append(
            [
                row.reference,
                row.kind,
                f"{found.difference:.1e}",
                f"{found.allowed:.1e}",
                "-" if found.ratio is None else f"{found.ratio:.4g}",
                row.name + at + (lost if any(found.not_finite) else ""),
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


def _numbers(found: Measure) -> str:
    ratio = "" if found.ratio is None else f", {found.ratio:.4g} times the reference"
    lost = ""
    if any(found.not_finite):
        lost = f", not finite: {found.not_finite[0]} here, {found.not_finite[1]} there"
    return f"{found.difference:.1e} of its largest number{ratio}{lost}"
