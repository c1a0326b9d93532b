"""One step on the mesh, compared with the same step on one device and in TensorFlow."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2

from gshard_tf.export.naming import named_leaves
from gshard_tf.planning.layer_names import LayerNames
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.spmd import lowering
from gshard_tf.verification import measures
from gshard_tf.verification.measures import Measure
from gshard_tf.verification.observing import find_first
from gshard_tf.verification.references import (
    OnDevices,
    Run,
    in_tensorflow,
    on_mesh,
    on_one_device,
)
from gshard_tf.verification.report import Origin, Row, VerificationReport

ONE_DEVICE = "one device"
TENSORFLOW = "TensorFlow"


@dataclasses.dataclass(frozen=True)
class StepToCheck:
    """A step, and what it is about to be called with.

    Attributes:
        extended: The `SpmdExtended` of its strategy.
        step: The step as it was lowered for the mesh.
        trace: Traces it again, without a mesh, for compiling or not.
        arrays: Its arguments.
        roles: What each variable is for, by its `id`; see `keras_step.variable_roles`.
        layers: Finds the layers of the model in the names of operations.
        title: What to call it.
        trains: Whether weights are meant to move.
    """

    extended: Any
    step: lowering.LoweredStep
    trace: Callable[[bool], Any]
    arrays: Sequence[np.ndarray]
    roles: dict[int, str]
    layers: LayerNames
    title: str
    trains: bool


def check_step(given: StepToCheck, tolerance: float | None) -> VerificationReport:
    """Runs a step three ways and compares everything that comes out.

    No variable is written to: each run has copies.

    Args:
        given: The step.
        tolerance: Relative to the largest number of each array; None: by the narrowest
            floating type of the step.
    """
    proto = hlo_pb2.HloModuleProto.FromString(given.step.hlo)
    default, rounding = measures.precision(proto)
    tolerance = default if tolerance is None else tolerance
    captures = _values(given)
    comparer = _Comparer(given, captures, tolerance, rounding)
    opcodes = _opcodes(proto)
    # Of one seed, TensorFlow's kernels draw other numbers than a compiler's.
    compiled = "rng-bit-generator" in opcodes
    notes = _notes_on(opcodes)
    mesh = on_mesh(given.extended, given.step, given.arrays)
    found = mesh.compile(given.step)(captures)
    one = on_one_device(given.extended, given.step, given.arrays)
    # Two references: the first has the lowering in common with the mesh, and shows what
    # partitioning does; the second has nothing in common but the layers.
    references: dict[str, list[np.ndarray]] = {}
    for name, make in (
        (ONE_DEVICE, lambda: one.compile(given.step)),
        (
            TENSORFLOW,
            lambda: in_tensorflow(
                given.trace(compiled), given.step, given.arrays, compiled
            ),
        ),
    ):
        try:
            run = make()
            references[name] = run(captures)
        # Whatever keeps a reference from running is no difference; it is said.
        except (RuntimeError, ValueError, TypeError, tf.errors.OpError) as error:
            notes.append(f"Not compared with {name}: {_first_line(error)}")
            continue
        if comparer.noise is None:
            comparer.noise = comparer.noise_of(run, references[name])
    if not references:
        raise RuntimeError(
            f"There is nothing to compare with: {given.title} runs neither on one "
            f"device nor in TensorFlow alone. {' '.join(notes)}"
        )
    rows = [
        Row(reference, kind, name, measure)
        for reference, expected in references.items()
        for (kind, name), measure in zip(
            _names(given), comparer.compare(found, expected), strict=True
        )
    ]
    origin = None
    differing = [
        i
        for i, row in enumerate(rows[: len(given.step.results)])
        if row.reference == ONE_DEVICE and not row.ok
    ]
    if differing:
        origin = _origin(given, comparer, mesh, one, differing)
        if origin is None:
            notes.append(
                "The difference vanishes as soon as values in between are looked at, "
                "since the compiler then makes another program; so there is no telling "
                "where it begins."
            )
    elif not all(row.ok for row in rows) and ONE_DEVICE in references:
        notes.append(
            "The mesh and one device agree, and TensorFlow does not: the fault is in "
            "what they have in common, the annotations of layers, the lowering or XLA, "
            "and not in partitioning."
        )
    notes += _what_was_not_seen(given, rows)
    return VerificationReport(given.title, tolerance, rows, origin, notes)


class _Comparer:
    """Compares the results of two runs, knowing what rounding does to them."""

    def __init__(
        self,
        given: StepToCheck,
        captures: list[np.ndarray],
        tolerance: float,
        rounding: float,
    ):
        self.step = given.step
        self.captures = captures
        self.tolerance = tolerance
        self.noise: list[float] | None = None
        # Numbers that stand alone are learning rates, loss scales and counts.
        which = [
            isinstance(variable, tf.Variable)
            and measures.is_floating(value)
            and value.ndim > 0
            for variable, value in zip(given.step.captures, captures, strict=True)
        ]
        self.perturbed = measures.perturbed(captures, which, rounding)

    def _old(self, captures: Sequence[np.ndarray], count: int) -> list[Any]:
        """What each result was before, for a new value of a variable; else None."""
        step = self.step
        old = [None] * step.num_outputs + [captures[i] for i in step.updates]
        return old + [None] * (count - len(old))

    def noise_of(self, run: Run, results: Sequence[np.ndarray]) -> list[float]:
        """By how much rounding changes each result."""
        old = self._old(self.captures, len(results))
        others = [
            (run(captures), self._old(captures, len(results)))
            for captures in self.perturbed
        ]
        return [
            measures.noise(
                [new[i] for new, _ in others],
                [before[i] for _, before in others],
                measures.change(value, old[i]),
            )
            for i, value in enumerate(results)
        ]

    def compare(
        self,
        found: Sequence[np.ndarray],
        expected: Sequence[np.ndarray],
        noise: Sequence[float] | None = None,
    ) -> list[Measure]:
        old = self._old(self.captures, len(found))
        noise = self.noise if noise is None else noise
        return [
            measures.measure(a, b, before, self.tolerance, each)
            for a, b, before, each in zip(found, expected, old, noise, strict=True)
        ]


def _origin(
    given: StepToCheck,
    comparer: _Comparer,
    mesh: OnDevices,
    one: OnDevices,
    differing: list[int],
) -> Origin | None:
    def compare(step: lowering.LoweredStep) -> list[Measure]:
        found = mesh.compile(step)(comparer.captures)
        run = one.compile(step)
        expected = run(comparer.captures)
        return comparer.compare(found, expected, comparer.noise_of(run, expected))

    first = find_first(given.step, differing, compare)
    if first is None:
        return None
    metadata = first.instruction.metadata
    return Origin(
        given.layers.layer_of(metadata.op_name),
        f"{first.instruction.name} ({first.instruction.opcode})",
        metadata.op_name,
        first.measure,
        first.inside,
        first.certain,
    )


def _values(given: StepToCheck) -> list[np.ndarray]:
    """The state of the step, copied from wherever it is fresh."""
    return [np.array(value.numpy()) for value in given.step.captures]


def _names(given: StepToCheck) -> list[tuple[str, str]]:
    """Kind and name of each result."""
    found = [("output", name) for name, _ in named_leaves(given.step.structure)]
    for i in given.step.updates:
        variable = given.step.captures[i]
        kind = given.roles.get(id(variable), "other")
        if kind in ("other", "frozen"):
            # A slot of an optimizer that the model does not know of, say.
            kind = "state" if variable.reference is None else "optimizer"
        found.append((kind, variable.path))
    return found


def _opcodes(proto: hlo_pb2.HloModuleProto) -> dict[str, list[str]]:
    """The opcodes of a module, and the operations that each was made from."""
    found: dict[str, list[str]] = {}
    for computation in proto.computations:
        for instruction in computation.instructions:
            names = found.setdefault(instruction.opcode, [])
            names.append(instruction.metadata.op_name)
    return found


def _notes_on(opcodes: dict[str, list[str]]) -> list[str]:
    if "rng" not in opcodes:
        return []
    return [
        "The step draws random numbers that depend on no seed in its state, as "
        "tf.random.uniform does, so no two runs are alike. Use keras.random with a "
        f"SeedGenerator. It draws them in {_some(sorted(set(opcodes['rng'])))}"
    ]


def _what_was_not_seen(given: StepToCheck, rows: Sequence[Row]) -> list[str]:
    """What equal rows do not say."""
    rows = rows[: len(given.step.results)]
    notes = []
    loose = [
        row.name
        for row in rows
        if row.ok and row.measure.moved and row.measure.allowed > 0.5
    ]
    if loose:
        notes.append(
            f"Rounding decides most of {len(loose)} values, so little can be said of "
            f"them: {_some(loose)}"
        )
    if not given.trains:
        return notes
    moved = {
        id(given.step.captures[i])
        for i, row in zip(
            given.step.updates, rows[given.step.num_outputs :], strict=True
        )
        if row.measure.moved
    }
    slots = {
        id(variable.reference)
        for variable in given.step.captures
        if isinstance(variable, MeshVariableBase) and id(variable) in moved
    }
    still = [
        variable.path
        for variable in given.step.captures
        if given.roles.get(id(variable)) == "weight"
        and id(variable) not in moved | slots
    ]
    if still:
        notes.append(
            f"{len(still)} trainable weights did not move, nor did their slots, so "
            f"nothing is known of their gradients: {_some(still)}"
        )
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["without a message"]
    return f"{type(error).__name__}: {lines[0]}"[:300]
