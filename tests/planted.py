"""Models to verify, and faults to plant in what is made of them."""

import dataclasses

import keras
import parity
from tensorflow.compiler.xla.service import hlo_pb2

from gshard_tf.spmd import program

X, Y = parity.data(16)
MESH = {"data": 2, "expert": 2}


def sparse_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def three_layers(optimizer="adam", metrics=("accuracy",)):
    model = keras.Sequential(
        [
            keras.layers.Input([8, 4]),
            keras.layers.Flatten(),
            keras.layers.Dense(6, "tanh", name="below"),
            keras.layers.Dense(5, "tanh", name="middle"),
            keras.layers.Dense(3, name="above"),
        ]
    )
    model.compile(optimizer, sparse_loss(), metrics=metrics and list(metrics))
    return model


def on_mesh(make, mesh=None):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    strategy = parity.strategy_of(MESH if mesh is None else mesh)
    with strategy.scope():
        return make()


def state(model):
    extra = {
        f"{name}/{i}": variable.numpy()
        for name, value in vars(model).items()
        if isinstance(value, keras.optimizers.Optimizer)
        for i, variable in enumerate(value.variables)
    }
    return {**parity.state(model), **extra}


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


def altered(hlo, opcode, operation, new_opcode):
    """A module, one of whose operations does something else."""
    proto = hlo_pb2.HloModuleProto.FromString(hlo)
    found = [
        instruction
        for computation in proto.computations
        for instruction in computation.instructions
        if instruction.opcode == opcode and operation in instruction.metadata.op_name
    ]
    assert found, f"no {opcode} in {operation}"
    for instruction in found:
        instruction.opcode = new_opcode
    return proto.SerializeToString()


def plant_in_partitioner(monkeypatch, opcode, operation, new_opcode, seen=True):
    """Makes XLA's partitioner compute one operation wrongly.

    With `seen=False` only as long as no result in between is looked at.
    """
    compile_ = program.jit_step

    def jit_step(step, mesh, *args):
        is_observed = b"observed" in step.hlo
        if mesh.size > 1 and (seen or not is_observed):
            hlo = altered(step.hlo, opcode, operation, new_opcode)
            step = dataclasses.replace(step, hlo=hlo)
        return compile_(step, mesh, *args)

    monkeypatch.setattr(program, "jit_step", jit_step)
