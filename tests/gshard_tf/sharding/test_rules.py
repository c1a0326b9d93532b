import json

import keras
import pytest

import gshard_tf

LINE = gshard_tf.create_mesh({"expert": 8})
GRID = gshard_tf.create_mesh({"data": 4, "model": 2})


def specs(rules, axes, mesh=GRID):
    return list(rules.layout(axes, mesh).spec)


def test_layout_by_names():
    rules = gshard_tf.AxisRules({"batch": "data", "mlp": "model", "embed": None})
    assert specs(rules, ("batch", None, "mlp")) == ["data", None, "model"]
    assert specs(rules, ("embed", "anything")) == [None, None]
    assert specs(rules, ()) == []


def test_default_is_the_papers_layout():
    line = gshard_tf.AxisRules.default(LINE)
    # One tensor's tokens and another's experts are over the same axis...
    for axes in (("batch", "length"), ("group", None), ("expert", "embed")):
        assert specs(line, axes, LINE) == ["expert", None]
    # ... and the widths are whole, without a second axis to split them over.
    assert specs(line, ("embed", "mlp"), LINE) == [None, None]
    grid = gshard_tf.AxisRules.default(GRID)
    assert specs(grid, ("expert", "embed", "mlp")) == ["data", None, "model"]
    assert specs(grid, ("vocab", "embed")) == ["model", None]
    assert specs(grid, ("embed", "heads", "kv")) == [None, "model", None]
    # A third axis splits nothing by itself.
    cube = gshard_tf.create_mesh({"data": 2, "model": 2, "length": 2})
    cubic = gshard_tf.AxisRules.default(cube)
    assert specs(cubic, ("batch", "length", "mlp"), cube) == ["data", None, "model"]


def test_refuses_one_mesh_axis_for_two_dimensions():
    rules = gshard_tf.AxisRules.default(LINE)
    with pytest.raises(
        ValueError,
        match=r"two dimensions of the thing over the mesh axis 'expert': 'group' and "
        r"'expert'.*Received: axes=\('group', 'expert'\)",
    ):
        rules.layout(("group", "expert"), LINE, "the thing")
    with pytest.raises(ValueError, match="two dimensions"):
        rules.layout(("expert", "expert"), LINE)


def test_several_axes_for_one_dimension():
    rules = gshard_tf.AxisRules(
        {"batch": ("data", "model"), "mlp": ["model", "data"], "embed": ("data",)}
    )
    assert specs(rules, ("batch", None)) == ["data+model", None]
    assert specs(rules, ("mlp", "other")) == ["model+data", None]
    assert specs(rules, ("embed",)) == ["data"]
    # The name of the joined axis says the same.
    again = gshard_tf.AxisRules({"batch": "data+model"})
    assert again.rules == {"batch": rules.rules["batch"]}
    with pytest.raises(ValueError, match=r"over the mesh axis 'data': 'batch' and 'em"):
        rules.layout(("batch", "embed"), GRID)


def test_refuses_a_name_in_place_of_batch_axes():
    with pytest.raises(ValueError, match="`batch_axes` must have"):
        gshard_tf.AxisRules({}, batch_axes="batch")


@pytest.mark.parametrize("axes", [("data", "data"), "data+data", "data+", 1])
def test_refuses_an_axis_twice_and_no_axis(axes):
    with pytest.raises(ValueError, match="each once"):
        gshard_tf.AxisRules({"batch": axes})
    with pytest.raises(ValueError, match=r"`fsdp` must be the name.*each once"):
        gshard_tf.AxisRules({}, fsdp=axes)


def test_check_refuses_an_axis_that_the_mesh_lacks():
    rules = gshard_tf.AxisRules({"batch": "data", "mlp": "modle"})
    with pytest.raises(
        ValueError, match=r"'mlp': 'modle' must name an axis.*\['data', 'model'\]"
    ):
        rules.check(GRID)
    with pytest.raises(ValueError, match=r"'mlp': 'data\+modle' must name an axis"):
        gshard_tf.AxisRules({"mlp": ("data", "modle")}).check(GRID)
    with pytest.raises(ValueError, match=r"`zero` must be an axis.*zero='data\+modle'"):
        gshard_tf.AxisRules({}, zero=("data", "modle")).check(GRID)


@pytest.mark.parametrize(
    "rules",
    [{"batch": 0}, {0: "data"}, {"batch": ("data", 1)}, {"batch": ()}, {"batch": ""}],
)
def test_refuses_rules_of_other_types(rules):
    with pytest.raises(ValueError, match="A rule must be a logical axis name"):
        gshard_tf.AxisRules(rules)


def test_paths():
    rules = gshard_tf.AxisRules(
        {}, paths=[(r".*/kernel", ("embed", "mlp")), (r"out/bias", ["vocab"])]
    )
    assert rules.path_axes("model/dense/kernel") == (".*/kernel", ("embed", "mlp"))
    assert rules.path_axes("out/bias") == ("out/bias", ("vocab",))
    # The whole of the path, not a part of it.
    assert rules.path_axes("model/out/bias") is None
    assert rules.path_axes("model/dense/kernel_momentum") is None


def test_refuses_two_patterns_for_one_weight():
    rules = gshard_tf.AxisRules({}, paths=[("a/.*", (None,)), (".*/b", (None,))])
    assert rules.path_axes("a/c") == ("a/.*", (None,))
    with pytest.raises(ValueError, match=r"'a/b', 'a/\.\*' and '\.\*/b'"):
        rules.path_axes("a/b")


def test_refuses_what_is_no_regular_expression():
    with pytest.raises(
        ValueError, match=r"must be a regular expression. Received: '\*\.kernel'"
    ):
        gshard_tf.AxisRules({}, paths=[("*.kernel", (None,))])


def test_unused_counts_only_what_a_person_wrote():
    rules = gshard_tf.AxisRules({"batch": "data", "mlp": "model", "embed": None})
    assert rules.unused() == [("batch", "data"), ("mlp", "model")]
    rules.layout(("batch", None), GRID)
    assert rules.unused() == [("mlp", "model")]
    assert gshard_tf.AxisRules.default(GRID).unused() == []


def test_a_keras_config_and_back():
    rules = gshard_tf.AxisRules(
        {"batch": ("data", "model"), "mlp": None},
        paths=[(".*/k", ("batch", None))],
        zero=("model", "data"),
        batch_axes=("batch", None, "length"),
    )
    text = json.dumps(keras.saving.serialize_keras_object(rules))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is gshard_tf.AxisRules
    assert repr(again) == repr(rules) and again.get_config() == rules.get_config()
    assert again.path_axes("a/k") == rules.path_axes("a/k")
    assert "zero='model+data'" in repr(rules)


def test_prints_itself():
    rules = gshard_tf.AxisRules({"batch": "data"}, paths=[(".*/k", ("batch",))])
    assert repr(rules) == "AxisRules({'batch': 'data'}, paths=[('.*/k', ('batch',))])"
