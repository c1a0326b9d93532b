"""Ids as vocabularies have them: those that decoding refuses, and PAD as BOS (T5)."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from decoding_models import EOS, Fixed, small, sources

from keras_layers import Transformer, beam_search, greedy_decode, sample_decode

DECODERS = {
    "greedy": greedy_decode,
    "beam": beam_search,
    "flat beam": functools.partial(beam_search, flat=True),
    "sample": functools.partial(sample_decode, seed=[1, 2]),
}
LENGTH = 5


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(2)
    return small(num_decoder_layers=1)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("bos_id", "eos_id", "message"),
    [
        (1, 0, "Received: eos_id=0, pad_id=0"),
        (0, 2, r"Transformer\(..., bos_id=0\). Received: bos_id=0, pad_id=0"),
        (11, 2, "vocabulary, 0 to 10. Received: bos_id=11"),
        (1, 11, "vocabulary, 0 to 10. Received: eos_id=11"),
        (1, -1, "Received: eos_id=-1"),
    ],
)
def test_ids_that_would_not_work(model, decoder, bos_id, eos_id, message):
    with pytest.raises(ValueError, match=message):
        DECODERS[decoder](model, sources(), LENGTH, bos_id, eos_id)


@pytest.mark.parametrize("decoder", DECODERS)
def test_ids_of_other_decodable_models(decoder):
    """They need not say the size of their vocabulary: the logits do."""
    with pytest.raises(ValueError, match="vocabulary, 0 to 3. Received: eos_id=4"):
        DECODERS[decoder](Fixed([0.0, 1.0, 2.0, 3.0]), sources(), LENGTH, 1, 4)


def test_ids_of_a_model():
    sizes = [9, 11, 1, 1, 8, 8, 2]
    with pytest.raises(ValueError, match="0 to 8. Received: pad_id=9"):
        Transformer(*sizes, pad_id=9)
    with pytest.raises(ValueError, match="0 to 10. Received: bos_id=11"):
        Transformer(*sizes, bos_id=11)
    with pytest.raises(ValueError, match="that of the model, 3. Received: bos_id=1"):
        greedy_decode(Transformer(*sizes, bos_id=3), sources(), LENGTH, 1, 2)


@pytest.fixture(scope="module")
def begins_with_pad(model):
    """As `model`, but PAD begins its targets and is embedded as BOS is there."""
    twin = small(num_decoder_layers=1, bos_id=0)
    twin.set_weights(model.get_weights())
    table = twin.target_embedding.table.numpy()
    table[0] = table[1]
    twin.target_embedding.table.assign(table)
    return twin


@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_as_bos_decodes_as_a_bos_of_its_own(model, begins_with_pad, decoder):
    ours = DECODERS[decoder](begins_with_pad, sources(), LENGTH, 0, EOS)
    theirs = DECODERS[decoder](model, sources(), LENGTH, 1, EOS)
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert np.any(np.asarray(ours[0]))
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_padding_as_bos_is_no_padding(model, begins_with_pad, training):
    """Logits, their mask and so the loss are those of a model with a BOS of its own."""
    source = sources()
    target = np.array(
        [[7, 8, 9], [7, 8, 0], [7, 0, 0], [0, 0, 0], [3, 4, 5], [6, 0, 0]]
    )
    with_bos = np.concatenate([np.ones([6, 1], int), target], axis=1)
    with_pad = np.concatenate([np.zeros([6, 1], int), target], axis=1)
    theirs = model((source, with_bos), training=training)
    ours = begins_with_pad((source, with_pad), training=training)
    mask = np.asarray(ours._keras_mask)
    np.testing.assert_array_equal(mask, np.asarray(theirs._keras_mask))
    assert mask[:, 0].all() and mask[3].tolist() == [True, False, False, False]
    np.testing.assert_allclose(ours[mask], theirs[mask], rtol=1e-4, atol=1e-5)
    symbolic = begins_with_pad([keras.Input([6], dtype="int32")] * 2)
    assert symbolic.shape == (None, 6, 11)


def test_padding_as_bos_is_kept_by_files(begins_with_pad, tmp_path):
    begins_with_pad((sources(), sources()))
    begins_with_pad.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.bos_id == 0
    config = loaded.get_config()
    del config["bos_id"]  # as older files have it
    assert Transformer.from_config(config).bos_id is None


def test_ids_may_be_numpy_numbers(model):
    ours = greedy_decode(model, sources(), np.int64(LENGTH), np.int64(1), np.int64(EOS))
    theirs = greedy_decode(model, sources(), LENGTH, 1, EOS)
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert isinstance(ours[0], tf.Tensor)
