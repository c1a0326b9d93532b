"""A traced function as HLO."""

import pytest
import tensorflow as tf

from gshard_tf.compat.tf_compiler import lower_to_hlo
from gshard_tf.compat.xla_protos import hlo_pb2


def test_arguments_and_outputs_come_before_captures_and_updates():
    counter = tf.Variable([0.0, 0.0])

    @tf.function(jit_compile=True)
    def step(x):
        counter.assign_add([1.0, 2.0])
        return 2.0 * x

    function = step.get_concrete_function(tf.TensorSpec([3]))
    proto = hlo_pb2.HloModuleProto.FromString(lower_to_hlo(function))
    program = proto.host_program_shape
    assert [list(p.dimensions) for p in program.parameters] == [[3], [2]]
    assert [list(r.dimensions) for r in program.result.tuple_shapes] == [[3], [2]]
    [alias] = proto.input_output_alias.entries
    assert list(alias.output_shape_index) == [1] and alias.parameter_number == 1


def test_what_xla_cannot_compile_is_an_error():
    step = tf.function(lambda x: tf.strings.as_string(x), jit_compile=True)
    function = step.get_concrete_function(tf.TensorSpec([1]))
    with pytest.raises(ValueError):
        lower_to_hlo(function)
