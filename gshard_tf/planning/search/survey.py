"""Facts of a model that do not depend on its layout, from one trace on one device."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat.jax_hlo import hlo_as_text
from gshard_tf.hlo import layer_names, parser
from gshard_tf.hlo.flops import flops_by_operation
from gshard_tf.layouts.partition_spec import PartitionSpec
from gshard_tf.planning.search.candidates import Candidate, Paths
from gshard_tf.planning.tracing import trace_step
from gshard_tf.sharding.annotations import logical_axes
from gshard_tf.sharding.mesh import create_mesh
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.sharding.variable_layouts import VariableLayouts
from gshard_tf.sharding.vectorize import recorded_pipelines
from gshard_tf.spmd.abstract import AbstractStrategy
from gshard_tf.spmd.keras_step import variable_roles

# The dimension of the batch's tensors that a logical axis counts.
_INPUT_DIMENSIONS = {"batch": 0, "length": 1, "height": 1, "width": 2}


@dataclasses.dataclass(frozen=True)
class Alike:
    """Variables that every layout treats alike: of one shape, dtype, role and names.

    Attributes:
        example: One of them.
        layers: The path of the layer of each.
        role: As in `Weight`.
        axes: The logical axis, or None, of each dimension; () if nothing names them.
        shape: Their shape.
        item_bytes: The bytes of an element.
    """

    example: MeshVariableBase
    layers: tuple[str, ...]
    role: str
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    item_bytes: int

    @property
    def count(self) -> int:
        """The number of variables."""
        return len(self.layers)

    @property
    def is_trained(self) -> bool:
        """True for weights that have gradients."""
        return self.role == "weight"

    @property
    def is_staged(self) -> bool:
        """True for weights of a pipeline's layers."""
        return "stage" in self.axes

    @property
    def is_stacked(self) -> bool:
        """True for variables whose first dimension is that of layers."""
        return self.axes[:1] in (("stage",), ("layer",))

    @property
    def repeats(self) -> int:
        """The number of layers in one variable."""
        return self.shape[0] if self.is_stacked else 1

    @property
    def width(self) -> int:
        """The size of the dimension "embed", or 0."""
        named = zip(self.shape, self.axes, strict=False)
        return next((size for size, name in named if name == "embed"), 0)


@dataclasses.dataclass(frozen=True)
class Stored:
    """The layout of variables that are alike, for one candidate.

    Attributes:
        alike: The variables.
        storage: The mesh axis, or None, of each dimension, as stored.
        compute: The same, as a step computes with it.
    """

    alike: Alike
    storage: PartitionSpec
    compute: PartitionSpec

    def bytes(self, spec: PartitionSpec, mesh: Mapping[str, int]) -> int:
        """Returns the bytes of one of them on a device, split by `spec`."""
        split = math.prod(mesh[axis] for axis in spec if axis is not None)
        return math.prod(self.alike.shape) * self.alike.item_bytes // split


class Survey:
    """A model's variables, products and logical axes.

    Args:
        model: As in `plan`.
        specs: Of the batch, from `batch_specs`.
        mode: One of `MODES`.
        paths: As in `AxisRules`.
    """

    def __init__(
        self,
        model: keras.Model | Callable[[], keras.Model],
        specs: Any,
        mode: str,
        paths: Paths = (),
    ):
        self.mode = mode
        self.paths = paths
        rules = _Recorder(paths)
        strategy = AbstractStrategy(create_mesh({"data": 1}, "TPU"), rules)
        with recorded_pipelines() as pipelines:
            built, step = trace_step(model, strategy, specs, mode)
        #: Microbatches of each pipeline.
        self.microbatches = [count for _, count in pipelines.values()]
        module = parser.parse(hlo_as_text(step.hlo))
        layers = layer_names.LayerNames(layer_names.layer_tree(built))
        #: Logical axes, or None, of the tensors that are annotated and of weights.
        self.named = rules.named
        #: FLOPs of the products by layer, of one device that does all.
        self.flops: dict[str, float] = {}
        for name, flops in flops_by_operation(module, module.loops()).items():
            layer = layers.layer_of(name)
            self.flops[layer] = self.flops.get(layer, 0.0) + flops
        #: Keeps the variables alive, which are known by their owners.
        self.model = built
        captures = [v for v in step.captures if isinstance(v, MeshVariableBase)]
        self.variables = _group(
            captures, variable_roles(built), strategy, rules, layers
        )
        self.shapes = [tuple(spec.shape) for spec in tf.nest.flatten(specs)]
        #: Positions of the longest tensor of the batch.
        self.tokens = max(
            math.prod(spec.shape if spec.dtype.is_integer else spec.shape[:-1])
            for spec in tf.nest.flatten(specs)
        )
        self._refusal = self._refusal_of_length(model, specs)

    @property
    def used(self) -> set[str]:
        """The logical axes that some weight or annotated tensor has."""
        found = {name for axes in self.named for name in axes if name is not None}
        return found | {"batch"}  # that of every input

    def obstacle(self, candidate: Candidate) -> str | None:
        """Returns why a candidate cannot be, or would waste devices; None: neither."""
        rules, mesh = candidate.rules, candidate.mesh
        for axes in self.named:
            over = [(rules[name], name) for name in axes if name and name in rules]
            for i, (axis, name) in enumerate(over):
                for other_axis, other in over[:i]:
                    if axis == other_axis:
                        return f"{other} and {name} of one tensor are over one axis"
        if self._refusal is not None and "length" in rules:
            return self._refusal
        for name, axis in rules.items():
            for size in self._sizes(name):
                if size % mesh[axis]:
                    return f"{name} does not divide ({size} over {mesh[axis]})"
        return None

    def _refusal_of_length(self, model: Any, specs: Any) -> str | None:
        """Returns why a pipeline cannot split lengths (`context_parallel`), or None."""
        whole = math.gcd(*self._sizes("length"))
        parts = next((n for n in range(2, whole + 1) if whole % n == 0), None)
        if not self.microbatches or parts is None:
            return None
        rules = AxisRules({"length": "seq"}, self.paths)
        strategy = AbstractStrategy(create_mesh({"seq": parts}, "TPU"), rules)
        try:
            trace_step(model, strategy, specs, self.mode)
        except ValueError as error:
            return str(error)
        return None

    def _sizes(self, name: str) -> list[int]:
        """Returns the known sizes of the dimensions that have a name."""
        sizes = {
            v.shape[d]
            for v in self.variables
            if v.role in ("weight", "frozen") and len(v.shape) > 1
            for d, axis in enumerate(v.axes)
            if axis == name
        }
        dimension = _INPUT_DIMENSIONS.get(name)
        if dimension is not None:
            sizes |= {s[dimension] for s in self.shapes if len(s) > dimension}
        if name == "batch":
            sizes |= {n // count for n in sizes for count in self.microbatches}
        return sorted(sizes)

    def bubble_factor(self, candidate: Candidate) -> float:
        """Returns the ticks of a pipeline over its microbatches: 1 without a bubble.

        Of several pipelines, of that with the fewest microbatches.
        """
        stages = candidate.splits(candidate.stage_axes())
        count = min(self.microbatches, default=math.inf)
        return 1 + (stages - 1) / count

    def stored(self, candidate: Candidate, mesh: dtensor.Mesh) -> list[Stored]:
        """Returns the layout of all variables."""
        layouts = VariableLayouts(mesh, candidate.axis_rules(self.paths))
        for alike in self.variables:
            alike.example.decision = None
            if alike.example.reference is not None:
                alike.example.reference.decision = None
        found = []
        for alike in self.variables:
            decision = layouts.layout_for(alike.example)
            compute = decision.compute or decision.storage
            found.append(Stored(alike, decision.storage.spec, compute.spec))
        return found


class _Recorder(AxisRules):
    """Rules that split nothing and note what they are asked for."""

    def __init__(self, paths: Paths):
        super().__init__({}, paths)
        self.named: set[tuple[str | None, ...]] = set()

    def layout(
        self,
        axes: Sequence[str | None],
        mesh: dtensor.Mesh,
        what: str = "a tensor",
    ) -> MeshLayout:
        self.named.add(tuple(axes))
        return super().layout(axes, mesh, what)


def _group(
    variables: Sequence[MeshVariableBase],
    roles: Mapping[int, str],
    strategy: AbstractStrategy,
    rules: AxisRules,
    names_of: layer_names.LayerNames,
) -> list[Alike]:
    def names(variable: MeshVariableBase) -> tuple[str | None, ...]:
        strategy.extended.layouts.layout_for(variable)  # the recorder sees its names
        pattern = rules.path_axes(variable.path, len(variable.shape))
        if pattern is not None:
            return pattern[1]
        owner = variable.owner
        return (None if owner is None else logical_axes(owner)) or ()

    def key(variable: MeshVariableBase) -> tuple:
        of = variable.reference
        return (
            roles.get(id(variable), "other"),
            tuple(variable.shape),
            variable.dtype,
            names(variable),
            variable.reference_dims,
            None if of is None else key(of),
        )

    groups: dict[tuple, list[MeshVariableBase]] = {}
    for variable in variables:
        groups.setdefault(key(variable), []).append(variable)
    return [
        Alike(
            example=alike[0],
            layers=tuple(names_of.layer_of(variable.path) for variable in alike),
            role=role,
            axes=axes,
            shape=shape,
            item_bytes=dtype.size,
        )
        for (role, shape, dtype, axes, _, _), alike in groups.items()
    ]
