"""XLA's messages, as the rewrites use them."""

from gshard_tf.compat import xla_protos as xla


def test_a_module_survives_its_bytes():
    module = xla.HloModuleProto(name="m", entry_computation_id=1)
    computation = module.computations.add(name="main", id=1, root_id=2)
    shape = xla.ShapeProto(element_type=xla.xla_data_pb2.F32, dimensions=[2, 3])
    computation.instructions.add(
        name="p.2", id=2, opcode="parameter", parameter_number=0, shape=shape
    )
    read = xla.HloModuleProto.FromString(module.SerializeToString())
    [computation] = read.computations
    [instruction] = computation.instructions
    assert isinstance(computation, xla.HloComputationProto)
    assert isinstance(instruction, xla.HloInstructionProto)
    assert list(instruction.shape.dimensions) == [2, 3]


def test_a_sharding_says_how_devices_hold_an_array():
    sharding = xla.OpSharding(
        type=xla.OpSharding.OTHER,
        tile_assignment_dimensions=[2, 1, 2],
        tile_assignment_devices=[0, 1, 2, 3],
        replicate_on_last_tile_dim=True,
    )
    assert xla.OpSharding.FromString(sharding.SerializeToString()) == sharding
    assert xla.OpSharding(type=xla.OpSharding.REPLICATED) != xla.OpSharding(
        type=xla.OpSharding.MANUAL
    )
