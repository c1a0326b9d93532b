"""From operations to layers."""

import pytest

from gshard_tf.hlo.layer_names import LayerNames, operation_of

TREE = {
    "model": {
        "encoder": {"encoder_1": {"attention": {}}, "encoder_2": {"moe": {}}},
        "mo_e_layer": {"experts": {}},
        "mo_e_layer_1": {"experts": {}},
    },
    "adam": {},
}


@pytest.mark.parametrize(
    "op_name, layer",
    [
        ("jit(gshard_step)/gshard_step/model_1/encoder_1/encoder_2_1/moe_1/einsum",
         "model/encoder/encoder_2/moe"),
        ("gradient_tape/model_1/encoder_1/encoder_1_1/attention_1/einsum/Einsum_1",
         "model/encoder/encoder_1/attention"),
        # Keras's own number comes before TensorFlow's.
        ("model_1/mo_e_layer_1/transpose", "model/mo_e_layer"),
        ("model_1/mo_e_layer_1_1/transpose", "model/mo_e_layer_1"),
        # Gradients within a loop are called anew from the outermost.
        ("model_1/encoder_1/while/gradients/model_1/encoder_1/while/encoder_2_1/x",
         "model/encoder/encoder_2"),
        # And in a loop that is all gradient, after the innermost alone.
        ("while_1/encoder_2_1/moe_1/GatherV2", "model/encoder/encoder_2/moe"),
        ("adam/mul_3", "adam"),
        ("add_n", ""),
        ("while/experts_1/MatMul", ""),  # two layers are called so
    ],
)  # fmt: skip
def test_an_operation_belongs_to_its_innermost_layer(op_name, layer):
    assert LayerNames(TREE).layer_of(op_name) == layer


def test_an_operation_has_a_short_name():
    assert operation_of("model/dense_1/MatMul_12") == "MatMul"
