"""Several sentences in a row are as each of them in a row of its own."""

import collections
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from packed_rows import one_to_a_row, packed, sentences
from parity import assert_close, run_on_mesh, run_plain
from processes import run_python

from keras_layers import Transformer

WORDS, LENGTH = 20, 16
PAIRS = sentences(5, WORDS)
WHERE = ("right", "left", "within", "junk")
#: Nothing is dropped: a group is a row, and what a row has room for depends on what
#: else it holds. Not among them: expert choice, whose experts choose the best tokens of
#: a row, and random second experts and jitter, whose numbers go by a token's place in
#: the row.
ROUTERS = {
    "dense": None,
    "top_k": {"kind": "top_k", "capacity_factor": "dropless"},
    "top_k sigmoid": {
        "kind": "top_k",
        "scores": "sigmoid",
        "capacity_factor": "dropless",
    },
    # Of 4 experts: room for every token in each.
    "top2": {"capacity_factor": 4.0, "second_expert_policy": "all"},
    "hash": {"kind": "hash", "capacity_factor": 4.0},
}


def transformer(router="top_k", build=True, **arguments):
    defaults = {
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "model_dim": 8,
        "hidden_dim": 16,
        "num_heads": 2,
        "num_experts": None,
        "moe_every": 1,
        "dropout": 0.0,
        "seed": 0,
    }
    if ROUTERS[router]:
        options = {"router": ROUTERS[router], "aux_loss_coef": 0.0}
        defaults.update(num_experts=4, moe_options=options)
    keras.utils.set_random_seed(1)
    model = Transformer(WORDS, WORDS, **{**defaults, **arguments})
    if build:
        model.build()
    return model


def summed_loss(model, inputs, training):
    """Logits, and the sum of each real token's loss of predicting itself."""
    logits = model(inputs, training=training)
    losses = keras.losses.sparse_categorical_crossentropy(
        inputs[1], logits, from_logits=True
    )
    real = tf.cast(keras.src.backend.get_keras_mask(logits), losses.dtype)
    return logits, tf.reduce_sum(losses * real)


def weights_of(model):
    return [w.value for w in model.trainable_variables]


def outcome_unpacked(model, pairs, training):
    """Logits of each sentence, and loss and gradients summed over them."""
    logits, total, each = [], 0.0, []
    for source, target in pairs:
        with tf.GradientTape() as tape:
            found, loss = summed_loss(model, (source[None], target[None]), training)
        gradients = tape.gradient(loss, weights_of(model), unconnected_gradients="zero")
        each.append([tf.convert_to_tensor(g).numpy() for g in gradients])
        logits.append(found[0].numpy())
        total += float(loss)
    return logits, total, [sum(of_weight) for of_weight in zip(*each, strict=True)]


def check_packed(model, pairs, expected, inputs, places, training, rtol=1e-5):
    with tf.GradientTape() as tape:
        logits, loss = summed_loss(model, inputs, training)
    gradients = tape.gradient(loss, weights_of(model), unconnected_gradients="zero")
    alone, total, sums = expected
    for i in range(len(pairs)):
        row, at = places[i]
        assert_close(logits.numpy()[row, at], alone[i], rtol, f"logits of {i}")
    assert_close(float(loss), total, rtol, "loss")
    for weight, found, known in zip(
        model.trainable_variables, gradients, sums, strict=True
    ):
        assert_close(tf.convert_to_tensor(found), known, 2 * rtol, weight.path)
    assert sum(np.any(known != 0) for known in sums) > 10


@pytest.mark.broad(3)
@pytest.mark.parametrize("router", ROUTERS)
def test_packed_is_unpacked(router):
    model = transformer(router, num_decoder_layers=2 if router == "dense" else 1)
    expected = outcome_unpacked(model, PAIRS, True)
    for where in WHERE:
        inputs, places = packed(PAIRS, 3, LENGTH, where)
        check_packed(model, PAIRS, expected, inputs, places, True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"remat": "attention"},
        {"stacked": True, "remat": True, "num_decoder_layers": 2},
        {"tie_output": False, "share_embeddings": True, "key_dim": 3},
        pytest.param({"remat": True}, marks=pytest.mark.slow),
        pytest.param({"stacked": True}, marks=pytest.mark.slow),
    ],
)
def test_stacked_or_computed_again(arguments):
    model = transformer(**arguments)
    expected = outcome_unpacked(model, PAIRS[:3], True)
    inputs, places = packed(PAIRS[:3], 2, LENGTH, "within")
    check_packed(model, PAIRS[:3], expected, inputs, places, True)


def test_without_drops_for_decoding():
    """Routers that drop do not with `decoding`, whatever a row holds."""
    options = {"router": {"capacity_factor": 0.5}, "aux_loss_coef": 0.0}
    model = transformer(num_experts=4, moe_options=options)
    inputs, places = packed(PAIRS, 5, 2 * LENGTH)
    logits = model(inputs, decoding=True).numpy()
    dropping = model(inputs).numpy()
    apart = 0.0
    for i, (source, target) in enumerate(PAIRS):
        alone = model((source[None], target[None]), decoding=True)[0]
        row, at = places[i]
        assert_close(logits[row, at], alone, 1e-5, f"logits of {i}")
        apart = max(apart, np.abs(dropping[row, at] - alone).max())
    assert apart > 1e-3


def test_targets_that_begin_with_padding():
    model = transformer("dense", bos_id=0)
    pairs = [(source, np.concatenate([[0], target])) for source, target in PAIRS]
    expected = outcome_unpacked(model, pairs, True)
    for where in ("left", "junk"):
        inputs, places = packed(pairs, 3, LENGTH + 5, where)
        check_packed(model, pairs, expected, inputs, places, True)
        mask = model.compute_mask(inputs)
        np.testing.assert_array_equal(mask, inputs[3] != 0)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = transformer("dense")
    expected = outcome_unpacked(model, PAIRS, True)
    inputs, places = packed(PAIRS, 3, LENGTH, "within")
    # Sums in another order, rounded to 8 bits.
    check_packed(model, PAIRS, expected, inputs, places, True, 0.02)


def test_no_segment_sees_another():
    """Whatever other segments and padding hold."""
    model = transformer()
    inputs, places = packed(PAIRS, 3, LENGTH, "within")
    logits = model(inputs).numpy()
    rng = np.random.default_rng(1)
    for i in range(3):
        row, at = places[i]
        name = inputs[3][row, at[0]]
        changed = []
        for ids, segments in (inputs[0::2], inputs[1::2]):
            others = rng.integers(3, WORDS, ids.shape)
            changed.append(np.where((segments == name) | (ids == 0), ids, others))
        found = model((*changed, *inputs[2:])).numpy()
        assert_close(found[row, at], logits[row, at], 1e-6, f"logits of {i}")
        assert np.abs(found - logits).max() > 1e-2
        # Of its own segment it sees the source and the targets before.
        source = inputs[0].copy()
        first = np.flatnonzero((inputs[2][row] == name) & (source[row] != 0))[0]
        source[row, first] = 3 + (source[row, first] - 2) % (WORDS - 3)
        found = model((source, *inputs[1:])).numpy()
        difference = np.abs(found - logits).max(axis=-1)
        assert difference[row, at].min() > 1e-5
        others = np.ones_like(difference, bool)
        others[row, at] = False
        assert difference[others & (inputs[1] != 0)].max() < 1e-6


def rows_for_fit():
    """As dict, tuple, and one sentence to a row; labels of each."""
    pairs = sentences(20, WORDS, seed=3)
    inputs, _ = packed(pairs, 3, LENGTH, "within", seed=1)
    inputs = [np.pad(x, [[0, 8 - len(x)], [0, 0]]) for x in inputs]
    names = ("source", "target", "source_segment_ids", "target_segment_ids")
    return dict(zip(names, inputs, strict=True)), one_to_a_row(pairs)


def compiled(router, run_eagerly=False, **arguments):
    model = transformer(router, **arguments)
    model.compile(
        keras.optimizers.SGD(0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
        jit_compile=False,
        run_eagerly=run_eagerly,
    )
    return model


def fit(model, inputs):
    target = inputs["target"] if isinstance(inputs, dict) else inputs[1]
    data = tf.data.Dataset.from_tensors((inputs, target))
    history = model.fit(data, epochs=2, verbose=0).history
    return {name: history[name] for name in ("loss", "accuracy")}


@pytest.mark.broad(4)
@pytest.mark.parametrize("partitions", [8, 1])
@pytest.mark.parametrize("router", ["top_k", "dense"])
def test_training_on_one_and_on_eight_partitions(router, partitions):
    rows, alone = rows_for_fit()
    plain = run_plain(lambda: compiled(router, True), lambda model: fit(model, alone))
    weights = [w.numpy() for w in plain.model.trainable_variables]
    assert plain.result["loss"][1] < plain.result["loss"][0]
    run = run_on_mesh(
        lambda: compiled(router), lambda model: fit(model, rows), partitions
    )
    assert_close(run.result, plain.result, 1e-5, "logs")
    found = [w.numpy() for w in run.model.trainable_variables]
    assert_close(found, weights, 1e-5, "weights")
    (program,) = run.strategy.programs
    assert {c.kind for c in program.collectives()} <= {"all-reduce", "all-to-all"}


@pytest.mark.slow  # two more steps; see test_stacked_or_computed_again
def test_stacked_on_eight_partitions():
    rows, alone = rows_for_fit()

    def make(eager=False):
        return compiled("dense", eager, num_decoder_layers=2, stacked=True, remat=True)

    plain = run_plain(lambda: make(True), lambda model: fit(model, alone))
    run = run_on_mesh(make, lambda model: fit(model, rows))
    assert_close(run.result, plain.result, 1e-5, "logs")


@pytest.mark.slow
def test_remat_keeps_ids_and_no_mask_of_pairs():
    rows, _ = rows_for_fit()
    rows = {name: np.pad(x, [[0, 0], [0, 23 - LENGTH]]) for name, x in rows.items()}

    def masks(remat):
        run = run_on_mesh(
            lambda: compiled("dense", remat=remat), lambda model: fit(model, rows), 1
        )
        (program,) = run.strategy.programs
        # Instructions of the program itself, not of its fused loops.
        text = re.sub(
            r"^%?fused\S* .*?^}", "", program.compiled.as_text(), flags=re.M | re.S
        )
        pairs = r"= pred\[8,(?:1,)?23,23\]\S* (\S+?)\("
        return collections.Counter(re.findall(pairs, text))

    assert not masks("attention")


def test_a_functional_model_of_a_dict(tmp_path):
    rows, _ = rows_for_fit()
    symbols = {name: keras.Input([None], dtype="int32", name=name) for name in rows}
    inner = transformer()
    logits = inner(symbols)
    assert logits.shape == (None, None, WORDS)
    model = keras.Model(symbols, logits)
    expected = inner(rows)
    np.testing.assert_allclose(model(rows), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict(rows, verbose=0), expected, atol=1e-5)
    mask = keras.src.backend.get_keras_mask(model(rows))
    real = (rows["target"] != 0) & (rows["target_segment_ids"] != 0)
    np.testing.assert_array_equal(mask, real)
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(copy(rows), expected, atol=1e-6)


@pytest.mark.broad(2)
@pytest.mark.parametrize("as_dict", [True, False])
def test_saving_and_exporting(tmp_path, as_dict):
    rows, _ = rows_for_fit()
    rows = {name: x.astype("int32") for name, x in rows.items()}
    inputs = rows if as_dict else tuple(rows.values())
    # Keras exports for the inputs of the call that builds the model.
    model = transformer("top_k", build=False)
    expected = model(inputs)
    assert model.compute_output_shape(tuple(x.shape for x in rows.values())) == (
        8,
        LENGTH,
        WORDS,
    )
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(copy(inputs), expected, atol=1e-6)
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.serve(inputs), expected, atol=1e-5)


@pytest.mark.slow
def test_under_mirrored_strategy():
    """Keras builds the model from means of the replicas' batches, which are floats."""
    printed = run_python(
        """
        import keras, numpy as np, tensorflow as tf
        from keras_layers import Transformer
        [cpu] = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        rng = np.random.default_rng(0)
        ids = rng.integers(3, 30, (8, 6))
        names = np.sort(rng.integers(1, 4, (8, 6)))
        x = {"source": ids, "target": ids, "source_segment_ids": names,
             "target_segment_ids": names}
        mirrored = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
        losses = []
        for strategy in (tf.distribute.get_strategy(), mirrored):
            keras.utils.set_random_seed(0)
            with strategy.scope():
                model = Transformer(30, 30, 1, 1, 8, 16, 2, dropout=0.0, seed=1)
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                model.compile("sgd", loss, jit_compile=False)
            history = model.fit(x, ids, batch_size=8, epochs=2, shuffle=False,
                                verbose=0)
            losses.append(history.history["loss"])
        np.testing.assert_allclose(*losses, rtol=1e-5)
        print(losses[0][0] != losses[0][1])
        """
    )
    assert printed.split() == ["True"]


def test_bad_inputs_of_a_transformer():
    model = transformer("dense")
    ids = np.full([2, 4], 3)
    for inputs, message in (
        ({"source": ids, "target": ids, "segments": ids}, r"Received: .*'segments'"),
        (
            {"source": ids, "target": ids, "target_segment_ids": ids},
            "Received: target_segment_ids only",
        ),
        ((ids, ids, ids, None), "Received: source_segment_ids only"),
        ((ids, ids, ids), "Received: tuple of 3"),
        ((ids, ids, ids[:, 1:], ids), r"source_segment_ids must be .*\(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(inputs)
    for names in (ids[0], ids * 1.0):
        with pytest.raises(ValueError, match="segment_ids must be integers"):
            model.encode(ids, segment_ids=names)
    # Keras casts what is given to the model itself, tokens and segments alike.
    floats = tuple(np.float32(x) for x in (ids, ids, ids, ids))
    np.testing.assert_array_equal(model(floats), model((ids, ids, ids, ids)))
