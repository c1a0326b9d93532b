"""The table of a plan: what it says, and that it stays on two screens."""

import dataclasses

import plan_samples
import pytest

from gshard_tf.planning import summaries, units
from gshard_tf.planning.html.page import page
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.text import table


@pytest.mark.parametrize("name", plan_samples.ALL)
def test_two_screens(name):
    lines = str(plan_samples.ALL[name]()).splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 92
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("name", plan_samples.ALL)
def test_a_plan_read_back_prints_the_same(name):
    plan = plan_samples.ALL[name]()
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert table(again) == table(plan)


def line_with(text, *words):
    found = [line for line in text.splitlines() if all(w in line for w in words)]
    assert len(found) == 1, (words, found)
    return found[0]


@pytest.mark.parametrize("kind", ["fsdp", "zero"])
def test_weights_stored_in_parts_are_told_with_the_rules(kind):
    plan = plan_samples.two_axes()
    rule = f"{kind} over 'data'; axes (embed, mlp)"
    weights = [dataclasses.replace(w, rule=rule) for w in plan.weights]
    text = table(dataclasses.replace(plan, weights=weights))
    assert f"batch, group, expert, {kind} -> data" in line_with(text, "rules ")
    assert kind not in table(plan)
    shown = page([dataclasses.replace(plan, weights=weights)])
    assert f"batch, group, expert, {kind}</td>" in shown


def test_what_it_says():
    plan = plan_samples.moe()
    text = table(plan)
    assert text.splitlines()[0] == (
        "lm, train, on v3:8x8: fits: 50.6 % of a core's 17.2 GB"
    )
    line_with(text, "expert=128: 128 cores on 64 chips v3 (8x8)")
    line_with(text, "batch, group, expert -> expert; mlp -> (whole)")
    # 6 layers of 128 experts: 128 * 1024 * 8192 * 4 bytes * 6, a 128th of that a core.
    line_with(text, "moe/wi ", "6", "25.8 GB", "201 MB", "128x1024x8192", "expert,-,-")
    line_with(text, "temporaries", "4.90 GB")
    line_with(text, "all-to-all  ", "24", "805 MB", "5.40 ms", "expert")
    line_with(text, "all-gather  ", "NOT asked for")
    line_with(
        text, "encoder_*/moe (6 layers)", "42", "808 MB", "all-reduce, all-to-all"
    )
    line_with(text, "2 all-gather of f32[8,1024,32000]", "not asked for:")
    line_with(text, "gshard_tf.annotate(x, ('batch', None, None))")
    line_with(text, "step time (an estimate, not a measurement): 1.36 s to 1.37 s")
    for assumption in plan.time.assumptions:
        assert assumption in " ".join(text.split())
    line_with(text, "! The rule 'heads'")
    line_with(text, "1.043 of those written")


def test_out_of_memory():
    text = table(plan_samples.out_of_memory())
    assert text.splitlines()[0].endswith("OUT OF MEMORY by 30.2 GB a core")
    line_with(text, "OUT OF MEMORY: needs 47.1 GB of 16.9 GB a core, 30.2 GB too much")
    line_with(text, "8.39 GB", "f32[8,1024,256000]", "einsum", "lm/logits")
    line_with(text, "> The state alone")
    line_with(text, "all else the step needs", "21.7 GB")
    assert "collectives" not in text
    assert "step time" not in text
    no_buffers = plan_samples.out_of_memory()
    oom = dataclasses.replace(no_buffers.out_of_memory, buffers=[])
    no_buffers = dataclasses.replace(no_buffers, out_of_memory=oom)
    assert "named no buffers" in table(no_buffers)
    oom = dataclasses.replace(
        plan_samples.out_of_memory().out_of_memory, as_written=True
    )
    assert "whole, as written" in table(
        dataclasses.replace(no_buffers, out_of_memory=oom)
    )


def test_cpu():
    text = table(plan_samples.cpu())
    assert text.splitlines()[0].endswith("compiles; memory is the host's")
    line_with(text, "4 virtual CPU devices")
    line_with(text, "step time: none for a CPU")
    assert "estimate" not in text


def test_what_is_left_out_is_counted():
    plan = dataclasses.replace(
        plan_samples.cpu(), complaints=[f"no {i}" for i in range(9)]
    )
    text = table(plan)
    line_with(text, "! no 3")
    assert "no 4" not in text
    line_with(text, "! and 5 more complaints")


def test_nothing_to_tell():
    plan = dataclasses.replace(
        plan_samples.cpu(), weights=[], communication=[], reshards=[], rules={},
        complaints=[], inputs=[],
    )  # fmt: skip
    line_with(table(plan), "communication: none")


@pytest.mark.parametrize("name", plan_samples.ALL)
def test_the_parts_of_memory_are_all_of_it(name):
    plan = plan_samples.ALL[name]()
    total = sum(segment.bytes for segment in summaries.memory_segments(plan))
    whole = plan.memory.total if plan.fits else plan.out_of_memory.needed
    assert total == pytest.approx(whole, abs=1)


def test_variables_that_a_step_does_not_take_are_not_told_apart():
    plan = plan_samples.moe()
    memory = dataclasses.replace(plan.memory, arguments=1000)
    segments = summaries.memory_segments(dataclasses.replace(plan, memory=memory))
    assert segments[0].label == "variables and batch"
    assert sum(s.bytes for s in segments) == memory.total


def test_alike():
    names = ["a/moe/wi", "a/moe_1/wi", "a/moe_12/wi", "a/dense/wi", "b3_kernel"]
    found = {g.name: g.items for g in summaries.group_similar(names, lambda n: n)}
    assert found == {
        "a/moe*/wi": names[:3],
        "a/dense/wi": ["a/dense/wi"],
        "b3_kernel": ["b3_kernel"],
    }
    for several, pattern in (
        (["top_2_router", "top_2_router_1"], "top_2_router*"),
        (["encoder_1/wi", "encoder_10/wi", "encoder_11/wi"], "encoder_*/wi"),
        (["adam/e_1_wi_m", "adam/e_12_wi_m"], "adam/e_*_wi_m"),
        (["a_1", "a_1_1"], "a_*"),
    ):
        [group] = summaries.group_similar(several, lambda n: n)
        assert (group.name, group.items) == (pattern, several)
    by_size = summaries.group_similar(names[:2], lambda n: n, len)
    assert [g.name for g in by_size] == names[:2]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (12, "12 B"), (999, "999 B"), (999.7, "1.00 kB"), (1000, "1.00 kB"),
     (61e6, "61.0 MB"), (17179869184, "17.2 GB"), (157e9, "157 GB"),
     (2.5e18, "2,500 PB"), (-3e9, "-3.00 GB")],
)  # fmt: skip
def test_sizes(value, text):
    assert units.size(value) == text


def test_other_units():
    assert units.seconds(0) == "0 s"
    assert units.seconds(1e-6) == "1.00 us"
    assert units.seconds(0.758) == "758 ms"
    assert units.seconds(0.99999) == "1.00 s"
    assert units.seconds(90) == "90 s"
    assert units.number(2048) == "2,048"
    assert units.number(619e9) == "619 G"
    assert units.flops(46.6e12) == "46.6 TFLOP"
    assert units.ratio(3, 2) == "1.50x"
    assert units.ratio(2, 2) == "same"
    assert units.ratio(2, 0) == units.ratio(None, 2) == "-"
