"""Where weights and slots are stored, and that the compiled program agrees."""

import warnings
from xml.etree import ElementTree

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf

SPLIT = ("expert", None, None)
WHOLE = (None, None)


def optimized(optimizer, mesh=8, rules=None, dense=None):
    """A strategy, and a compiled and built model; makes the optimizer and the layer."""
    strategy = parity.strategy_of(mesh, rules=rules)
    keras.backend.clear_session(free_memory=False)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.layers.Input([8, 4]),
                parity.Experts(),
                keras.layers.Flatten(),
                dense() if dense else keras.layers.Dense(3),
            ]
        )
        model.compile(optimizer() if callable(optimizer) else optimizer, "mse")
        model.optimizer.build(model.trainable_variables)
    return strategy, model


def rows(strategy, model):
    return {row.path: row for row in strategy.describe(model).rows}


def test_batches_are_split_by_examples():
    layouts = parity.strategy_of({"expert": 4}).extended.layouts
    for shape, specs in [
        ([8, 4], ("expert", None)),
        ([6, 4], (None, None)),  # 6 examples do not divide
        ([12], ("expert",)),
        ([], ()),
    ]:
        assert layouts.batch_layout(tf.TensorShape(shape)).spec == specs


def test_batches_are_split_by_more_than_examples():
    rules = gshard_tf.AxisRules(
        {"batch": ("data", "model"), "length": "seq"}, batch_axes=("batch", "length")
    )
    mesh = {"data": 2, "model": 2, "seq": 2}
    layouts = parity.strategy_of(mesh, rules=rules).extended.layouts
    for shape, specs in [
        ([8, 4, 6], ("data+model", "seq", None)),
        ([8, 5], ("data+model", None)),
        ([6, 4], (None, "seq")),  # 6 examples do not divide by 4 devices
        ([8], ("data+model",)),
        ([], ()),
    ]:
        assert layouts.batch_layout(tf.TensorShape(shape)).spec == specs
    layouts.note_batch([tf.TensorShape([6, 4])])
    assert any("6 over the 4 devices of 'data+model'" in w for w in layouts.warnings())


def test_weights_and_slots_over_joined_axes():
    rules = gshard_tf.AxisRules(
        {"mlp": ("model", "seq"), "embed": "seq"},
        paths=[
            ("even", (None, "mlp")),
            ("uneven", (None, "mlp")),
            ("one", ("embed", None)),
        ],
        fsdp=("data", "seq"),
        fsdp_min_bytes=1,
    )
    mesh = {"data": 2, "model": 2, "seq": 2}
    strategy = parity.strategy_of(mesh, rules=rules)
    with strategy.scope():
        even, uneven, one, free = (
            tf.Variable(tf.zeros(shape), name=name)
            for name, shape in {
                "even": [4, 8],
                "uneven": [4, 6],
                "one": [4, 6],
                "free": [8, 12],
            }.items()
        )
    layouts = strategy.extended.layouts
    found = {v.path: layouts.layout_for(v) for v in (even, uneven, one, free)}
    assert {path: d.storage.spec for path, d in found.items()} == {
        # fsdp takes what a rule has left of its axes ...
        "even": ("data", "model+seq"),
        "uneven": ("data+seq", None),
        "one": ("seq", "data"),
        # ... and all of them where no rule splits, by the largest that divides.
        "free": (None, "data+seq"),
    }
    assert found["even"].compute.spec == (None, "model+seq")
    assert any("6 over the 4 devices of 'model+seq'" in w for w in layouts.warnings())
    with pytest.raises(ValueError, match="over one mesh axis"):
        strategy.layout(even)
    assert strategy.layout(one).sharding_specs == ["seq", "data"]


# -- slots ---------------------------------------------------------------------------

ELEMENTWISE = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(amsgrad=True),
    "AdamW": lambda: keras.optimizers.AdamW(),
    "Lion": lambda: keras.optimizers.Lion(),
    "RMSprop": lambda: keras.optimizers.RMSprop(momentum=0.9, centered=True),
    "Nadam": lambda: keras.optimizers.Nadam(),
    "EMA": lambda: keras.optimizers.SGD(0.1, use_ema=True),
    "accumulation": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_slots_are_split_as_their_weights(name):
    strategy, model = optimized(ELEMENTWISE[name])
    found = rows(strategy, model)
    slots = [path for path in found if "experts_w" in path]
    assert slots, list(found)
    for path in slots:
        assert found[path].shape in ((8, 4, 6), (8, 6, 4))
        assert found[path].layout == SPLIT
        assert found[path].bytes_per_device * 8 == found[path].bytes
        assert found[path].rule == "slot of its weight"
    for path in found:
        if "dense_kernel" in path:
            assert found[path].rule == "replicated, as its weight"
            assert found[path].layout == WHOLE


def test_adafactors_rows_and_columns_are_split_as_their_weights():
    rules = gshard_tf.AxisRules({"expert": "data", "mlp": "model"})
    strategy, model = optimized(
        keras.optimizers.Adafactor, {"data": 4, "model": 2}, rules
    )
    by_name = [
        (variable.name, tuple(variable.shape), strategy.layout(variable).sharding_specs)
        for variable in model.optimizer.variables
    ]
    # wi is [E, M, H] over ("data", whole, "model"): rows [E, M], columns [E, H].
    assert ("wi", (8, 4), ["data", "unsharded"]) in by_name
    assert ("wi", (8, 6), ["data", "model"]) in by_name
    # wo is [E, H, M]: the other way round.
    assert ("wo", (8, 6), ["data", "model"]) in by_name
    assert ("wo", (8, 4), ["data", "unsharded"]) in by_name
    assert ("kernel", (32,), ["unsharded"]) in by_name


def test_a_weight_is_not_taken_for_anothers_factor():
    # An optimizer that is made first, and a bias of the shape of a weight's rows.
    class Layer(keras.layers.Layer):
        def build(self, shape):
            self.w = gshard_tf.name_axes(
                self.add_weight(shape=(8, 4), name="w"), ("expert", None)
            )
            self.b = self.add_weight(shape=(8,), name="b")

        def call(self, x):
            return x @ self.w.value[:4] + self.b.value[:4]

    strategy = parity.strategy_of(8)
    with strategy.scope():
        optimizer = keras.optimizers.Adam()
        model = keras.Sequential([keras.layers.Input([4]), Layer()])
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
    found = rows(strategy, model)
    [b] = [row for path, row in found.items() if path.endswith("/b")]
    assert b.rule == "no rule: replicated" and b.layout == (None,)


# -- path patterns -------------------------------------------------------------------


def test_path_patterns_reach_layers_that_know_nothing_of_us():
    rules = gshard_tf.AxisRules(
        {"expert": "expert", "vocab": "expert"},
        paths=[(r".*/dense/kernel", ("vocab", None))],
    )
    strategy, model = optimized("adam", rules=rules)
    found = rows(strategy, model)
    kernel = found["sequential/dense/kernel"]
    assert kernel.layout == ("expert", None)
    assert kernel.rule == "path '.*/dense/kernel'"
    slot = found["adam/sequential_dense_kernel_momentum"]
    assert slot.layout == ("expert", None) and slot.rule == "slot of its weight"
    assert found["sequential/dense/bias"].rule == "no rule: replicated"


def test_a_pattern_wins_over_the_names_of_the_layer():
    rules = gshard_tf.AxisRules(
        {"embed": "expert", "vocab": "expert"},
        paths=[(r".*/experts/wi", ("vocab", None, None))],
    )
    strategy, model = optimized("sgd", mesh=2, rules=rules)
    found = rows(strategy, model)
    assert found["sequential/experts/wi"].layout == ("expert", None, None)
    assert found["sequential/experts/wo"].layout == (None, None, "expert")


def test_two_patterns_for_one_weight_are_an_error():
    rules = gshard_tf.AxisRules(
        {"vocab": "expert"},
        paths=[(r".*/kernel", ("vocab", None)), (r".*dense.*", (None, None))],
    )
    strategy, model = optimized("sgd", rules=rules)
    with pytest.raises(
        ValueError, match="must exclude each other.*two that match.*dense/kernel"
    ):
        strategy.describe(model)


def test_a_pattern_of_another_rank_is_an_error():
    rules = gshard_tf.AxisRules({}, paths=[(r".*/dense/.*", (None, None))])
    strategy, model = optimized("sgd", rules=rules)
    with pytest.raises(
        ValueError, match=r"names 2 dimensions.*'sequential/dense/bias' of shape \(3,\)"
    ):
        strategy.describe(model)


def test_one_mesh_axis_for_two_dimensions_of_a_weight_names_the_weight():
    rules = gshard_tf.AxisRules({"expert": "expert", "mlp": "expert"})
    strategy, model = optimized("sgd", rules=rules)
    with pytest.raises(ValueError, match="two dimensions of the weight '.*experts/wi'"):
        strategy.describe(model)


def test_uneven_weights_are_stored_whole_and_said_to_be():
    rules = gshard_tf.AxisRules(
        {"expert": "data", "mlp": "model"},
        paths=[(r".*/dense/kernel", (None, "mlp"))],
    )
    strategy, model = optimized("adam", {"data": 2, "model": 4}, rules)
    found = rows(strategy, model)
    # 6 is no multiple of 4, 8 is one of 2: one dimension is split and one is whole.
    wi = found["sequential/experts/wi"]
    assert wi.layout == ("data", None, None)
    assert wi.rule == "axes (expert, embed, mlp); dimension [2] does not divide: whole"
    assert wi.bytes_per_device == wi.bytes // 2
    kernel = found["sequential/dense/kernel"]
    assert kernel.layout == (None, None) and kernel.bytes_per_device == kernel.bytes
    assert "dimension [1] does not divide: whole" in kernel.rule
    # One sentence for all of them, the small ones too.
    [complaint] = strategy.describe(model).warnings
    assert "6 over the 4 devices of 'model', where 4 or 8 would do" in complaint
    assert "3 over the 4 devices of 'model', where 4 would do" in complaint
    assert "('sequential/experts/wi' and 1 more)" in complaint


def test_complains_once_of_a_batch_that_does_not_divide():
    layouts = parity.strategy_of({"expert": 4}).extended.layouts

    def warned(*shapes):
        layouts.note_batch([tf.TensorShape(shape) for shape in shapes])
        return layouts.warnings()

    assert warned([], [1, 8]) == []  # one example, to predict
    expected = "all of it: 10 over the 4 devices of 'expert', where 8 or 12 would do."
    [complaint] = warned([10, 8], [10])
    assert complaint.endswith(expected)
    assert warned([8, 8], [8]) == [complaint]
    other = parity.strategy_of({"expert": 4}).extended.layouts
    for shape in ([12, 8], [10, 8]):  # the last of an epoch
        other.note_batch([tf.TensorShape(shape)])
    assert other.warnings() == []


# -- complaints ----------------------------------------------------------------------


def complaints(**kwargs):
    strategy, model = optimized("sgd", **kwargs)
    return strategy.describe(model).warnings


def test_complains_of_a_pattern_that_matches_nothing():
    rules = gshard_tf.AxisRules(
        {"expert": "expert"}, paths=[(".*/kernle", ("expert", None))]
    )
    assert complaints(rules=rules) == [
        "The path pattern '.*/kernle' matched no weight."
    ]


def test_complains_of_a_rule_that_nothing_uses():
    rules = gshard_tf.AxisRules({"expert": "expert", "experts": "expert"})
    [complaint] = complaints(rules=rules)
    assert "'experts' -> 'expert' matched no dimension" in complaint


def large():
    return keras.layers.Dense(10_000, use_bias=False)


def test_complains_of_a_large_weight_that_no_rule_mentions():
    [complaint] = complaints(dense=large)
    assert (
        "No rule mentions the weight 'sequential/dense/kernel' (1.2 MiB)" in complaint
    )


@pytest.mark.parametrize("axes", [(None, None), (None, "vocab")])
def test_does_not_complain_of_a_large_weight_that_is_mentioned(axes):
    rules = gshard_tf.AxisRules({"expert": "expert"}, paths=[(".*/dense/kernel", axes)])
    assert complaints(dense=large, rules=rules) == []


def test_does_not_complain_of_a_large_weight_on_one_device():
    assert complaints(dense=large, mesh=1) == []


def test_complains_once_of_weights_that_do_not_divide():
    rules = gshard_tf.AxisRules(
        {"expert": "expert", "vocab": "expert"},
        paths=[(".*/dense/kernel", (None, "vocab"))],
    )
    uneven = lambda: keras.layers.Dense(10_001, use_bias=False)  # noqa: E731
    [complaint] = complaints(dense=uneven, rules=rules)
    assert complaint.startswith("Dimensions of weights that do not divide")
    assert (
        "10001 over the 8 devices of 'expert', where 10000 or 10008 would" in complaint
    )


def test_the_first_step_warns_of_each_complaint_once():
    rules = gshard_tf.AxisRules(
        {"expert": "expert"}, paths=[(".*/kernle", ("expert", None))]
    )
    strategy, model = optimized("sgd", rules=rules)
    x = np.zeros([8, 8, 4], "float32")
    with pytest.warns(UserWarning, match="'.*/kernle' matched no weight"):
        model.predict(x, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.predict(x[:4], verbose=0)
    assert len(strategy.programs) == 2


# -- the table -----------------------------------------------------------------------


def test_describe_is_a_readable_table():
    rules = gshard_tf.AxisRules(
        {"expert": "expert", "mlp": None},
        paths=[(".*/kernle", ("expert", None))],
    )
    strategy, model = optimized(ELEMENTWISE["momentum"], rules=rules)
    # In an older Keras the name is "SGD".
    text = str(strategy.describe(model)).replace(f"{model.optimizer.name}/", "sgd/")
    assert text == (
        """\
weight                                shape   layout      bytes/device  decided by
-------------------------------------------------------------------------------------------------
sequential/experts/wi                 8x4x6   expert,-,-            96  axes (expert, embed, mlp)
sequential/experts/wo                 8x6x4   expert,-,-            96  axes (expert, mlp, embed)
seed_generator/seed_generator_state   2       -                     16  no rule: replicated
sequential/dense/kernel               32x3    -,-                  384  no rule: replicated
sequential/dense/bias                 3       -                     12  no rule: replicated
sgd/iteration                         scalar  -                      8  no rule: replicated
sgd/learning_rate                     scalar  -                      4  no rule: replicated
sgd/sequential_experts_wi_momentum    8x4x6   expert,-,-            96  slot of its weight
sgd/sequential_experts_wo_momentum    8x6x4   expert,-,-            96  slot of its weight
sgd/sequential_dense_kernel_momentum  32x3    -,-                  384  replicated, as its weight
sgd/sequential_dense_bias_momentum    3       -                     12  replicated, as its weight
11 variables on mesh {'expert': 8} of CPU devices: 3,892 bytes, 1,204 per device
! The path pattern '.*/kernle' matched no weight."""  # noqa: E501
    )


def test_describe_is_a_table_in_a_notebook():
    rules = gshard_tf.AxisRules(
        {"expert": "expert"}, paths=[("a<b>&", ("expert", None))]
    )
    strategy, model = optimized("sgd", rules=rules)
    page = strategy.describe(model)._repr_html_()
    cells = [cell.text for cell in ElementTree.fromstring(page).iter("td")]
    assert cells[:5] == [
        "sequential/experts/wi",
        "8x4x6",
        "expert,-,-",
        "96",
        "axes (expert, embed, mlp)",
    ]
    assert "The path pattern &#x27;a&lt;b&gt;&amp;&#x27; matched" in page
    assert "color" not in page  # the notebook's own, light or dark


def test_describe_needs_a_built_model_of_this_strategy():
    strategy = parity.strategy_of(8)
    with strategy.scope():
        unbuilt = keras.Sequential([keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="needs a built model.*not built"):
        strategy.describe(unbuilt)
    with pytest.raises(ValueError, match="not made inside this SpmdStrategy's scope"):
        strategy.describe(parity.classifier())
    with parity.strategy_of(8).scope():
        other = parity.classifier()
    with pytest.raises(ValueError, match="not made inside this SpmdStrategy's scope"):
        strategy.describe(other)


# -- the compiled program --------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_the_program_holds_an_eighth_of_the_experts_and_their_slots(optimizer):
    strategy, model = optimized(optimizer)
    x, y = parity.data(32)
    model.fit(x, np.eye(3)[y].astype("float32"), batch_size=32, verbose=0)
    [program] = strategy.programs
    shardings = program.compiled.input_shardings[0][len(program.step.inputs) :]
    per_device = split = 0
    for variable, sharding in zip(program.step.captures, shardings, strict=True):
        shape = tuple(variable.shape)
        part = sharding.shard_shape(shape)
        per_device += int(np.prod(part)) * variable.dtype.size
        if shape and shape[0] == 8:
            assert part == (1, *shape[1:])
            split += 1
        else:
            assert part == shape
        # And so do the values that are there now.
        held = variable.device_copy
        if held is not None:
            assert held.addressable_shards[3].data.shape == part
    assert split == {"adam": 6, "adafactor": 8}[optimizer]
    # XLA's own account of the arguments, which also has the batch: [4, 8, 4], [4, 3].
    batch = 4 * (4 * 8 * 4 + 4 * 3)
    assert program.compiled.memory_analysis().argument_size_in_bytes == (
        per_device + batch
    )
    # Old and new values share their memory.
    updated = sum(
        int(np.prod(shardings[i].shard_shape(tuple(program.step.captures[i].shape))))
        * program.step.captures[i].dtype.size
        for i in program.step.updates
    )
    assert program.compiled.memory_analysis().alias_size_in_bytes == updated


# -- variables without a Keras path ----------------------------------------------------


def test_patterns_match_the_names_of_plain_variables():
    """As Keras 2 names its weights, TensorFlow's `:0` left out."""
    rules = gshard_tf.AxisRules(
        {"mlp": "expert"}, paths=[(r"dense/kernel", (None, "mlp"))]
    )
    strategy = parity.strategy_of(8, rules=rules)
    with strategy.scope():
        kernel = tf.Variable(tf.zeros([4, 16]), name="dense/kernel")
    assert kernel.name == "dense/kernel:0" and kernel.path == "dense/kernel"
    decision = strategy.extended.layouts.layout_for(kernel)
    assert decision.storage.spec[1] == "expert"
    assert decision.reason == "path 'dense/kernel'"
    assert strategy.extended.layouts.warnings() == []


def test_factors_named_after_a_weight_go_by_it():
    """As Keras 2's Adafactor names them: a pattern for the weight matches them too."""
    rules = gshard_tf.AxisRules(
        {"batch": "expert", "mlp": "expert"},
        paths=[(r".*dense/kernel", (None, "mlp"))],
    )
    strategy = parity.strategy_of(8, rules=rules)
    with strategy.scope():
        kernel = tf.Variable(tf.zeros([8, 16]), name="dense/kernel")
        rows = tf.Variable(tf.zeros([8]), name="Adafactor/r/dense/kernel")
        columns = tf.Variable(tf.zeros([16]), name="Adafactor/c/dense/kernel")
        with strategy.extended.colocate_vars_with(kernel):
            slot = tf.Variable(tf.zeros([8, 16]), name="Adafactor/v/dense/kernel")
    layouts = strategy.extended.layouts
    found = [layouts.layout_for(v).storage.spec for v in (rows, columns, slot)]
    assert found == [(None,), ("expert",), (None, "expert")]
