"""The layout of each variable of a strategy, and the rule that decided it."""

import dataclasses
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat.keras_variables import current_variable
from gshard_tf.layouts.partition_spec import (
    PartitionSpec,
    axes_of,
    join_axes,
    parts_over,
)
from gshard_tf.sharding.annotations import logical_axes
from gshard_tf.sharding.mesh import axis_sizes
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.neighbors import splits_against_neighbors
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.sharded_variable import MeshVariableBase

# A weight of more bytes than this that no rule mentions is worth a warning.
LARGE_BYTES = 1 << 20

NO_RULE = "no rule: replicated"
WHOLE_SLOT = "replicated, as its weight"


@dataclasses.dataclass(frozen=True)
class LayoutDecision:
    """The layout of a variable, and the reason for it.

    Attributes:
        storage: The layout in which it is stored.
        reason: The rule that decided it.
        compute: The layout in which a step computes with it, if the step gathers it;
            None: as it is stored.
    """

    storage: MeshLayout
    reason: str
    compute: MeshLayout | None = None


class VariableLayouts:
    """Decides, once per variable, by path patterns, names, and slots' weights.

    The order: a path pattern, but one of a `LayoutMap` is for weights alone; else the
    names that the layer gave; else, for an optimizer slot, the layout of its weight;
    else replicated.
    """

    def __init__(self, mesh: dtensor.Mesh, rules: AxisRules):
        self.mesh = mesh
        self.rules = rules
        self._unlinked: list[weakref.ref] = []
        self._patterns_used: set[str] = set()
        self._large: dict[str, int] = {}
        # Of a size that does not divide, and its mesh axis: the weights that have it.
        self._uneven: dict[tuple[int, str], list[str]] = {}
        # Shape and layout of each weight, of two and more dimensions, of a pattern.
        self._patterned: dict[str, tuple[tuple[int, ...], PartitionSpec]] = {}
        self._unmentioned: list[str] = []
        self._batch_divides = False
        self._uneven_batch: tuple[int, str] | None = None
        self._warned: set[str] = set()

    def register(self, variable: MeshVariableBase, reference: Any) -> None:
        """Records the owner of a new variable: a Keras layer, or a slot's weight."""
        keras_variable = current_variable()
        if keras_variable is not None:
            variable.keras_variable = weakref.ref(keras_variable)
        if isinstance(reference, MeshVariableBase):
            variable.reference = reference
            variable.reference_dims = tuple(range(reference.shape.rank))
            self._link_adafactor_factors(reference, variable)
        else:
            self._unlinked.append(weakref.ref(variable))

    def _link_adafactor_factors(
        self, reference: MeshVariableBase, slot: MeshVariableBase
    ) -> None:
        # Keras's Adafactor makes a weight's row and column factors just before the
        # slot that names the weight.
        rank = reference.shape.rank
        choices = [tuple(range(rank - 1)), (*range(rank - 2), rank - 1)]
        for ref in self._unlinked[-2:] if rank >= 2 else []:
            factor = ref()
            if factor is None or not _of_one_optimizer(factor, slot, reference):
                continue
            for dims in choices:
                if factor.shape.as_list() == [reference.shape[d] for d in dims]:
                    factor.reference, factor.reference_dims = reference, dims
                    choices.remove(dims)
                    break
        self._unlinked.clear()

    def layout_for(self, variable: MeshVariableBase) -> LayoutDecision:
        """The layout of a variable, and the reason for it."""
        if variable.decision is None:
            variable.decision = self._apply_fsdp(variable, self._choose(variable))
        return variable.decision

    def _apply_fsdp(
        self, variable: MeshVariableBase, decision: LayoutDecision
    ) -> LayoutDecision:
        """`decision`, split over the axis of `fsdp` or `zero` too if that is asked."""
        is_slot = variable.reference is not None
        asked = axes_of(self.rules.fsdp or (self.rules.zero if is_slot else None))
        shape = tuple(variable.shape)
        size = int(np.prod(shape)) * variable.dtype.size
        # Those that no rule splits it over already.
        axis = join_axes(a for a in asked if a not in decision.storage.axes)
        if axis is None or size < self.rules.fsdp_min_bytes:
            return decision
        layout = self._split(decision.storage, shape, axis)
        if layout is None:
            return decision
        return LayoutDecision(
            layout,
            f"{'fsdp' if self.rules.fsdp else 'zero'} over {axis!r}; {decision.reason}",
            compute=None if self._computes_as_stored(variable) else decision.storage,
        )

    def _split(self, layout: MeshLayout, shape: tuple, axis: str) -> MeshLayout | None:
        """`layout`, its largest dimension that divides split over `axis` too."""
        count = parts_over(axis, axis_sizes(self.mesh))
        fitting = [
            d
            for d, spec in enumerate(layout.spec)
            if spec is None and shape[d] % count == 0
        ]
        if not fitting:
            return None
        return layout.with_axes({max(fitting, key=lambda d: shape[d]): axis})

    def _computes_as_stored(self, variable: MeshVariableBase) -> bool:
        """Returns whether a step computes with the shards as stored."""
        owner = variable.owner
        axes = None if owner is None else logical_axes(owner)
        # What a loop over layers uses one by one must not be gathered as a whole.
        in_loop = axes is not None and axes[:1] == ("layer",)
        return variable.reference is not None or in_loop

    def _choose(self, variable: MeshVariableBase) -> LayoutDecision:
        owner = variable.owner
        name = variable.path
        shape = tuple(variable.shape)
        pattern = None
        if not (self.rules.is_layout_map and variable.reference is not None):
            pattern = self.rules.path_axes(name, len(shape))
        if pattern is not None:
            self._patterns_used.add(pattern[0])
        # The path of a slot may hold that of its weight, whose pattern then matches
        # both; a slot of another rank goes by its weight.
        if pattern is not None and not self._is_factor_under(pattern, variable):
            if len(pattern[1]) != len(shape):
                raise ValueError(
                    f"The path pattern {pattern[0]!r} names {len(pattern[1])} "
                    f"dimensions and matches the weight {name!r} of shape {shape}. "
                    f"Give one name (or None) for each of its {len(shape)} dimensions, "
                    "or a pattern that does not match it: a pattern must match the "
                    f"whole path. Received: paths=[({pattern[0]!r}, {pattern[1]!r})]"
                )
            decision = self._from_axes(pattern[1], variable, f"path {pattern[0]!r}")
            if variable.reference is None and len(shape) > 1:
                self._patterned[name] = shape, decision.storage.spec
            return decision
        axes = None if owner is None else logical_axes(owner)
        if axes is not None:
            return self._from_axes(axes, variable, f"axes {_names(axes)}")
        if variable.reference is not None:
            weight = self.layout_for(variable.reference)
            dims = variable.reference_dims or ()
            spec = tuple(weight.storage.spec[dim] for dim in dims)
            rule = "slot of its weight" if any(spec) else WHOLE_SLOT
            return LayoutDecision(MeshLayout(spec, self.mesh), rule)
        size = int(np.prod(shape)) * variable.dtype.size
        if self.rules.is_layout_map:
            if len(shape) > 1:
                self._unmentioned.append(name)
        elif size > LARGE_BYTES and self.mesh.size > 1:
            self._large[name] = size
        return LayoutDecision(MeshLayout.replicated(self.mesh, len(shape)), NO_RULE)

    def _is_factor_under(
        self, pattern: tuple[str, tuple[str | None, ...]], variable: MeshVariableBase
    ) -> bool:
        reference = variable.reference
        return (
            reference is not None
            and len(variable.shape) != len(reference.shape)
            and self.rules.path_axes(reference.path, len(variable.shape)) == pattern
        )

    def _from_axes(
        self, axes: tuple[str | None, ...], variable: MeshVariableBase, rule: str
    ) -> LayoutDecision:
        shape, name = tuple(variable.shape), variable.path
        layout = self.rules.layout(axes, self.mesh, f"the weight {name!r}")
        stored, uneven = _storable(layout, shape)
        if uneven:
            rule += f"; dimension {uneven} does not divide: whole"
            # Of a bias, its kernel's will do.
            for d in uneven if len(shape) > 1 else []:
                each = shape[d], str(layout.spec[d])
                self._uneven.setdefault(each, []).append(name)
        return LayoutDecision(stored, rule)

    def batch_layout(self, shape: tf.TensorShape) -> MeshLayout:
        """The layout of what enters or leaves a step: split by examples.

        And by what more the rules say. A dimension that does not divide is whole.
        """
        known = self.rules.batch_axes[: shape.rank]
        axes = [*known, *[None] * (shape.rank - len(known))]
        layout = self.rules.layout(axes, self.mesh, "what enters or leaves a step")
        return _storable(layout, tuple(shape))[0]

    def note_batch(self, shapes: Sequence[tf.TensorShape]) -> None:
        """Records whether the inputs of a program divide.

        One that does not may be the last of an epoch, after others that do.
        """
        axis = self.rules.mesh_axis("batch")
        sizes = {shape[0] for shape in shapes if shape.rank}
        if axis is None or not sizes:
            return
        parts = parts_over(axis, axis_sizes(self.mesh))
        if any(size % parts == 0 for size in sizes):
            self._batch_divides = True
        elif not self._batch_divides and max(sizes) > 1:
            self._uneven_batch = max(sizes), axis

    def warnings(self) -> list[str]:
        """Likely mistakes: rules that matched nothing, what does not divide, ..."""
        messages = [
            f"The path pattern {pattern.pattern!r} matched no weight."
            for pattern, _ in self.rules.paths
            if pattern.pattern not in self._patterns_used
        ]
        messages += [
            f"The rule {logical!r} -> {axis!r} matched no dimension of any weight or "
            "annotated tensor."
            for logical, axis in self.rules.unused()
        ]
        messages += [
            f"No rule mentions the weight {name!r} ({size / 2**20:.1f} MiB): every "
            "device holds all of it. Name its axes or add a path pattern to AxisRules "
            "(an axis of None says that replicating it is meant)."
            for name, size in self._large.items()
        ]
        if self._unmentioned:
            first, more = self._unmentioned[:3], len(self._unmentioned) - 3
            messages.append(
                "The layout map does not mention weights of two and more dimensions, "
                f"which every device holds whole: {', '.join(map(repr, first))}"
                + (f" and {more} more." if more > 0 else ".")
            )
        messages += splits_against_neighbors(self._patterned, axis_sizes(self.mesh))
        if self._uneven:
            whole = "; ".join(
                f"{self._fitting(*each)} ({names[0]!r}"
                + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
                for each, names in self._uneven.items()
            )
            messages.append(
                "Dimensions of weights that do not divide by their mesh axis are whole "
                f"on every device along it: {whole}."
            )
        if self._uneven_batch:
            messages.append(
                "The batch does not divide by its mesh axis, so that every device is "
                f"given all of it: {self._fitting(*self._uneven_batch)}."
            )
        return messages

    def _fitting(self, size: int, axis: str) -> str:
        count = parts_over(axis, axis_sizes(self.mesh))
        below, above = size // count * count, -(-size // count) * count
        fitting = f"{below} or {above}" if below else f"{above}"
        return f"{size} over the {count} devices of {axis!r}, where {fitting} would do"

    def warn_once(self) -> None:
        """Issues each of `warnings()` once."""
        for message in self.warnings():
            if message not in self._warned:
                self._warned.add(message)
                warnings.warn(message, stacklevel=2)


def _storable(layout: MeshLayout, shape: tuple) -> tuple[MeshLayout, list[int]]:
    """`layout`, whole along the dimensions that do not divide, and those dimensions.

    XLA's runtime takes only equal parts as arguments. (Inside a program, dimensions
    need not divide.)
    """
    uneven = [d for d, size in enumerate(shape) if size % layout.num_shards(d)]
    return layout.with_axes(dict.fromkeys(uneven)), uneven


def _names(axes: tuple[str | None, ...]) -> str:
    return "(" + ", ".join("-" if axis is None else axis for axis in axes) + ")"


def _of_one_optimizer(
    factor: MeshVariableBase, slot: MeshVariableBase, reference: MeshVariableBase
) -> bool:
    """Returns whether `factor` may be of the weight of `slot`, by its name alone."""
    if factor.keras_variable is None:
        # Keras 2: Adafactor/r/dense/kernel and Adafactor/v/dense/kernel.
        return factor.path.endswith(f"/{reference.path}")
    scope, other = (each.path.rpartition("/")[0] for each in (factor, slot))
    # Keras 3: adafactor/dense_kernel_velocity; a factor says no more than adafactor.
    return slot.keras_variable is not None and scope == other
