"""How rewrites put instructions in and say where shards are."""

import numpy as np
import parity
import pytest
import tensorflow as tf
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

import gshard_tf
from gshard_tf.hlo.rewrites.editing import array_shape, next_instruction_id
from gshard_tf.hlo.rewrites.recomputed_rounding import compute_rounding_once
from gshard_tf.hlo.rewrites.shardings import MeshAxes


def test_new_ids_are_new_in_each_computation():
    """As in TensorFlow 2.21: the upper half of an id is its computation's."""
    module = hlo_pb2.HloModuleProto()
    for number, count in ((1, 6), (2, 2)):
        computation = module.computations.add(id=number)
        for local in range(1, count + 1):
            computation.instructions.add(id=number << 32 | local)
    known = {i.id & 0xFFFFFFFF for c in module.computations for i in c.instructions}
    first = next_instruction_id(module)
    assert first < 1 << 32 and not known & set(range(first, first + 9))


def test_what_is_replaced_may_be_the_result():
    module = hlo_pb2.HloModuleProto()
    computation = module.computations.add(id=1, root_id=2, name="main")
    for id_, opcode, operands in [(1, "parameter", []), (2, "floor", [1])]:
        computation.instructions.add(
            id=id_,
            name=f"{opcode}.{id_}",
            opcode=opcode,
            operand_ids=operands,
            shape=array_shape(xla_data_pb2.F32, [4]),
        )
    assert compute_rounding_once(module)
    [computation] = module.computations
    known = {i.id: i for i in computation.instructions}
    root = known[computation.root_id]
    assert root.opcode == "opt-barrier"
    assert known[root.operand_ids[0]].opcode == "floor"


@pytest.mark.parametrize(
    ("axes", "dimension"), [(["data"], 0), (["model"], 1), (["model", "data"], 0)]
)
def test_shards_are_where_jax_puts_them(axes, dimension):
    import jax

    sizes = {"data": 2, "model": 4}
    ours = MeshAxes(sizes).split_dimension(axes, 2, dimension)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), tuple(sizes))
    spec = [None, None]
    spec[dimension] = tuple(axes)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    theirs = sharding.devices_indices_map((16, 16))
    tiles = list(ours.tile_assignment_dimensions)[:2]
    devices = np.array(ours.tile_assignment_devices).reshape(*tiles, -1)
    for tile in np.ndindex(*tiles):
        for device in devices[tile]:
            index = theirs[mesh.devices.flat[device]]
            starts = [
                (i.start or 0) * n // 16 for i, n in zip(index, tiles, strict=True)
            ]
            assert starts == list(tile)


def run(operation, mesh, rules, x):
    strategy = gshard_tf.SpmdStrategy(
        gshard_tf.create_mesh(mesh), gshard_tf.AxisRules(rules)
    )
    got = strategy.run(tf.function(operation, autograph=False), args=(x,))
    return parity.relative_difference(got, operation(x))


def test_a_transform_over_all_dimensions_splits_none():
    def operation(x):
        x = tf.cast(gshard_tf.annotate(x, ("rows",)), tf.complex64)
        return tf.math.imag(tf.signal.fft(x))

    x = tf.constant(np.random.default_rng(0).normal(size=16).astype("float32"))
    assert run(operation, {"data": 2, "model": 2}, {"rows": "data"}, x) < 1e-4
