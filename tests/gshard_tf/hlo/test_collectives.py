"""Collectives in the forms that the TPU compiler gives them."""

import textwrap

import pytest

from gshard_tf.hlo import collectives

# As in a program for v5e, with all that does not matter left out.
PIECES = """HloModule m

%begin (p: f32[8,4]) -> (f32[8,4], f32[8,32], u32[]) {
  %p = f32[8,4]{1,0} parameter(0)
  %g.1 = f32[8,32]{1,0} all-gather(%p), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  ROOT %s = (f32[8,4]{1,0}, f32[8,32]{1,0}, u32[]{:S(2)}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%go_on (p.1: f32[8,4], o: f32[8,32], f: u32[], q: f32[8,8]) -> (f32[8,8], f32[8,32]) {
  %p.1 = f32[8,4]{1,0} parameter(0)
  %o = f32[8,32]{1,0} parameter(1)
  %f = u32[]{:S(2)} parameter(2)
  %q = f32[8,8]{1,0} parameter(3)
  %n = f32[8,8]{1,0} negate(%q)
  %g.2 = f32[8,32]{1,0} all-gather(%p.1), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  ROOT %t = (f32[8,8]{1,0}, f32[8,32]{1,0}) tuple(%n, %g.2)
}

%end (p.2: f32[8,4], o.2: f32[8,32]) -> f32[8,32] {
  %p.2 = f32[8,4]{1,0} parameter(0)
  %o.2 = f32[8,32]{1,0} parameter(1)
  %g.3 = f32[8,32]{1,0} all-gather(%p.2), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  ROOT %d = f32[8,32]{1,0} custom-call(%p.2, %o.2, %g.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[8,4], b: f32[8,8]) -> f32[8,32] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %x = (f32[8,4]{1,0}, f32[8,32]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%begin
  %x.0 = f32[8,4]{1,0} get-tuple-element(%x), index=0
  %x.1 = f32[8,32]{1,0} get-tuple-element(%x), index=1
  %x.2 = u32[]{:S(2)} get-tuple-element(%x), index=2
  %y = (f32[8,8]{1,0}, f32[8,32]{1,0}) fusion(%x.0, %x.1, %x.2, %b), kind=kOutput, calls=%go_on
  %y.1 = f32[8,32]{1,0} get-tuple-element(%y), index=1
  %other = f32[8,32]{1,0} all-gather(%a), channel_id=6, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  ROOT %z = f32[8,32]{1,0} fusion(%x.0, %y.1), kind=kCustom, calls=%end
}
"""  # noqa: E501


def found_in(text):
    return collectives.collectives(text)


def test_a_collective_in_pieces_counts_once():
    found = found_in(PIECES)
    assert [(c.kind, c.bytes, c.times) for c in found] == [("all-gather", 1024, 1)] * 2


def scattering(results):
    """A fusion that adds up two tensors and results in `results`."""
    return textwrap.dedent(
        f"""\
        HloModule m

        %sum (x: f32[], y: f32[]) -> f32[] {{
          %x = f32[] parameter(0)
          %y = f32[] parameter(1)
          ROOT %z = f32[] add(%x, %y)
        }}

        %scatter (p: f32[64,4], q: f32[8,8]) -> (f32[8,4], f32[8,2]) {{
          %p = f32[64,4]{{1,0}} parameter(0)
          %q = f32[8,8]{{1,0}} parameter(1)
          %r = (f32[64,4]{{1,0}}, f32[8,8]{{1,0}}) all-reduce(%p, %q), channel_id=1, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%sum
          %r.0 = f32[64,4]{{1,0}} get-tuple-element(%r), index=0
          %r.1 = f32[8,8]{{1,0}} get-tuple-element(%r), index=1
          %i = u32[] partition-id()
          %o = u32[] constant(0)
          %s.0 = f32[8,4]{{1,0}} dynamic-slice(%r.0, %i, %o), dynamic_slice_sizes={{8,4}}
          %s.1 = f32[1,8]{{1,0}} dynamic-slice(%r.1, %i, %o), dynamic_slice_sizes={{1,8}}
          ROOT %t = (f32[8,4]{{1,0}}, f32[1,8]{{1,0}}) tuple({results})
        }}

        ENTRY %main (a: f32[64,4], b: f32[8,8]) -> (f32[8,4], f32[1,8]) {{
          %a = f32[64,4]{{1,0}} parameter(0)
          %b = f32[8,8]{{1,0}} parameter(1)
          ROOT %f = (f32[8,4]{{1,0}}, f32[1,8]{{1,0}}) fusion(%a, %b), kind=kCustom, calls=%scatter, metadata={{op_name="layer/grad"}}
        }}
        """  # noqa: E501
    )


def test_a_fused_sum_of_which_parts_are_kept_is_a_reduce_scatter():
    (found,) = found_in(scattering("%s.0, %s.1"))
    assert found.kind == "reduce-scatter" and found.op_name == "layer/grad"
    assert found.shapes == (("f32", (8, 4)), ("f32", (1, 8)))
    assert found.bytes == 4 * (8 * 4 + 8)


@pytest.mark.parametrize("results", ["%s.0, %r.1", "%r.0, %r.1"])
def test_a_fused_sum_that_is_kept_whole_is_an_all_reduce(results):
    (found,) = found_in(scattering(results))
    assert found.kind == "all-reduce" and found.bytes == 4 * (64 * 4 + 8 * 8)


def test_what_an_asynchronous_pair_calls_counts_once():
    text = """HloModule m

%moves (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %x = f32[4]{0} all-to-all(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %s = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%a), calls=%moves
  %u = ((f32[4]{0}), f32[4]{0}, u32[]) async-update(%s), calls=%moves
  ROOT %d = f32[4]{0} async-done(%u), calls=%moves
}
"""  # noqa: E501
    (found,) = found_in(text)
    assert (found.kind, found.times) == ("all-to-all", 1)


def combined(names, whole, kind="all-reduce", suffix=""):
    """A sum of three tensors whose results have these names, as XLA combines them."""
    parts = "".join(
        f"  %r.{i} = f32[{n}] get-tuple-element(%r{suffix}), index={i}"
        + (f', metadata={{op_name="{name}"}}' if name else "")
        + "\n"
        for i, (n, name) in enumerate(zip((8, 4, 2), names, strict=True))
    )
    shapes = "(f32[8]{0}, f32[4]{0}, f32[2]{0})"
    done = f"  %rd = {shapes} {kind}-done(%r)\n" if suffix else ""
    opcode = f"{kind}-start" if suffix else kind
    return f"""HloModule m

ENTRY %main (a: f32[8], b: f32[4], c: f32[2]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %b = f32[4]{{0}} parameter(1)
  %n = f32[2]{{0}} negate(%b), metadata={{op_name="m/last/neg"}}
  %r = {shapes} {opcode}(%a, %b, %n), channel_id=1, replica_groups={{{{0,1}}}}, metadata={{op_name="{whole}"}}
{done}{parts}  ROOT %z = f32[8]{{0}} negate(%r.0)
}}
"""  # noqa: E501


@pytest.mark.parametrize("suffix", ["", "d"])
def test_a_combined_sum_has_the_parts_of_its_operations(suffix):
    names = ["m/first/grad", "m/first/grad", "m/last/grad"]
    (found,) = found_in(combined(names, "m/first/grad", suffix=suffix))
    assert found.bytes == 4 * (8 + 4 + 2)
    parts = [(part.op_name, part.bytes, part.kind) for part in found.parts()]
    assert parts == [
        ("m/first/grad", 4 * (8 + 4), "all-reduce"),
        ("m/last/grad", 4 * 2, "all-reduce"),
    ]


def test_a_part_without_a_name_has_that_of_its_operand_or_none():
    (found,) = found_in(combined(["m/first/grad", "", ""], "m/first/grad"))
    parts = [(part.op_name, part.bytes) for part in found.parts()]
    assert parts == [("m/first/grad", 32), ("", 16), ("m/last/neg", 8)]


def test_one_origin_is_one_part():
    (found,) = found_in(combined(["m/a"] * 3, "m/a"))
    assert found.parts() == [found]
    (found,) = found_in(scattering("%s.0, %s.1"))
    assert found.parts() == [found]


def test_a_ragged_exchange_counts_with_its_buffer():
    text = """HloModule m

ENTRY %main (x: f32[16,128], o: f32[64,128], i: s32[4]) -> f32[64,128] {
  %x = f32[16,128]{1,0} parameter(0)
  %o = f32[64,128]{1,0} parameter(1)
  %i = s32[4]{0} parameter(2)
  ROOT %r = f32[64,128]{1,0} ragged-all-to-all(%x, %o, %i, %i, %i, %i), channel_id=1, replica_groups={{0,1,2,3}}
}
"""  # noqa: E501
    [exchange] = collectives.collectives(text)
    assert (exchange.kind, exchange.bytes) == ("ragged-all-to-all", 4 * 64 * 128)
    assert exchange.groups.tolist() == [[0, 1, 2, 3]]
