"""`find_layout`: what is planned, what is not and why, and the best of it."""

import importlib.util
import json

import keras
import pytest
import tensorflow as tf
from made_up_plans import search
from processes import run_python

import gshard_tf
from gshard_tf.planning.search import find_layout as module
from keras_layers import FeedForward, MoELayer


@pytest.mark.parametrize(
    ("layer", "width", "rows", "layout"),
    [
        # Many examples of few weights.
        (lambda: FeedForward(256), 128, 4096, ({"data": 4}, {"batch": "data"})),
        # Few examples of more weights than a core holds.
        (lambda: FeedForward(65536), 8192, 16, ({"model": 4}, {"mlp": "model"})),
        # Many experts.
        (
            lambda: MoELayer(64, 1024, seed=0),
            1024,
            64,
            ({"data": 4}, dict.fromkeys(("batch", "group", "expert"), "data")),
        ),
    ],
    ids=["batch", "width", "experts"],
)
def test_the_obvious_layout_is_planned_soon(monkeypatch, layer, width, rows, layout):
    _, asked = search(monkeypatch, layer, width, rows, max_plans=2)
    assert asked[0][0] == {"data": 4}  # the paper's layout, to be no worse
    first = 0 if layout[0] == {"data": 4} else 1
    assert asked[first] == (*layout, None, None)


_SURVEY = []


def small(monkeypatch, figures, **options):
    """A search for one model, which is surveyed once for all tests."""
    survey = module.Survey

    def once(*arguments):
        if not _SURVEY:
            _SURVEY.append(survey(*arguments))
        return _SURVEY[0]

    monkeypatch.setattr(module, "Survey", once)
    return search(monkeypatch, lambda: FeedForward(256), 128, 64, figures, **options)


def test_the_best_fits_and_is_the_fastest_of_those(monkeypatch):
    def figures(mesh, rules):
        if rules.fsdp:
            return 40_000_000, 3e-3
        if mesh == {"data": 2, "model": 2}:
            return 60_000_000, 2e-3
        return 90_000_000, 1e-3

    found, asked = small(monkeypatch, figures, memory_limit=7e7, max_plans=100)
    assert found.best.layout.mesh == {"data": 2, "model": 2}
    assert found.best.bytes_needed == 60_000_000 and found.plan.key
    assert found.plan.time.roofline == found.best.seconds == 2e-3
    assert [t.fits for t in found.planned] == sorted(
        (t.fits for t in found.planned), reverse=True
    )
    assert found.smallest.bytes_needed == 40_000_000
    assert len(asked) == len(found.planned) > 3
    assert len({str(layout) for layout in asked}) == len(asked)  # none twice
    # Every candidate is accounted for.
    reasons = sum(found.reasons.values())
    assert len(found.trials) == len(found.planned) + reasons
    assert all(t.reason and t.detail for t in found.trials if t.outcome == "skipped")
    text = str(found)
    assert f"{len(found.trials)} layouts: {len(asked)} planned" in text
    assert found.python() in text
    read = json.loads(found.to_json())
    assert read["best"]["layout"]["mesh"] == {"data": 2, "model": 2}
    assert read["python"] == found.python() and len(read["trials"]) == len(found.trials)


def test_what_cannot_be_faster_is_not_planned(monkeypatch):
    # A step of 1 ns: even what variables alone take in memory traffic is more.
    found, asked = small(monkeypatch, lambda mesh, rules: (1_000, 1e-9))
    assert len(asked) == 1
    [reason] = [r for r in found.reasons if r.startswith("slower")]
    assert found.reasons[reason] == len(found.trials) - 1 - sum(
        n for r, n in found.reasons.items() if r != reason
    )


def test_nothing_fits(monkeypatch):
    def figures(mesh, rules):
        return (50_000_000 if rules.fsdp else 90_000_000), 1e-3

    found, _ = small(monkeypatch, figures, memory_limit=1e7, max_plans=4)
    assert found.best is found.plan is None
    assert "NOTHING FITS into 10.0 MB a core; the smallest found needs" in str(found)
    # After the first the search turns to what needs less.
    assert found.smallest.bytes_needed == 50_000_000
    with pytest.raises(ValueError, match="no rules to paste"):
        found.python()
    assert json.loads(found.to_json())["best"] is None
    # Variables alone are too much: nothing is compiled.
    found, asked = small(monkeypatch, figures, memory_limit=1e3)
    assert asked == [] and found.smallest is None
    assert set(found.reasons) == {"variables alone exceed the limit"}
    assert "the smallest state alone takes" in str(found)
    assert found.smallest_state > 1e3


def test_what_a_plan_refuses_is_told(monkeypatch):
    def figures(mesh, rules):
        if "model" in mesh:
            raise ValueError("The rules cannot be. Received: these")
        return 1_000, 1.0

    found, _ = small(monkeypatch, figures, max_plans=100)
    refused = [t for t in found.trials if t.outcome == "failed"]
    assert refused and all("model" in t.layout.mesh for t in refused)
    assert {t.detail for t in refused} == {"The rules cannot be. Received: these"}

    def always(mesh, rules):
        raise ValueError("The batch is no batch. Received: it")

    # What no layout would change is an error of the whole.
    with pytest.raises(ValueError, match="no batch"):
        small(monkeypatch, always)


def test_what_does_not_divide_or_meets_itself_is_not_planned(monkeypatch):
    found, _ = search(monkeypatch, lambda: FeedForward(6), 128, 6)
    details = {t.detail for t in found.trials if t.reason == "cannot be split so"}
    assert {
        "batch does not divide (6 over 4)",
        "mlp does not divide (6 over 4)",
    } <= details
    found, _ = search(monkeypatch, lambda: MoELayer(8, 32, seed=0), 16, 8)
    details = {t.detail for t in found.trials}
    assert any("mlp of one tensor" in detail for detail in details)


def test_layouts_that_are_the_same_are_planned_once(monkeypatch):
    # Too small for `fsdp` and `zero`, which then change nothing.
    found, _ = search(monkeypatch, lambda: FeedForward(64), 64, 64, max_plans=100)
    same = [t for t in found.trials if t.reason == "the same as another"]
    assert {(t.layout.fsdp, t.layout.zero) for t in same} >= {
        ("data", None),
        (None, "data"),
    }
    assert not any(t.layout.fsdp or t.layout.zero for t in found.planned)


def test_path_patterns_name_the_weights_of_other_layers(monkeypatch):
    def layer():
        return keras.Sequential(
            [keras.layers.Dense(65536, name="a"), keras.layers.Dense(8192, name="b")]
        )

    paths = [(".*/a/kernel", ("embed", "mlp")), (".*/b/kernel", ("mlp", "embed"))]
    found, asked = search(monkeypatch, layer, 8192, 16, paths=paths, max_plans=2)
    assert asked[1][:2] == ({"model": 4}, {"mlp": "model"})
    assert "('.*/a/kernel', ('embed', 'mlp'))," in found.python()


def test_bad_arguments(monkeypatch):
    for name, value in (("memory_limit", 0), ("max_plans", 0), ("max_plans", 2.5)):
        with pytest.raises(ValueError, match=f"`{name}` must"):
            small(monkeypatch, None, **{name: value})
    monkeypatch.undo()
    x = tf.TensorSpec([8, 4], tf.float32)
    with pytest.raises(ValueError, match="a slice of TPUs.*topology='cpu:1'"):
        gshard_tf.find_layout(lambda: None, "cpu:1", (x, x))


REAL = """
    import json
    import keras, tensorflow as tf
    import gshard_tf
    from keras_layers import FeedForward, MoELayer

    def search(layer, width, rows, **options):
        def build():
            inputs = keras.Input((16, width))
            model = keras.Model(inputs, layer()(inputs), name="small")
            model.compile("adam", "mse")
            return model

        x = tf.TensorSpec([rows, 16, width], tf.float32)
        found = gshard_tf.find_layout(
            build, "v5e:2x2", (x, x), cache=FOLDER, **options
        )
        return found, lambda mesh, rules: gshard_tf.plan(
            build, "v5e:2x2", mesh, rules, (x, x), cache=FOLDER
        )
"""
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra aot"
)


def real(tmp_path, code):
    folder = f"FOLDER = {str(tmp_path)!r}\n"
    lines = (line[4:] for line in REAL.splitlines())
    return json.loads(run_python(folder + "\n".join(lines) + "\n" + code, timeout=1200))


@needs_libtpu
def test_compiled_programs_respect_the_limit(tmp_path):
    found = real(
        tmp_path,
        """
layer = lambda: FeedForward(256)
free, _ = search(layer, 128, 64, max_plans=3)
needed = [trial.bytes_needed for trial in free.planned]
limit = (min(needed) + max(needed)) / 2
found, plan = search(layer, 128, 64, max_plans=3, memory_limit=limit)
scope = {}
exec(found.python().replace("strategy =", "# strategy ="), scope)
again = plan(scope["mesh"], scope["rules"])
print(json.dumps({
    "limit": limit,
    "best": found.best.bytes_needed,
    "seconds": found.best.seconds,
    "memory": again.memory.total,
    "again_seconds": again.time.without_overlap,
    "same_program": again.key == found.best.plan_key == found.plan.key,
    "fits": [[t.fits, t.bytes_needed] for t in found.planned],
}))
""",
    )
    assert found["best"] == found["memory"] <= found["limit"]
    assert found["again_seconds"] == found["seconds"]
    assert found["same_program"]  # what is pasted makes it
    assert all(fits == (needed <= found["limit"]) for fits, needed in found["fits"])
    assert {fits for fits, _ in found["fits"]} == {True, False}


@needs_libtpu
@pytest.mark.slow
def test_the_obvious_layout_is_found_by_compiled_programs(tmp_path):
    found = real(
        tmp_path,
        """
layouts = []
for layer, width, rows in (
    (lambda: FeedForward(256), 128, 4096),
    (lambda: FeedForward(65536), 8192, 16),
    (lambda: MoELayer(64, 1024, seed=0), 1024, 64),
):
    best = search(layer, width, rows, max_plans=4)[0].best.layout
    layouts.append([best.mesh, best.rules])
print(json.dumps(layouts))
""",
    )
    assert found == [
        [{"data": 4}, {"batch": "data"}],
        [{"model": 4}, {"mlp": "model"}],
        [{"data": 4}, dict.fromkeys(("batch", "group", "expert"), "data")],
    ]
