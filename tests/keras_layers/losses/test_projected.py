"""The projection in blocks against whole logits, on one device and on meshes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.hlo import parser
from keras_layers import (
    NegativeLogLikelihood,
    Perplexity,
    TokenAccuracy,
    TokenCrossentropy,
    TokenEmbedding,
    VocabularyProjection,
    projected_statistics,
    token_statistics,
)

B, T, M, V = 4, 10, 6, 24


def samples():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, M)).astype(np.float32)
    table = rng.normal(size=(V, M)).astype(np.float32)
    return rng.integers(0, V, (B, T)), hidden, table


@pytest.mark.broad(3)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [1, 3, 5, 16])
def test_values_and_gradients_of_whole_logits(block, transposed, compiled):
    labels, hidden, table = samples()
    table = table.T if transposed else table
    scales = np.random.default_rng(1).normal(size=(3, B, T)).astype(np.float32)

    def run(statistics, compiled=False):
        def both(hidden, table):
            with tf.GradientTape() as tape:
                tape.watch([hidden, table])
                found = statistics(hidden, table)
                total = tf.reduce_sum(tf.stack(found[:3]) * scales)
            return found, tape.gradient(total, [hidden, table])

        if compiled:
            both = tf.function(both, jit_compile=True, autograph=False)
        return both(tf.constant(hidden), tf.constant(table))

    found = run(
        lambda x, w: projected_statistics(labels, x, w, block, transposed), compiled
    )
    right = run(lambda x, w: token_statistics(
        labels, tf.einsum("BTM,MV->BTV", x, w if transposed else tf.transpose(w))
    ))  # fmt: skip
    for one, other in zip(found[0], right[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(found[1], right[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    logits = hidden @ (table if transposed else table.T)
    np.testing.assert_array_equal(found[0].correct, logits.argmax(-1) == labels)


def test_low_precision():
    labels, hidden, table = samples()
    hidden, table = tf.cast(hidden, tf.bfloat16), tf.constant(table)
    with tf.GradientTape() as tape:
        tape.watch([hidden, table])
        found = projected_statistics(labels, hidden, table, 4)
    d_hidden, d_table = tape.gradient(found.log_sum_exp, [hidden, table])
    assert (d_hidden.dtype, d_table.dtype) == (tf.bfloat16, tf.float32)
    logits = tf.einsum("BTM,VM->BTV", hidden, tf.cast(table, tf.bfloat16))
    right = token_statistics(labels, logits)
    np.testing.assert_allclose(found.label_logit, right.label_logit, rtol=1e-6)
    softmax = tf.nn.softmax(tf.cast(logits, tf.float32))
    right = tf.einsum("BTV,BTM->VM", softmax, tf.cast(hidden, tf.float32))
    np.testing.assert_allclose(d_table, right, rtol=2e-2, atol=2e-2)


def test_a_second_derivative_is_refused():
    labels, hidden, table = samples()
    hidden = tf.constant(hidden)
    with tf.GradientTape() as outer:
        outer.watch(hidden)
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            found = projected_statistics(labels, hidden, table, 4).log_sum_exp
        gradient = tape.gradient(found, hidden)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        outer.gradient(gradient, hidden)


def test_arguments():
    labels, hidden, table = samples()
    with pytest.raises(ValueError, match="block_length must be a whole number"):
        projected_statistics(labels, hidden, table, 0)
    with pytest.raises(ValueError, match=r"hidden must be \[B, T, M\]"):
        projected_statistics(labels[0], hidden[0], table, 2)
    with pytest.raises(ValueError, match=r"must be \[..., 4\]"):
        TokenCrossentropy(from_statistics=True)(labels, hidden)


LENGTH, VOCAB, WIDTH = 32, 512, 8


def train(block, axes=None, rules=None):
    """The logs of two steps of a model, and the step's program."""
    keras.utils.set_random_seed(0)
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh(axes or {"data": 1}), rules)
    packed = block != "logits"
    with strategy.scope():
        ids = keras.Input([LENGTH], dtype="int32")
        labels = keras.Input([LENGTH], dtype="int32")
        x = keras.layers.Embedding(VOCAB, WIDTH, mask_zero=True)(ids)
        x = keras.layers.Dense(WIDTH, activation="tanh")(x)
        head = VocabularyProjection(VOCAB, block_length=block if packed else None)
        y = head(x, labels) if packed else head(x)
        model = keras.Model([ids, labels] if packed else [ids], y)
        options = {"ignore_class": 3, "from_statistics": packed}
        model.compile(
            keras.optimizers.SGD(0.5),
            TokenCrossentropy(0.1, 1e-3, **options),
            weighted_metrics=[
                kind(**options)
                for kind in (NegativeLogLikelihood, Perplexity, TokenAccuracy)
            ],
        )
    ids = np.random.default_rng(0).integers(0, VOCAB, (16, LENGTH))
    ids[:, 28:] = 0
    ids[:4, ::3] = 3
    labels = np.roll(ids, 1, 1)
    inputs = [ids, labels] if packed else [ids]
    history = model.fit(inputs, labels, batch_size=16, epochs=2, verbose=0).history
    (program,) = strategy.programs
    return history, program


@pytest.fixture(scope="module")
def of_logits():
    return train("logits")


def whole_logits(program, size):
    """Whether any tensor of the program has `size` elements or more."""
    module = parser.parse(program.compiled.as_text())
    return any(
        array.elements >= size
        for instruction, _, _ in module.executed()
        for array in instruction.arrays
    )


def test_logits_never_exist_whole(of_logits):
    right, whole = of_logits
    found, blocks = train(4)
    for name, values in right.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)
    size = 16 * LENGTH * VOCAB
    assert whole_logits(whole, size)
    assert not whole_logits(blocks, size // 4)
    memory = [p.compiled.memory_analysis().temp_size_in_bytes for p in (whole, blocks)]
    assert memory[0] > 4 * size
    assert memory[1] < memory[0] / 3
    # Statistics of whole logits, where no block is asked for.
    found, _ = train(None)
    for name, values in right.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("axes", "rules"),
    [
        ({"data": 8}, None),
        ({"data": 2, "model": 4}, None),
        ({"model": 8}, gshard_tf.AxisRules({"vocab": "model"})),
    ],
    ids=["tokens", "both", "vocabulary"],
)
def test_on_a_mesh_no_logits_and_no_table_move(of_logits, axes, rules):
    found, program = train(4, axes, rules)
    for name, values in of_logits[0].items():
        np.testing.assert_allclose(found[name], values, rtol=2e-5, err_msg=name)
    assert not whole_logits(program, 16 * LENGTH * VOCAB // 8 // 2)
    moved = program.collectives()
    assert {collective.kind for collective in moved} <= {"all-reduce"}
    in_loops = [c for c in moved if c.times != 1]
    # Statistics of a block, and the gradient of its hidden states.
    block = 16 // axes.get("data", 1) * 4 * 4
    assert all(c.bytes <= block * max(WIDTH, 4) for c in in_loops)
    if rules is None and "model" not in axes:
        assert not in_loops


def test_a_layer_of_blocks_is_saved_and_gives_logits(tmp_path):
    ids, labels = keras.Input([6], dtype="int32"), keras.Input([6], dtype="int32")
    x = TokenEmbedding(V, M)(ids)
    head = VocabularyProjection(V, block_length=4)
    model = keras.Model([ids, labels], [head(x, labels), head(x)])
    assert [tuple(y.shape) for y in model.outputs] == [(None, 6, 4), (None, 6, V)]
    values = np.random.default_rng(0).integers(0, V, (2, 3, 6))
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    packed, logits = again.predict(list(values), verbose=0)
    right = token_statistics(values[1], logits)
    np.testing.assert_allclose(packed, np.stack(right, -1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(logits, model.predict(list(values), verbose=0)[1])
