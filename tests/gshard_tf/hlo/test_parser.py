"""Reading compiled programs, against XLA's own count of what they do."""

import jax
import numpy as np
import pytest

from gshard_tf.hlo import collectives, parser
from gshard_tf.hlo.flops import instruction_flops


def flops(module, loops=None):
    return sum(
        times * instruction_flops(instruction, computation)
        for instruction, computation, times in module.executed(loops)
    )


def convolution(window, left_dilation, padding, groups=1):
    def call(x, k):
        return jax.lax.conv_general_dilated(
            x,
            k,
            window_strides=window,
            lhs_dilation=left_dilation,
            padding=padding,
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return call


@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda a, b: a @ b, [(8, 16), (16, 4)]),
        (lambda a, b: a @ b, [(3, 8, 16), (3, 16, 4)]),
        (convolution((1, 1), (1, 1), "SAME"), [(2, 9, 7, 3), (3, 3, 3, 5)]),
        (convolution((2, 1), (1, 1), "VALID"), [(2, 9, 7, 4), (3, 2, 4, 6)]),
        (
            convolution((1, 1), (2, 3), [(2, 1), (0, 2)]),
            [(1, 5, 4, 2), (3, 2, 2, 3)],
        ),
        (convolution((1, 1), (1, 1), "SAME", 2), [(2, 6, 6, 4), (3, 3, 2, 8)]),
    ],
)
def test_products_count_as_xla_counts_them(function, shapes):
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    # Before optimization, so that nothing is fused and nothing is rewritten.
    lowered = jax.jit(function).lower(*arrays)
    text = lowered.compiler_ir("hlo").as_hlo_text()
    assert flops(parser.parse(text)) == lowered.cost_analysis()["flops"]


def test_kernels_state_their_flops():
    """Also over several lines, as a module before optimization has it."""
    text = """HloModule kernels

ENTRY main {
  p = f32[8,8]{1,0} parameter(0)
  k = f32[8,8]{1,0} custom-call(p), custom_call_target="tpu_custom_call", \\
backend_config={"custom_call_config": {"body": "TUw=", "cost_estimate": {
"bytes_accessed":512,
"flops":1024,
"transcendentals":0
}, "serialization_format": 1}}
  ROOT c = f32[8,8]{1,0} custom-call(k), custom_call_target="tpu_custom_call", \\
backend_config={"custom_call_config":{"cost_estimate":{"flops":"7"}}}
}
""".replace("\\\n", "")
    assert flops(parser.parse(text)) == 1024 + 7


def test_loops_count_as_often_as_they_turn():
    def loop(x, w):
        return jax.lax.fori_loop(0, 7, lambda i, y: y @ w, x)

    shapes = [jax.ShapeDtypeStruct((4, 4), np.float32)] * 2
    compiled = jax.jit(loop).lower(*shapes).compile()
    module = parser.parse(compiled.as_text())
    assert flops(module) == 7 * 2 * 4**3
    assert list(module.loops().values()) == [7]


def test_what_has_no_name_is_called_after_what_it_is_applied_to():
    text = """HloModule m

%fused (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %d = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %b = f32[4,4]{1,0} negate(%a), metadata={op_name="layer/neg"}
  ROOT %f = f32[4,4]{1,0} fusion(%b), kind=kLoop, calls=%fused
}
"""  # noqa: E501
    found = [i for i, _, _ in parser.parse(text).executed() if i.opcode == "dot"]
    assert [i.op_name for i in found] == ["layer/neg"]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="must be that of an HLO module"):
        parser.parse("func.func @main() {}")


@pytest.mark.parametrize(
    "attribute, groups",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_groups_in_all_their_forms(attribute, groups):
    text = f"""HloModule m

ENTRY %main (a: f32[4]) -> f32[8] {{
  %a = f32[4]{{0}} parameter(0)
  ROOT %g = f32[8]{{0}} all-gather(%a), channel_id=1, {attribute}, dimensions={{0}}
}}
"""
    (found,) = collectives.collectives(text)
    assert found.groups.tolist() == groups
    assert (found.kind, found.bytes, found.dimension) == ("all-gather", 32, 0)


def test_an_asynchronous_pair_counts_once_and_only_its_result():
    text = """HloModule m

ENTRY %main (a: bf16[4]) -> bf16[4] {
  %a = bf16[4]{0:T(512)} parameter(0)
  %s = (bf16[4]{0:T(512)}, bf16[4]{0:T(512)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  ROOT %d = bf16[4]{0:T(512)} collective-permute-done(%s)
}
"""  # noqa: E501
    (found,) = collectives.collectives(text)
    assert found.kind == "collective-permute" and found.bytes == 8
    assert found.pairs.tolist() == [[0, 1], [1, 0]]
