"""One compiled step: feeds it, runs it, and writes the state back."""

import dataclasses
import functools
import json
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gshard_tf.runtime.device_arrays import Placement
from gshard_tf.runtime.process_group import (
    all_gather_text,
    collective_section,
    group,
)
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.variable_layouts import VariableLayouts
from gshard_tf.spmd.borrowed_variable import BorrowedVariable
from gshard_tf.spmd.index_uses import IndexUse
from gshard_tf.spmd.input_checks import argument_names, check_indices
from gshard_tf.spmd.lowering import LoweredStep
from gshard_tf.spmd.nonfinite import NonFiniteError, SkippedStep, is_finite
from gshard_tf.spmd.program import SpmdProgram
from gshard_tf.spmd.step_layouts import step_layouts
from gshard_tf.spmd.variable import MeshVariable, checksum_of

if TYPE_CHECKING:
    from gshard_tf.spmd.strategy import SpmdExtended

# What a step captures and may change; the rest are constants.
STATE_VARIABLES = (MeshVariable, BorrowedVariable)


@dataclasses.dataclass(frozen=True)
class StartedStep:
    """A step that runs on the devices, or has ended there.

    Attributes:
        outputs: Its outputs, on the devices.
        discard: Called when it failed, so that nobody takes what it made for values.
    """

    outputs: Sequence[Any]
    discard: Callable[[], None]

    def is_ready(self) -> bool:
        """Returns whether the outputs can be read without waiting."""
        return all(output.is_ready() for output in self.outputs)

    def read(self) -> list[np.ndarray]:
        """Returns the outputs, once they are there; raises what went wrong."""
        try:
            return [np.asarray(output) for output in self.outputs]
        except Exception:
            self.discard()
            raise


class Executable:
    """A program and the variables that it runs on; compiled when first called."""

    def __init__(
        self,
        extended: "SpmdExtended",
        step: LoweredStep,
        name: str,
        arguments: Any,
        uses: list[IndexUse],
    ):
        self.extended = extended
        self.step = step
        self.name = name
        self.arguments = arguments
        self.uses = uses
        self.program: SpmdProgram | None = None
        self.constants: dict[int, Any] = {}

    def __call__(self, arrays: Sequence[np.ndarray]) -> StartedStep:
        """Starts the step for arrays of these shapes."""
        extended, step = self.extended, self.step
        with extended.transfer.lock:
            program = self.program
            if program is None or program.keep_finite != extended.keep_finite:
                program = self._compile()
            extended.steps_run[self.name] += 1
            if extended.check_numerics:
                self._check_finite(arrays, lambda i: f"argument {i}")
            captures = [
                value.device_value(functools.partial(self._put, x))
                if isinstance(value, STATE_VARIABLES)
                else self.constants[i]
                for i, (value, x) in enumerate(
                    zip(step.captures, program.layouts.captures, strict=True)
                )
            ]
            inputs = program.put_inputs(arrays)
            count = extended.steps_run[self.name]
            with collective_section(f"step {count} of {self.name}"):
                outputs, updated = program(inputs, captures)
                if group().count > 1:
                    # The watchdog times the section, so the step ends in it.
                    program.wait([*updated, *outputs])
            if program.keep_finite:
                *updated, broken = updated
            if extended.check_numerics:
                self._check_finite(outputs, lambda i: f"result {i}")
                self._check_finite(
                    updated,
                    lambda i: (
                        f"the new value of {step.captures[step.updates[i]].path!r}"
                    ),
                )
            # At once: the old values are gone, their memory is reused. Whoever reads a
            # new one waits for the step.
            for i, value in zip(step.updates, updated, strict=True):
                step.captures[i].set_device_copy(value)
            if program.keep_finite and np.any(broken):
                self._note_skipped(np.asarray(broken), arrays)
            return StartedStep(outputs, self._discard)

    def _discard(self) -> None:
        with self.extended.transfer.lock:
            for i in self.step.updates:
                if isinstance(self.step.captures[i], MeshVariable):
                    self.step.captures[i].discard_device_copy()

    def _put(self, layout: MeshLayout, array: np.ndarray) -> Any:
        return self.extended.placement.put(array, layout)

    def check_inputs(self, arrays: Sequence[np.ndarray]) -> None:
        """Raises `InputRangeError` for an id or a label that is out of range."""
        extended = self.extended
        check_indices(
            # A guard that finds NaN is told what to do about it.
            [use for use in self.uses if not (use.makes_nan and extended.keep_finite)],
            arrays,
            argument_names(self.name, self.arguments),
            extended.row_share,
        )

    def _note_skipped(self, broken: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        step, extended = self.step, self.extended
        broken_variables = [
            step.captures[i] for i, bad in zip(step.updates, broken, strict=True) if bad
        ]
        extended.skipped_steps.append(
            SkippedStep(
                extended.steps_run[self.name],
                # Copies: the arguments' memory is TensorFlow's.
                [np.array(array) for array in arrays],
                self.arguments,
                broken_variables,
            )
        )

    def _check_finite(self, values: Any, name: Callable[[int], str]) -> None:
        for i, value in enumerate(values):
            if not is_finite(value):
                shape = tuple(value.shape)
                raise NonFiniteError(
                    "A step must be finite (check_numerics=True). The model and its "
                    "optimizer are as they were before that step. Received: NaN or "
                    f"infinity in {name(i)} (shape {shape}) of step "
                    f"{self.extended.steps_run[self.name]} of {self.name}"
                )

    def _compile(self) -> SpmdProgram:
        extended = self.extended
        if group().count > 1:
            check_processes_agree(self.step, self.name)
        program = compile_step(
            extended.layouts,
            self.step,
            extended.placement,
            donate=not extended.check_numerics,
            keep_finite=extended.keep_finite,
        )
        extended.layouts.warn_once()
        self.constants = {
            i: extended.placement.put(value.numpy(), layout)
            for i, (value, layout) in enumerate(
                zip(self.step.captures, program.layouts.captures, strict=True)
            )
            if not isinstance(value, STATE_VARIABLES)
        }
        extended.programs.append(weakref.ref(program))
        self.program = program
        return program


def compile_step(
    layouts: VariableLayouts,
    step: LoweredStep,
    placement: Placement,
    donate: bool = True,
    keep_finite: bool = False,
) -> SpmdProgram:
    """Compiles a step with the layouts of its strategy, for the devices of `placement`.

    They need not be the strategy's own, nor exist.
    """
    return SpmdProgram(
        step, placement, step_layouts(layouts, step), donate, keep_finite
    )


def check_processes_agree(step: LoweredStep, name: str) -> None:
    """Compares the steps that the processes are about to run, and their values.

    Raises:
        ValueError: in all of them, when it is not the same.
    """
    shapes = [str(spec) for spec in step.inputs]
    checksums: dict[str, int] = {}
    for i, value in enumerate(step.captures):
        path = f"{i} {getattr(value, 'path', 'constant')}"
        is_mesh = isinstance(value, MeshVariable)
        checksum = value.checksum() if is_mesh else checksum_of(value.numpy())
        if checksum is not None:
            checksums[path] = checksum
    message = json.dumps({"shapes": shapes, "values": checksums})
    first, *others = (json.loads(text) for text in all_gather_text("step", message))
    for i, other in enumerate(others, 1):
        if other["shapes"] != first["shapes"]:
            raise ValueError(
                f"All processes must run the same {name}: process 0 has batches "
                f"{first['shapes']}. Received: process {i} has {other['shapes']}"
            )
        one, two = first["values"], other["values"]
        differing = [path for path in {**one, **two} if one.get(path) != two.get(path)]
        if differing:
            raise ValueError(
                "All processes must begin with the same values; call "
                "keras.utils.set_random_seed in all of them before the model is made, "
                f"and restore the same checkpoint. Received: process {i} differs from "
                f"process 0 in {len(differing)} variables: {differing[:5]}"
            )
