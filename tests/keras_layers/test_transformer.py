import keras
import numpy as np
import pytest
import tensorflow as tf
from decoding_models import BOS, EOS, sources
from decoding_models import untrained as small

from keras_layers import MoELayer, greedy_decode
from keras_layers.feed_forward import FeedForward


def random_ids(batch=3, length=6, seed=0):
    return sources(batch, length, seed)


def test_every_other_block_has_experts():
    model = small(num_encoder_layers=4, num_decoder_layers=3, moe_every=2)

    def kinds(blocks):
        return [type(block.feed_forward) for block in blocks]

    assert kinds(model.encoder_blocks) == [FeedForward, MoELayer] * 2
    assert kinds(model.decoder_blocks) == [FeedForward, MoELayer, FeedForward]
    dense = small(num_experts=None)
    assert kinds(dense.encoder_blocks + dense.decoder_blocks) == [FeedForward] * 2


def test_logits_do_not_depend_on_padding_or_on_the_future():
    # Room for every token, so that none can push another out.
    model = small(moe_options={"router": {"capacity_factor": 4.0}})
    source, target = random_ids(seed=1), random_ids(length=5, seed=2)
    logits = model((source, target))
    assert logits.shape == (3, 5, 11) and logits.dtype == tf.float32
    longer = np.pad(source, [[0, 0], [0, 4]])
    np.testing.assert_allclose(model((longer, target)), logits, atol=1e-5)
    later = target.copy()
    later[:, 3:] = 7
    np.testing.assert_allclose(
        model({"source": source, "target": later})[:, :3], logits[:, :3], atol=1e-5
    )
    assert np.any(np.abs(model((source, later))[:, 3:] - logits[:, 3:]) > 1e-3)
    mask = keras.src.backend.get_keras_mask(logits)
    np.testing.assert_array_equal(mask, target != 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_experts": None, "tie_output": False},
        {"source_vocab_size": 11, "share_embeddings": True, "key_dim": 5},
    ],
)
def test_saving(tmp_path, arguments):
    if arguments.get("num_experts", 4):
        arguments["moe_options"] = {"router": {"capacity_factor": 1.5}}
    model = small(dropout=0.1, **arguments)
    inputs = (random_ids(), random_ids(seed=1))
    model.compile("sgd", "mse")
    model(inputs)
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert copy.get_config() == model.get_config()
    np.testing.assert_allclose(copy(inputs), model(inputs), atol=1e-6)
    paths = [weight.path for weight in model.weights]
    assert len(set(paths)) == len(paths)
    tables = sum("embedding" in path for path in paths)
    assert tables == (1 if arguments.get("share_embeddings") else 2)


def test_functional_use_with_unknown_lengths_and_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    source = keras.Input([None], dtype="int32")
    target = keras.Input([None], dtype="int32")
    logits = small()((source, target))
    assert logits.dtype == "float32" and logits.shape == (None, None, 11)
    model = keras.Model([source, target], logits)
    for length in (4, 7):
        outputs = model([random_ids(length=length), random_ids(length=5)])
        assert outputs.shape == (3, 5, 11) and outputs.dtype == tf.float32


def reversing_data(count, length=4):
    """Sources, and targets that are the sources backwards."""
    source = np.random.default_rng(0).integers(3, 11, (count, length))
    backwards = source[:, ::-1]
    inputs = np.concatenate([np.full((count, 1), BOS), backwards], axis=1)
    labels = np.concatenate([backwards, np.full((count, 1), EOS)], axis=1)
    return source, inputs, labels


def test_fit_learns_and_decoding_generates_what_was_learnt():
    source, inputs, labels = reversing_data(256, length=3)
    model = small(model_dim=32, hidden_dim=64)
    model.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    history = model.fit(
        (source, inputs), labels, batch_size=64, epochs=18, verbose=0
    ).history
    assert history["accuracy"][-1] > 0.9 > 0.4 > history["accuracy"][0]
    assert "encoder_1_moe_dropped" in history and "decoder_1_moe_dropped" in history
    ids, _ = greedy_decode(model, source[:64], 6, BOS, EOS)
    expected = np.pad(labels[:64], [[0, 0], [0, 2]])
    assert np.mean(np.all(ids == expected, axis=1)) > 0.6


def test_compiled_mixed_precision_step_trains_every_weight():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small(num_experts=None)  # for those see moe/test_moe.py
    source, inputs, labels = reversing_data(8)
    model.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    model((source, inputs))
    before = [weight.numpy() for weight in model.trainable_weights]
    logs = model.train_on_batch((source, inputs), labels, return_dict=True)
    assert np.isfinite(logs["loss"])
    for old, weight in zip(before, model.trainable_weights, strict=True):
        assert weight.dtype == "float32"
        assert np.all(np.isfinite(weight)) and np.any(old != weight.numpy()), weight


def uncached_decode(model, source, max_length):
    """The whole prefix through the model again for each token."""
    ids = np.zeros((len(source), max_length), int)
    log_prob = np.zeros(len(source))
    done = np.zeros(len(source), bool)
    for i in range(max_length):
        prefix = np.concatenate([np.full((len(source), 1), BOS), ids[:, :i]], axis=1)
        log_probs = tf.nn.log_softmax(model((source, prefix))[:, i]).numpy()
        log_probs[:, 0] = -np.inf  # padding is no token
        best = np.argmax(log_probs, axis=-1)
        log_prob += np.where(done, 0.0, np.max(log_probs, axis=-1))
        ids[:, i] = np.where(done, 0, best)
        done |= best == EOS
    return ids, log_prob


@pytest.mark.broad(2)
@pytest.mark.parametrize("arguments", [{"num_experts": None, "tie_output": False}, {}])
def test_cached_decoding_is_uncached_decoding(arguments):
    # With room for every token: decoding by itself never drops one.
    if arguments.get("num_experts", 4):
        arguments["moe_options"] = {"router": {"capacity_factor": 4.0}}
    model = small(num_decoder_layers=2, **arguments)
    source = random_ids(batch=6)
    model((source, source))
    # EOS likely enough that some sequences end early.
    if model.tie_output:
        table = model.target_embedding.table
        table.assign(tf.tensor_scatter_nd_update(table, [[EOS]], [table[EOS] * 3.0]))
    ids, log_prob = greedy_decode(model, source, 7, BOS, EOS)
    expected_ids, expected_log_prob = uncached_decode(model, source, 7)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(log_prob, expected_log_prob, rtol=1e-4)
    if not model.num_experts:  # test_beam_search.py compiles one with experts
        compiled = tf.function(
            lambda ids: greedy_decode(model, ids, 7, BOS, EOS),
            jit_compile=True,
            autograph=False,
        )
        np.testing.assert_array_equal(compiled(tf.constant(source))[0], expected_ids)


def test_what_is_generated_depends_on_nothing_else_in_the_batch():
    # A row of like tokens asks more of two experts than they have room for.
    model = small(moe_options={"router": {"capacity_factor": 1.0}})
    sources = np.where(random_ids(), np.array([[4], [7], [9]]), 0)
    model((sources, sources))
    padded = np.pad(sources, [[0, 0], [0, 30]])
    short, long = (model.encode(ids)[0][:, :6] for ids in (sources, padded))
    real = sources != 0
    np.testing.assert_allclose(short[real], long[real], rtol=1e-4, atol=1e-5)
    whole = model.encode(sources, decoding=True)[0]
    assert np.max(np.abs(short - whole)[real]) > 0.01
    ids, log_prob = greedy_decode(model, padded, 5, BOS, EOS)
    for row in range(3):
        own = sources[row : row + 1, : np.count_nonzero(sources[row])]
        alone_ids, alone_log_prob = greedy_decode(model, own, 5, BOS, EOS)
        np.testing.assert_array_equal(alone_ids, ids[row : row + 1])
        np.testing.assert_allclose(alone_log_prob[0], log_prob[row], rtol=1e-4)


class _Scripted:
    """Follows a script per row, so that ends and lengths are known."""

    pad_id = 0

    def __init__(self, script):
        self.script = tf.constant(script)

    def start_decoding(self, source_ids, max_length):
        return {"steps": tf.zeros([len(source_ids)], tf.int32)}

    def decode_step(self, tokens, state, index):
        logits = 5.0 * tf.one_hot(self.script[:, index], 8)
        return logits, {"steps": state["steps"] + 1}


def test_decoding_pads_after_eos_and_stops_when_all_are_done():
    model = _Scripted([[4, EOS, 5, 5, 5], [6, 6, EOS, 5, 5]])
    ids, log_prob = greedy_decode(model, tf.zeros([2, 3], tf.int64), 5, BOS, EOS)
    np.testing.assert_array_equal(ids, [[4, 2, 0, 0, 0], [6, 6, 2, 0, 0]])
    assert ids.dtype == tf.int64
    each = 5.0 - np.log(np.exp(5.0) + 7)
    np.testing.assert_allclose(log_prob, [2 * each, 3 * each], rtol=1e-5)
    steps = []
    model.decode_step = lambda t, s, i: (
        steps.append(int(i)),
        _Scripted.decode_step(model, t, s, i),
    )[1]
    greedy_decode(model, tf.zeros([2, 3], tf.int64), 5, BOS, EOS)
    assert steps == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_encoder_layers": 0}, "num_encoder_layers=0"),
        ({"num_experts": 1}, "num_experts=1"),
        ({"moe_every": 0}, "moe_every=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"share_embeddings": True}, "source_vocab_size=12"),
        ({"num_heads": 3}, "model_dim=8, num_heads=3"),
        ({"num_experts": 0, "moe_options": {"seed": 1}}, "num_experts=0"),
        ({"moe_options": {"hidden_dim": 1}}, r"\['hidden_dim'\]"),
        ({"moe_options": {"group_size": -1}}, "group_size=-1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        small(**arguments)


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"Received: \['source'\]"):
        small()({"source": random_ids()})
    with pytest.raises(ValueError, match="max_length=0"):
        greedy_decode(small(), random_ids(), 0, BOS, EOS)
