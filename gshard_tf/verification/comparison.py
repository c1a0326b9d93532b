"""Compares a step on the mesh with the same step on one device and in TensorFlow."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.compat.xla_protos import HloModuleProto
from gshard_tf.hlo.layer_names import LayerNames
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.spmd import lowering
from gshard_tf.spmd.leaf_names import named_leaves
from gshard_tf.spmd.strategy import SpmdExtended
from gshard_tf.verification import tolerances
from gshard_tf.verification.first_difference import find_first
from gshard_tf.verification.references import (
    OnDevices,
    Run,
    in_tensorflow,
    on_mesh,
    on_one_device,
)
from gshard_tf.verification.report import Origin, Row, VerificationReport
from gshard_tf.verification.tolerances import Measure

ONE_DEVICE = "one device"
TENSORFLOW = "TensorFlow"


@dataclasses.dataclass(frozen=True)
class StepToCheck:
    """A step and its arguments.

    Attributes:
        extended: The `SpmdExtended` of its strategy.
        step: The step, lowered for the mesh.
        trace: Traces it again without a mesh, to be compiled or not.
        arrays: Its arguments.
        roles: The role of each variable by its `id`; see `keras_step.variable_roles`.
        layers: Finds the layers of the model in the names of operations.
        title: The title of the report.
        trains: Whether weights are expected to change.
    """

    extended: SpmdExtended
    step: lowering.LoweredStep
    trace: Callable[[bool], Any]
    arrays: Sequence[np.ndarray]
    roles: dict[int, str]
    layers: LayerNames
    title: str
    trains: bool


def check_step(checked: StepToCheck, tolerance: float | None) -> VerificationReport:
    """Runs a step in three ways and compares all results.

    No variable is written to: each run has copies.

    Args:
        checked: The step.
        tolerance: Relative to the largest number of each array; None: by the narrowest
            floating type of the step.
    """
    proto = HloModuleProto.FromString(checked.step.hlo)
    default, rounding = tolerances.precision(proto)
    tolerance = default if tolerance is None else tolerance
    captures = _values(checked)
    comparer = _Comparer(checked, captures, tolerance, rounding)
    opcodes = _opcodes(proto)
    # With the same seed, TensorFlow's kernels and compilers draw different numbers.
    compiled = "rng-bit-generator" in opcodes
    notes = _notes_on(opcodes)
    mesh = on_mesh(checked.extended, checked.step, checked.arrays)
    results = mesh.compile(checked.step)(captures)
    one = on_one_device(checked.extended, checked.step, checked.arrays)
    # Two references: the first shares the lowering with the mesh, so it shows the
    # effect of partitioning; the second shares only the layers.
    references: dict[str, list[np.ndarray]] = {}
    for name, make in (
        (ONE_DEVICE, lambda: one.compile(checked.step)),
        (
            TENSORFLOW,
            lambda: in_tensorflow(
                checked.trace(compiled), checked.step, checked.arrays, compiled
            ),
        ),
    ):
        try:
            run = make()
            references[name] = run(captures)
        # A reference that cannot run is not a difference; a note reports it.
        except (RuntimeError, ValueError, TypeError, tf.errors.OpError) as error:
            notes.append(f"Not compared with {name}: {_first_line(error)}")
            continue
        if comparer.noise is None:
            comparer.noise = comparer.noise_of(run, references[name])
    if not references:
        raise RuntimeError(
            "A comparison needs a reference, and there is nothing to compare with: "
            f"{checked.title} runs neither on one device nor in TensorFlow alone. "
            f"Received: {' '.join(notes)}"
        )
    rows = [
        Row(reference, kind, name, measure)
        for reference, expected in references.items()
        for (kind, name), measure in zip(
            _names(checked), comparer.compare(results, expected), strict=True
        )
    ]
    origin = None
    differing = [
        i
        for i, row in enumerate(rows[: len(checked.step.results)])
        if row.reference == ONE_DEVICE and not row.ok
    ]
    if differing:
        origin = _origin(checked, comparer, mesh, one, differing)
        if origin is None:
            notes.append(
                "The difference vanishes when intermediate values become results, "
                "because the compiler then makes another program; so its origin is not "
                "known."
            )
    elif not all(row.ok for row in rows) and ONE_DEVICE in references:
        notes.append(
            "The mesh and one device agree, and TensorFlow does not: the fault is in "
            "what they have in common, the annotations of layers, the lowering or XLA, "
            "and not in partitioning."
        )
    notes += _blind_spots(checked, rows)
    return VerificationReport(checked.title, tolerance, rows, origin, notes)


class _Comparer:
    """Compares the results of two runs, given the effect of rounding on them."""

    def __init__(
        self,
        checked: StepToCheck,
        captures: list[np.ndarray],
        tolerance: float,
        rounding: float,
    ):
        self.step = checked.step
        self.captures = captures
        self.tolerance = tolerance
        self.noise: list[float] | None = None
        # Scalars are learning rates, loss scales and counts, so they are not rounded.
        is_rounded = [
            isinstance(variable, tf.Variable)
            and tolerances.is_floating(value)
            and value.ndim > 0
            for variable, value in zip(checked.step.captures, captures, strict=True)
        ]
        self.perturbed = tolerances.perturbed(captures, is_rounded, rounding)

    def _old(self, captures: Sequence[np.ndarray], count: int) -> list[Any]:
        """Returns the old value of each result that updates a variable; else None."""
        step = self.step
        old: list[Any] = [None] * step.num_outputs
        old += [captures[i] for i in step.updates]
        return old + [None] * (count - len(old))

    def noise_of(self, run: Run, results: Sequence[np.ndarray]) -> list[float]:
        """Returns how much rounding changes each result."""
        old = self._old(self.captures, len(results))
        others = [
            (run(captures), self._old(captures, len(results)))
            for captures in self.perturbed
        ]
        return [
            tolerances.noise(
                [new[i] for new, _ in others],
                [before[i] for _, before in others],
                tolerances.change(value, old[i]),
            )
            for i, value in enumerate(results)
        ]

    def compare(
        self,
        results: Sequence[np.ndarray],
        expected: Sequence[np.ndarray],
        noise: Sequence[float] | None = None,
    ) -> list[Measure]:
        """Measures each result; `noise` defaults to that of the whole step."""
        old = self._old(self.captures, len(results))
        if noise is None:
            noise = self.noise or [0.0] * len(results)
        return [
            tolerances.measure(a, b, before, self.tolerance, each)
            for a, b, before, each in zip(results, expected, old, noise, strict=True)
        ]


def _origin(
    checked: StepToCheck,
    comparer: _Comparer,
    mesh: OnDevices,
    one: OnDevices,
    differing: list[int],
) -> Origin | None:
    def compare(step: lowering.LoweredStep) -> list[Measure]:
        results = mesh.compile(step)(comparer.captures)
        run = one.compile(step)
        expected = run(comparer.captures)
        return comparer.compare(results, expected, comparer.noise_of(run, expected))

    first = find_first(checked.step, differing, compare)
    if first is None:
        return None
    metadata = first.instruction.metadata
    return Origin(
        checked.layers.layer_of(metadata.op_name),
        f"{first.instruction.name} ({first.instruction.opcode})",
        metadata.op_name,
        first.measure,
        first.inside,
        first.certain,
    )


def _values(checked: StepToCheck) -> list[np.ndarray]:
    """Returns copies of the current state of the step."""
    return [np.array(value.numpy()) for value in checked.step.captures]


def _names(checked: StepToCheck) -> list[tuple[str, str]]:
    """Returns kind and name of each result."""
    names = [("output", name) for name, _ in named_leaves(checked.step.structure)]
    for i in checked.step.updates:
        variable = checked.step.captures[i]
        kind = checked.roles.get(id(variable), "other")
        if kind in ("other", "frozen"):
            # Such as a slot of an optimizer that is not the model's own.
            kind = "state" if variable.reference is None else "optimizer"
        names.append((kind, variable.path))
    return names


def _opcodes(proto: HloModuleProto) -> dict[str, list[str]]:
    """Returns the opcodes of a module with the operations that each stems from."""
    opcodes: dict[str, list[str]] = {}
    for computation in proto.computations:
        for instruction in computation.instructions:
            names = opcodes.setdefault(instruction.opcode, [])
            names.append(instruction.metadata.op_name)
    return opcodes


def _notes_on(opcodes: dict[str, list[str]]) -> list[str]:
    if "rng" not in opcodes:
        return []
    return [
        "The step draws random numbers that depend on no seed in its state, as "
        "tf.random.uniform does, so no two runs are alike. Use keras.random with a "
        f"SeedGenerator. It draws them in {_some(sorted(set(opcodes['rng'])))}"
    ]


def _blind_spots(checked: StepToCheck, rows: Sequence[Row]) -> list[str]:
    """Returns notes on values of which equal rows prove little."""
    rows = rows[: len(checked.step.results)]
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
    if not checked.trains:
        return notes
    moved = {
        id(checked.step.captures[i])
        for i, row in zip(
            checked.step.updates, rows[checked.step.num_outputs :], strict=True
        )
        if row.measure.moved
    }
    slots = {
        id(variable.reference)
        for variable in checked.step.captures
        if isinstance(variable, MeshVariableBase) and id(variable) in moved
    }
    still = [
        variable.path
        for variable in checked.step.captures
        if checked.roles.get(id(variable)) == "weight"
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
