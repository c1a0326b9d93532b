import keras
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_python

from gshard_examples.translation.clean import normalize_text
from gshard_examples.translation.temperature import temperature_shares
from gshard_examples.translation.vocabulary import (
    BOS,
    EOS,
    PAD,
    PLACEHOLDERS,
    UNK,
    Vocabulary,
    train_vocabulary,
)


def pieces(vocabulary, ids):
    """Ids as symbols, straight from SentencePiece."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model_bytes)
    return [model.id_to_piece(int(i)) for i in ids]


def test_symbols(toy_vocabulary):
    vocabulary = toy_vocabulary
    assert vocabulary.languages == ("de", "fr", "ru", "sr_Latn")
    assert vocabulary.size == 600
    assert pieces(vocabulary, range(4)) == ["<pad>", "<unk>", "<s>", "</s>"]
    for tag in vocabulary.languages:
        assert pieces(vocabulary, [vocabulary.language_id(tag)]) == [f"<{tag}>"]


def test_source_and_target(toy_vocabulary):
    source = toy_vocabulary.encode_source(
        ["de", "ru"], ["Ein {1} candle {9}", ""]
    ).to_list()
    assert source[0][0] == toy_vocabulary.language_id("de")
    assert source[0][-1] == EOS
    assert source[1] == [toy_vocabulary.language_id("ru"), EOS]
    symbols = pieces(toy_vocabulary, source[0])
    assert PLACEHOLDERS[0] in symbols and PLACEHOLDERS[8] in symbols
    (target,) = toy_vocabulary.encode_target(["Candle {1}"]).to_list()
    assert target[0] == BOS and target[-1] == EOS
    (cut,) = toy_vocabulary.encode_source(["de"], ["candle " * 50], 7).to_list()
    assert len(cut) == 7 and cut[-1] == EOS and cut[0] == source[0][0]
    (cut,) = toy_vocabulary.encode_target(["candle " * 50], 5).to_list()
    assert len(cut) == 5 and cut[-1] == EOS and cut[0] == BOS


def test_it_outlives_a_new_seed(toy_vocabulary):
    before = toy_vocabulary.encode_source(["de"], ["Ein candle"])
    text = toy_vocabulary.decode(before)
    keras.utils.set_random_seed(5)  # drops what kernels of operations own
    after = toy_vocabulary.encode_source(["de"], ["Ein candle"])
    assert after.to_list() == before.to_list()
    assert toy_vocabulary.decode(after) == text


@pytest.mark.parametrize("after", ["", "x", ">", "de>", " <fr>", "1}", "\u0301", "ря"])
def test_a_tag_is_its_id_whatever_follows(toy_vocabulary, after):
    (ids,) = toy_vocabulary.encode_source(["fr"], [after]).to_list()
    assert ids[0] == toy_vocabulary.language_id("fr")


@settings(max_examples=20)
@given(
    st.lists(
        st.sampled_from(
            ["<de>", "<fr>", "<sr_Latn>", "<s>", "</s>", "<pad>", "<unk>", "<0x41>"]
            + ["a", " ", "<", ">", "de", "\u2581", "\u2585", "\x00", "\u2028"]
        ),
        max_size=8,
    ).map("".join)
)
def test_text_cannot_pose_as_a_symbol(toy_vocabulary, text):
    (ids,) = toy_vocabulary.encode_source(["de"], [text]).to_list()
    forbidden = {PAD, BOS, EOS} | {
        toy_vocabulary.language_id(tag) for tag in toy_vocabulary.languages
    }
    assert not forbidden & set(ids[1:-1])
    assert EOS == ids[-1]


@settings(max_examples=20)
@given(st.text(max_size=40))
def test_round_trip_of_clean_text(toy_vocabulary, text):
    text = normalize_text(text).replace("\u2581", "")
    text = " ".join(text.replace("\ufffd", "").split())
    ids = toy_vocabulary.encode_target([text])
    assert toy_vocabulary.decode(ids).numpy()[0].decode() == text


def test_decode_stops_at_eos_and_ignores_symbols(toy_vocabulary):
    (ids,) = toy_vocabulary.encode_target(["Candle garden"]).to_list()
    (more,) = toy_vocabulary.encode_target(["never seen"]).to_list()
    german = toy_vocabulary.language_id("de")
    rows = [ids + more, [german, PAD] + ids[1:-1], [EOS] + ids, []]
    dense = tf.ragged.constant(rows).to_tensor(PAD)
    expected = [b"Candle garden", b"Candle garden", b"", b""]
    assert toy_vocabulary.decode(dense).numpy().tolist() == expected
    assert toy_vocabulary.decode(tf.cast(dense, tf.int64)).numpy().tolist() == expected
    assert toy_vocabulary.decode(tf.zeros([0, 4], tf.int32)).shape == (0,)
    # A model that rounds the vocabulary up may say ids that nobody has.
    strange = toy_vocabulary.decode(tf.constant([[-1, toy_vocabulary.size, EOS]]))
    assert "⁇" in strange.numpy()[0].decode()


def test_unknown_languages(toy_vocabulary):
    with pytest.raises(ValueError, match=r"near it: .*de.*Received: 'deu'"):
        toy_vocabulary.encode_source(["fr", "deu"], ["a", "b"])
    with pytest.raises(ValueError, match="look like de or sr_Latn"):
        toy_vocabulary.encode_source(["German"], ["a"])
    for special in ("pad", "unk", "s", "/s", "0x41", ""):
        with pytest.raises(ValueError, match="Received"):
            toy_vocabulary.encode_source([special], ["a"])
        ids = toy_vocabulary.encode_source(tf.constant([special]), tf.constant(["a"]))
        assert ids.to_list()[0][0] == UNK
    with pytest.raises(ValueError, match="2 tags and 1 texts"):
        toy_vocabulary.encode_source(["de", "fr"], ["a"])
    with pytest.raises(ValueError, match="max_length=1"):
        toy_vocabulary.encode_source(["de"], ["a"], max_length=1)


def test_strange_text(toy_vocabulary):
    texts = [b"\xff\xfe candle", b"candle", "x" * 50_000, "e\u0301", "\u00e9"]
    ids = toy_vocabulary.encode_source(["de"] * 5, texts).to_list()
    assert ids[0] == ids[1]
    assert len(ids[2]) > 1_000
    assert ids[3] == ids[4]


def test_in_a_graph_and_a_saved_model(toy_vocabulary, tmp_path):
    class Service(tf.Module):
        def __init__(self):
            super().__init__()
            self.vocabulary = toy_vocabulary

        @tf.function(
            input_signature=[
                tf.TensorSpec([None], tf.string),
                tf.TensorSpec([None], tf.string),
            ]
        )
        def __call__(self, tags, texts):
            ids = self.vocabulary.encode_source(tags, texts, max_length=64)
            return (
                ids.to_tensor(),
                self.vocabulary.languages_are_known(tags),
                self.vocabulary.decode(ids),
            )

    service = Service()
    tags = tf.constant(["de", "sr_Latn", "xx"])
    texts = tf.constant(["Candle {1} <fr>", "ćup", ""])
    before = service(tags, texts)
    tf.saved_model.save(service, tmp_path / "saved")
    after = tf.saved_model.load(tmp_path / "saved")(tags, texts)
    for one, other in zip(before, after, strict=True):
        assert one.numpy().tolist() == other.numpy().tolist()
    assert before[1].numpy().tolist() == [True, True, False]
    assert before[2].numpy()[0] == b"Candle {1} <fr>"


def test_training_is_reproducible_and_atomic(toy_corpus, toy_model, tmp_path):
    again = train_vocabulary(
        toy_corpus, tmp_path / "v.model", size=600, character_coverage=1.0
    )
    assert again.read_bytes() == toy_model.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["v.model"]


def test_unigram(toy_corpus, tmp_path):
    path = train_vocabulary(
        toy_corpus, tmp_path / "u.model", 400, "unigram", languages=["de", "ru"]
    )
    vocabulary = Vocabulary(path)
    assert vocabulary.languages == ("de", "ru")
    assert vocabulary.size == 400


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model_type": "word"}, "model_type='word'"),
        ({"size": 100}, "Received: size=100"),
        ({"temperature": 0.5}, "temperature=0.5"),
        ({"languages": ["ja"]}, "'ja'"),
    ],
)
def test_bad_training_options(toy_corpus, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        train_vocabulary(toy_corpus, tmp_path / "v.model", **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="train one first"):
        Vocabulary(tmp_path / "none.model")
    for data in (b"", b"nonsense"):
        (tmp_path / "bad.model").write_bytes(data)
        with pytest.raises(ValueError, match="SentencePiece"):
            Vocabulary(tmp_path / "bad.model")


def test_temperature():
    counts = {"big": 10_000, "small": 1}
    assert temperature_shares(counts, 1)["small"] == pytest.approx(1 / 10_001)
    assert temperature_shares(counts, 4)["small"] == pytest.approx(1 / 11)
    assert temperature_shares(counts, float("inf"))["small"] == 0.5


def test_a_byte_order_mark_is_left_out(toy_vocabulary):
    source = toy_vocabulary.encode_source(["de", "de"], ["\ufeffapplen", "applen"])
    assert source[0].numpy().tolist() == source[1].numpy().tolist()


def test_loading_says_nothing(toy_model):
    """TensorFlow Text tells of a vocabulary without any rule, again and again."""
    code = f"""
        import os, sys
        sys.stderr = None
        from gshard_examples.translation.vocabulary import Vocabulary
        os.dup2(1, 2)
        found = Vocabulary({str(toy_model)!r})
        found.decode(found.encode_target(["apple"]))
    """
    assert run_python(code) == ""
