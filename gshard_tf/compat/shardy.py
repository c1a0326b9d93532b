"""GSPMD's annotations in a module as those of Shardy, for XLA's newer propagation.

Relies on: jaxlib's bindings of MLIR with its dialect `sdy`, `HloSharding.from_string`,
the custom calls that HLO has for shardings and manual regions, and jax's switch between
the partitioners. On an upgrade, watch: `jax._src.shard_map`, which emits both forms of
a manual region, and that `sdy.sharding_constraint` may still name its mesh inline.
"""

import collections
import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from gshard_tf.compat.tile_axes import SubAxis, tile_axes

_ANNOTATION = "mhlo.sharding"
_SHARDING, _ENTER, _LEAVE = "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"


def is_shardy_enabled() -> bool:
    """Returns whether jax compiles with Shardy, as it does by default.

    The switch is jax's own: `jax.config.update("jax_use_shardy_partitioner", False)`,
    or `JAX_USE_SHARDY_PARTITIONER=0` in the environment.
    """
    from jax._src import config

    return config.use_shardy_partitioner.value


def shardy_enabled() -> contextlib.AbstractContextManager:
    """Returns a scope in which jax takes programs with annotations of either kind.

    With Shardy off it refuses to load those of Shardy, and (0.10) fails to load those
    of GSPMD; with Shardy on it compiles those of GSPMD with GSPMD.
    """
    from jax._src import config

    return config.use_shardy_partitioner(True)


def to_shardy(module: Any, mesh_axes: Mapping[str, int]) -> None:
    """Replaces the annotations of a module of StableHLO by those of Shardy, in place.

    A `Sharding` becomes an `sdy.sharding_constraint` over the axes of the mesh. What is
    between `SPMDFullToShardShape` and `SPMDShardToFullShape` becomes an
    `sdy.manual_computation` over all of them.

    Args:
        module: An `ir.Module` of jaxlib's.
        mesh_axes: The size of each axis of the mesh, in its order.

    Raises:
        ValueError: for an annotation that has no such form.
    """
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import sdy

    sdy.register_dialect(module.context)
    found: dict[str, list[Any]] = collections.defaultdict(list)

    def visit(op):
        found[_target(op) or op.name].append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    constraints = found.pop(_SHARDING, [])
    enters, leaves = found.pop(_ENTER, []), found.pop(_LEAVE, [])
    for function in found["func.func"]:
        _drop_repeated(function)
    for op in (op for ops in found.values() for op in ops):
        if _ANNOTATION in op.attributes:
            raise _unknown(f"{op.attributes[_ANNOTATION]} of {op.name}")

    with module.context:
        shardings = _Shardings(mesh_axes)
        for loop in found["stablehlo.while"]:
            _constrain_body(loop, shardings)
        places = functools.cache(_places)
        regions: list[_Region] = []
        seen: set[Any] = set()
        # A region that nothing enters computes of the place of the device alone.
        for border in (*enters, *leaves):
            if border not in seen:
                regions.append(_Region(border, places(border.block)))
                seen.update(regions[-1].enters, regions[-1].leaves)
        functions = {_name(function): function for function in found["func.func"]}
        for region in regions:
            _enclose(region, shardings)
            for op in region.body:
                _expand_calls(op, functions)
        for op in constraints:
            _constrain(op, shardings)


def _name(function: Any) -> str:
    from jaxlib.mlir import ir

    return ir.StringAttr(function.attributes["sym_name"]).value


def _callee(call: Any) -> str:
    from jaxlib.mlir import ir

    return ir.FlatSymbolRefAttr(call.attributes["callee"]).value


def _expand_calls(op: Any, functions: Mapping[str, Any]) -> None:
    """Replaces calls in an operation by the bodies of the functions.

    XLA keeps calls in a manual computation apart to the end. Then what a gradient
    computes again is not merged with what the forward pass has computed, and the TPU's
    compiler may abort where it places a loop's values.
    """
    from jaxlib.mlir import ir

    if op.name != "func.call":
        for region in op.regions:
            for block in region:
                for inner in list(block):
                    _expand_calls(inner.operation, functions)
        return
    function = functions[_callee(op)].clone(ir.InsertionPoint(functions[_callee(op)]))
    [block] = function.regions[0]
    for argument, value in zip(block.arguments, op.operands, strict=True):
        argument.replace_all_uses_with(value)
    *body, end = (each.operation for each in block)
    for each in body:
        each.move_before(op)
    for result, value in zip(op.results, end.operands, strict=True):
        result.replace_all_uses_with(value)
    op.erase()
    function.operation.erase()
    for each in body:
        _expand_calls(each, functions)


def _drop_repeated(function: Any) -> None:
    """Drops annotations of an inner function's results, which its body has too."""
    for kind in ("arg_attrs", "res_attrs"):
        if kind in function.attributes:
            attributes = str(function.attributes[kind])
            if _ANNOTATION not in attributes:
                continue
            if "sym_visibility" not in function.attributes:
                raise _unknown(f"the step's {kind}, {attributes}")
            del function.attributes[kind]


def _constrain(op: Any, shardings: "_Shardings") -> None:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import sdy

    value, result = op.operands[0], op.results[0]
    # What enters a region has it there; what leaves one has "manual" here.
    if any(result.uses) and not _is_manual(op):
        with ir.InsertionPoint(op), op.location:
            value = sdy.ShardingConstraintOp(value, shardings.of(op)).result
    result.replace_all_uses_with(value)
    op.erase()


def _constrain_body(loop: Any, shardings: "_Shardings") -> None:
    """Lays out what a loop's body begins with as the annotated values before it.

    Shardy might follow the body's first operation instead, and so communicate once more
    before the loop.
    """
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import sdy

    [body] = loop.regions[1]
    for value, argument in zip(loop.operands, body.arguments, strict=True):
        if any(argument.uses) and _is_annotated(value):
            with ir.InsertionPoint.at_block_begin(body), loop.location:
                new = sdy.ShardingConstraintOp(argument, shardings.of(value.owner))
            argument.replace_all_uses_except(new.result, new.operation)


class _Region:
    """The operations of a manual region in their block.

    Attributes:
        enters: Those whose results are the parts of its arguments.
        body: Those between, in order.
        leaves: Those whose operands are the parts of its results.

    Args:
        border: One of those at which it is entered or left.
        places: The place of each operation in the block.
    """

    def __init__(self, border: Any, places: Mapping[Any, int]):
        found, todo = {border}, [border]
        block = border.block
        while todo:
            op = todo.pop()
            target = _target(op)
            near = [] if target == _LEAVE else _users(op, block)
            if target != _ENTER:
                near += [v.owner for v in _used(op) if _is_result(v, block)]
            new = {each.operation for each in near} - found
            found |= new
            todo += new
        ordered = sorted(found, key=places.__getitem__)
        self.enters = [op for op in ordered if _target(op) == _ENTER]
        self.leaves = [op for op in ordered if _target(op) == _LEAVE]
        self.body = [op for op in ordered if _target(op) not in (_ENTER, _LEAVE)]


def _places(block: Any) -> dict[Any, int]:
    return {op.operation: i for i, op in enumerate(block)}


def _enclose(region: _Region, shardings: "_Shardings") -> None:
    """Makes a region one operation."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import sdy

    entering = [enter.operands[0] for enter in region.enters]
    if not all(map(_is_annotated, entering)):
        raise _unknown("an argument of a manual region without a sharding")
    annotated = [value.owner for value in entering]
    per_value = sdy.TensorShardingPerValueAttr.get
    # All that enters is computed before, and all users of what leaves come after.
    first = region.leaves[0]
    with ir.InsertionPoint(first), first.location:
        manual = sdy.ManualComputationOp(
            [leave.results[0].type for leave in region.leaves],
            [op.operands[0] for op in annotated],
            per_value([shardings.of(op) for op in annotated]),
            per_value([shardings.of(op) for op in region.leaves]),
            sdy.ManualAxesAttr.get([ir.StringAttr.get(a) for a in shardings.mesh_axes]),
        )
        block = ir.Block.create_at_start(
            manual.body, [enter.results[0].type for enter in region.enters]
        )
        with ir.InsertionPoint(block):
            end = sdy.ReturnOp([leave.operands[0] for leave in region.leaves])
    for op in region.body:
        op.move_before(end.operation)
    for enter, argument in zip(region.enters, block.arguments, strict=True):
        enter.results[0].replace_all_uses_with(argument)
    for leave, result in zip(region.leaves, manual.results, strict=True):
        leave.results[0].replace_all_uses_with(result)
    for op in [*region.leaves, *region.enters]:
        op.erase()


class _Shardings:
    """Shardings of HLO as attributes of Shardy.

    Args:
        mesh_axes: See `to_shardy`.
    """

    def __init__(self, mesh_axes: Mapping[str, int]):
        self.mesh_axes = mesh_axes
        self._parsed = functools.cache(self._parse)

    def of(self, op: Any) -> Any:
        """Returns the sharding that a custom call annotates its result with."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import sdy

        rank = ir.RankedTensorType(op.results[0].type).rank
        text = ir.StringAttr(op.attributes[_ANNOTATION]).value
        mesh, dimensions = self._parsed(text, rank)
        open_ = _open_dimensions(ir.StringAttr(op.attributes["backend_config"]).value)
        return sdy.TensorShardingAttr.get(
            mesh,
            [
                sdy.DimensionShardingAttr.get(axes, is_closed=d not in open_)
                for d, axes in enumerate(dimensions)
            ],
        )

    def _parse(self, text: str, rank: int) -> tuple[Any, list[list[Any]]]:
        """Returns the mesh of a sharding, and the axes of each dimension."""
        sharding = _hlo_sharding(text)
        if sharding.is_replicated():
            return _mesh(self.mesh_axes), [[]] * rank
        subgroups = sharding.subgroup_types()
        if not sharding.is_tiled() or (
            subgroups and not sharding.replicate_on_last_tile_dim()
        ):
            raise _unknown(text)
        devices = np.reshape(
            sharding.tile_assignment_devices(), sharding.tile_assignment_dimensions()
        )
        axes = tile_axes(devices, rank, self.mesh_axes)
        if axes is not None:
            return _mesh(self.mesh_axes), [[_axis(a) for a in each] for each in axes]
        # The devices in another order: a mesh of their own.
        names = {f"tile_{d}": n for d, n in enumerate(devices.shape) if n > 1}
        mesh = _mesh(names, devices.flatten().tolist())
        return mesh, [
            [_axis(SubAxis(f"tile_{d}", 1, n, n))] if n > 1 else []
            for d, n in enumerate(devices.shape[:rank])
        ]


def _mesh(axes: Mapping[str, int], devices: list[int] | None = None) -> Any:
    from jaxlib.mlir.dialects import sdy

    if devices is None or devices == list(range(len(devices))):
        devices = []
    return sdy.MeshAttr.get(
        [sdy.MeshAxisAttr.get(*each) for each in axes.items()], devices
    )


def _axis(axis: SubAxis) -> Any:
    from jaxlib.mlir.dialects import sdy

    if axis.size == axis.axis_size:
        return sdy.AxisRefAttr.get(axis.axis)
    part = sdy.SubAxisInfoAttr.get(axis.pre_size, axis.size)
    return sdy.AxisRefAttr.get(axis.axis, part)


def _open_dimensions(config: str) -> list[int]:
    """Returns the dimensions that the partitioner decides on."""
    _, _, dimensions = config.partition("unspecified_dims=[")
    return [int(d) for d in dimensions.rstrip("]").split(",") if d]


def _hlo_sharding(text: str) -> Any:
    try:
        from jaxlib import _hlo  # type: ignore[attr-defined]  # it has no stubs
    except ImportError:
        from jaxlib import _jax as _hlo
    return _hlo.HloSharding.from_string(text)


def _target(op: Any) -> str | None:
    from jaxlib.mlir import ir

    if op.name != "stablehlo.custom_call":
        return None
    return ir.StringAttr(op.attributes["call_target_name"]).value


def _is_annotated(value: Any) -> bool:
    """Returns whether a value is an array's with its sharding, not a manual part."""
    from jaxlib.mlir import ir

    if not isinstance(value, ir.OpResult) or _target(value.owner) != _SHARDING:
        return False
    return not _is_manual(value.owner)


def _is_manual(op: Any) -> bool:
    from jaxlib.mlir import ir

    return ir.StringAttr(op.attributes[_ANNOTATION]).value == "{manual}"


def _is_result(value: Any, block: Any) -> bool:
    """Returns whether an operation of the block computes a value."""
    from jaxlib.mlir import ir

    return isinstance(value, ir.OpResult) and value.owner.operation.block == block


def _used(op: Any) -> list[Any]:
    """Returns what an operation and those in its regions use."""
    values = list(op.operands)
    for region in op.regions:
        for block in region:
            for inner in block:
                values += _used(inner)
    return values


def _users(op: Any, block: Any) -> list[Any]:
    """Returns the operations of the block that use the results of one of them."""
    users = []
    for result in op.results:
        for use in result.uses:
            user = use.owner.operation
            while user.block != block:
                user = user.block.owner.operation
            users.append(user)
    return users


def _unknown(received: str) -> ValueError:
    return ValueError(
        "Shardy has no form for an annotation of this step. Partition with GSPMD: set "
        f"JAX_USE_SHARDY_PARTITIONER=0. Received: {received}"
    )
