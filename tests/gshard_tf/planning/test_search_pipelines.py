"""`find_layout` for models of microbatches: stages, bubbles, and what is refused."""

import importlib.util

import keras
import pytest
import tensorflow as tf
from installed_versions import KERAS
from made_up_plans import LENGTH, model_of, search, topology

import gshard_tf
from gshard_tf.planning.roofline import Interconnect
from gshard_tf.planning.search import find_layout
from gshard_tf.planning.search.candidates import Candidate
from gshard_tf.planning.search.costs import costs_of
from gshard_tf.planning.search.survey import Survey
from gshard_tf.sharding.mesh import create_mesh
from keras_layers import EncoderBlock
from keras_layers.stacked import Stacked

M, H, N, UNITS, K = 64, 258, 3, 4, 8  # neither heads nor widths divide by 4


def stack(microbatches=K, units=UNITS, **arguments):
    def make(repetition):
        name = f"block_{repetition + 1}"
        block = EncoderBlock(N, 16, H, dropout=0.0, name=name, **arguments)
        block.build((None, None, M))
        return [block]

    return Stacked(make, units, True, microbatches, name="stack")


def survey_of(layer, rows=32):
    x = tf.TensorSpec([rows, LENGTH, M], tf.float32)
    return Survey(lambda: model_of(layer, M), (x, x), "train")


@pytest.fixture(scope="module")
def survey():
    return survey_of(stack)


def costs(survey, mesh, rules):
    hardware = topology()
    axes = create_mesh(tuple(mesh.items()), "TPU")
    links = Interconnect(hardware.in_order_of(axes), hardware.chip)
    return costs_of(survey, Candidate(mesh, rules), axes, links)


def test_stages_win_where_nothing_else_fits(monkeypatch, survey):
    """All cores may share the batch, which is faster and takes four times as much."""
    monkeypatch.setattr(find_layout, "Survey", lambda *_: survey)

    def figures(mesh, rules):
        stages = mesh.get("stage", 1)
        bubble = (stages - 1) / (K + stages - 1)
        return 1e8 / stages, 1.0 / (1 - bubble)

    options = {"figures": figures, "max_plans": 100}
    found, asked = search(monkeypatch, stack, M, 32, **options)
    assert "stage" not in found.best.layout.mesh
    both = {"stage": "stage", "batch": "data"}
    assert ({"stage": 2, "data": 2}, both, None, None) in asked
    # Keys and values of a length are gathered, without a manual region.
    assert any(set(mesh) == {"stage", "seq"} for mesh, *_ in asked)
    found, _ = search(monkeypatch, stack, M, 32, memory_limit=3e7, **options)
    assert found.best.layout == Candidate({"stage": 4}, {"stage": "stage"})
    assert '"stage": "stage",' in found.python()


def test_what_does_not_divide_is_not_proposed(survey):
    for mesh, rules, expected in (
        ({"stage": 4}, {"stage": "stage"}, None),
        ({"stage": 8}, {"stage": "stage"}, "stage does not divide (4 over 8)"),
        ({"data": 4}, {"batch": "data"}, None),
        # Four rows of each of 8 microbatches.
        ({"data": 8}, {"batch": "data"}, "batch does not divide (4 over 8)"),
    ):
        assert survey.obstacle(Candidate(mesh, rules)) == expected


def test_a_stack_without_microbatches_has_no_stages():
    assert "stage" not in survey_of(lambda: stack(None)).used


def test_dropless_experts_are_an_error_before_any_plan():
    options = {"num_experts": 4, "moe_options": {"dispatcher": "dropless"}}
    # An older Keras says that the model cannot be built, and why.
    error = ValueError if KERAS >= (3, 15) else RuntimeError
    with pytest.raises(error, match="A manual region .* is none"):
        survey_of(lambda: stack(units=1, **options))


def test_manual_regions_of_attention_are_not_proposed():
    survey = survey_of(lambda: stack(context_parallel="ring"))
    split = {"stage": "stage", "length": "seq"}
    assert "A manual region" in survey.obstacle(
        Candidate({"stage": 2, "seq": 2}, split)
    )
    assert survey.obstacle(Candidate({"stage": 4}, {"stage": "stage"})) is None


def test_costs_of_stages_are_those_of_the_schedule(survey):
    one = costs(survey, {"data": 1}, {"batch": "data"})
    found = costs(survey, {"stage": 4}, {"stage": "stage"})
    ticks = K + 4 - 1
    # All products are of the stack: bubbles compute, too.
    expected = one.products / 4 * ticks / K
    assert found.predicted_products == pytest.approx(expected)
    assert found.products == pytest.approx(expected)
    assert found.split == pytest.approx(4 * K / ticks)
    assert found.links == 0.0
    # A microbatch in each tick; the sum of all over the lines of a square of chips.
    tokens, speed = 4 * 32 * LENGTH * M, topology().chip.link_bandwidth
    shifts = 2 * ticks * tokens / K / speed
    sums = 2 * (2 * tokens) * 3 / 4 / (2 * speed)
    assert found.predicted_links == pytest.approx(shifts + sums)
    # Half of the layers, of half of each microbatch.
    rules = {"stage": "stage", "batch": "data"}
    halves = costs(survey, {"stage": 2, "data": 2}, rules)
    expected = one.products / 4 * (K + 1) / K
    assert halves.predicted_products == pytest.approx(expected)
    assert halves.state_bytes == pytest.approx(2 * found.state_bytes, rel=0.01)


@pytest.mark.slow  # compiles two steps for a TPU
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra aot"
)
@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ({"stage": 4}, {"stage": "stage"}),
        ({"stage": 2, "data": 2}, {"stage": "stage", "batch": "data"}),
    ],
)
def test_costs_of_stages_are_those_of_compiled_programs(mesh, rules):
    def layers():
        # Without a layer before it the gradient of the stack's inputs is not needed.
        return keras.Sequential([keras.layers.Dense(M), stack()])

    def build():
        return model_of(layers, M)

    x = tf.TensorSpec([32, LENGTH, M], tf.float32)
    predicted = costs(survey_of(layers), mesh, rules)
    rules = gshard_tf.AxisRules(rules)
    plan = gshard_tf.plan(build, "v5e:2x2", mesh, rules, (x, x), cache=False)
    assert predicted.predicted_products == pytest.approx(plan.time.compute, rel=0.03)
    assert predicted.predicted_links == pytest.approx(plan.time.interconnect, rel=0.05)
    assert predicted.state_bytes == pytest.approx(
        plan.state_bytes(per_core=True), rel=0.02
    )
