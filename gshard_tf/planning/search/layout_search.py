"""`LayoutSearch`: the result of a search, as attributes, a table, rules and JSON."""

import collections
import dataclasses
import json
import textwrap
from collections.abc import Mapping

from gshard_tf.planning import units
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.search.candidates import Candidate, Paths
from gshard_tf.planning.text import WIDTH, columns

PLANNED, SKIPPED, FAILED = "planned", "skipped", "failed"
_ROWS = 12


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate of a search.

    Attributes:
        layout: Its mesh and rules.
        outcome: "planned", "skipped", or "failed" (the step cannot be traced or
            compiled with these rules).
        reason: Why it was skipped or failed; "" if it was planned.
        detail: The figures behind the reason, or the error.
        fits: Whether it was planned and its step fits into the memory limit.
        state_bytes: Bytes of a core's variables; None if that was not looked at.
        bytes_needed: Bytes per core that the compiled step needs; None if not planned.
        seconds: The plan's estimate of a step without overlap of communication and
            computation (`StepTime.without_overlap`); None where the plan has none.
        roofline: The same with perfect overlap (`StepTime.roofline`).
        predicted_seconds: The prediction that ordered the candidates; None if none was
            made.
        plan_key: `Plan.key` of its plan, or "".
    """

    layout: Candidate
    outcome: str
    reason: str = ""
    detail: str = ""
    fits: bool = False
    state_bytes: int | None = None
    bytes_needed: float | None = None
    seconds: float | None = None
    roofline: float | None = None
    predicted_seconds: float | None = None
    plan_key: str = ""


@dataclasses.dataclass(frozen=True)
class LayoutSearch:
    """The candidates of a search, and the best of them; `print` it.

    Attributes:
        model: The name of the model.
        mode: "train", "evaluate" or "predict".
        topology: Such as "v5e:4x4".
        inputs: dtype and shape of each tensor of the batch.
        memory_limit: Bytes per core that a step may need.
        trials: All candidates: first those planned, the best at the top.
        unused: Logical axes of the usual splits that the model does not have.
        paths: The path patterns that all candidates have.
        plan: The plan of the best; None if nothing fits.
        seconds: The time of the search.
    """

    model: str
    mode: str
    topology: str
    inputs: list[str]
    memory_limit: float
    trials: list[Trial]
    unused: list[str]
    paths: Paths
    plan: Plan | None
    seconds: float

    @property
    def planned(self) -> list[Trial]:
        """The candidates that were compiled, the best first."""
        return [trial for trial in self.trials if trial.outcome == PLANNED]

    @property
    def best(self) -> Trial | None:
        """The fastest that fits, by the estimate of its plan; None: nothing fits."""
        return next((trial for trial in self.planned if trial.fits), None)

    @property
    def smallest(self) -> Trial | None:
        """The planned candidate that needs the least memory; None: none was planned."""
        return min(self.planned, key=lambda t: t.bytes_needed or 0, default=None)

    @property
    def smallest_state(self) -> int | None:
        """The least bytes of variables on a core, of all candidates looked at."""
        states = [t.state_bytes for t in self.trials if t.state_bytes is not None]
        return min(states, default=None)

    @property
    def reasons(self) -> Mapping[str, int]:
        """Why candidates were not planned, and how many."""
        return collections.Counter(t.reason for t in self.trials if t.reason)

    def python(self) -> str:
        """Returns the Python text that makes the best mesh, its rules and a strategy.

        Raises:
            ValueError: when nothing fits.
        """
        if self.best is None:
            raise ValueError(
                "There are no rules to paste, because no layout that was planned fits. "
                f"Received: a search of {self.model!r} on {self.topology}"
            )
        return self.best.layout.python(self.paths)

    def to_json(self) -> str:
        """Returns the search as one JSON object, without the plan."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("plan", "trials")
        }
        fields["trials"] = [dataclasses.asdict(trial) for trial in self.trials]
        fields["best"] = None if self.best is None else dataclasses.asdict(self.best)
        fields["python"] = None if self.best is None else self.python()
        return json.dumps(fields, indent=1)

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.mode}, on {self.topology}: {self._verdict()}",
            "=" * WIDTH,
            *_wrapped(f"batch    {', '.join(self.inputs)} (global)"),
            *_wrapped(
                f"tried    {len(self.trials):,} layouts: {len(self.planned)} planned, "
                f"{len(self.trials) - len(self.planned):,} not, in "
                f"{units.seconds(self.seconds)}"
            ),
        ]
        if self.unused:
            lines += _wrapped(f"         the model has no {', '.join(self.unused)}")
        if self.planned:
            lines += ["", *self._table()]
        if self.reasons:
            lines += ["", "not planned"]
            ranked = sorted(self.reasons.items(), key=lambda each: -each[1])
            lines += [f"  {count:5,}  {reason}" for reason, count in ranked]
        if self.best is not None:
            lines += ["", self.python()]
        lines += [
            "",
            *_wrapped(
                "Step times are estimates by a roofline, not measurements; the second "
                "is without overlap of communication and computation, and ranks."
            ),
        ]
        return "\n".join(lines)

    def _verdict(self) -> str:
        limit = units.size(self.memory_limit)
        if self.best is not None:
            need = units.size(self.best.bytes_needed or 0)
            return f"the best that fits needs {need} of {limit} a core"
        if self.smallest is not None:
            need = units.size(self.smallest.bytes_needed or 0)
            return f"NOTHING FITS into {limit} a core; the smallest found needs {need}"
        if self.smallest_state is not None:
            return (
                f"NOTHING FITS into {limit} a core; the smallest state alone takes "
                f"{units.size(self.smallest_state)}"
            )
        return "NO LAYOUT was found that can be"

    def _table(self) -> list[str]:
        rows = [
            (
                "fits" if trial.fits else "-",
                units.size(trial.bytes_needed or 0),
                "-" if trial.roofline is None else units.seconds(trial.roofline),
                "-" if trial.seconds is None else units.seconds(trial.seconds),
                str(trial.layout),
            )
            for trial in self.planned[:_ROWS]
        ]
        head = ("", "memory", "at least", "step", "layout")
        return columns(head, rows, "lrrrl")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * 9)
