"""The SavedModel's signatures, and what TensorFlow Serving expects of it."""

import numpy as np
import pytest
import tensorflow as tf

from gshard_examples.translation import cli, export
from gshard_examples.translation.model import make_model
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.translator import CHUNK, Translator
from gshard_examples.translation.vocabulary import BOS, EOS, PAD
from keras_layers import beam_search, length_limits

TEXTS = ["appleo basketo candleo", "", "x " * 25_000, "gardenen hammeren", "мир"]
TAGS = ["fr", "de", "ru", "de", "ru"]
OPTIONS = {"max_source": 24, "max_target": 12, "beam_size": 3}


@pytest.fixture(scope="module")
def model(toy_vocabulary):
    """Untrained, but not evenly so: some translations end, some do not."""
    settings = Settings(
        encoder_layers=2,
        decoder_layers=1,
        model_dim=32,
        hidden_dim=48,
        heads=2,
        experts=4,
        capacity_factor=0.5,
        partitions=0,
    )
    made = make_model(settings, toy_vocabulary)
    table = made.target_embedding.table
    table.assign(tf.tensor_scatter_nd_update(table, [[EOS]], [table[EOS] * 4.0]))
    return made


@pytest.fixture(scope="module")
def translator(model, toy_vocabulary):
    return Translator(model, toy_vocabulary, **OPTIONS)


@pytest.fixture(scope="module")
def saved(translator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exporting") / "saved_model"
    return export.export(translator, folder)


@pytest.fixture(scope="module")
def signatures(saved):
    loaded = tf.saved_model.load(str(saved))
    return loaded, loaded.signatures


def ask(signatures, name, **inputs):
    strings = {key: tf.constant(value, tf.string) for key, value in inputs.items()}
    return {key: v.numpy() for key, v in signatures[1][name](**strings).items()}


def read_sources(vocabulary, texts, tags):
    ids = vocabulary.encode_source(tags, texts, max_length=OPTIONS["max_source"])
    return tf.cast(ids.to_tensor(PAD), tf.int32)


def test_translate_is_beam_search_between_two_tokenizers(
    signatures, model, toy_vocabulary
):
    found = ask(signatures, "translate", texts=TEXTS, languages=TAGS)
    source = read_sources(toy_vocabulary, TEXTS, TAGS)
    expected = beam_search(
        model,
        source,
        OPTIONS["max_target"],
        BOS,
        EOS,
        OPTIONS["beam_size"],
        num_results=3,
        limits=length_limits(source, PAD, 2.0, 10),
    )
    for i in range(3):
        texts = toy_vocabulary.decode(expected.ids[:, i]).numpy()
        texts[1] = b""  # there is nothing to translate
        assert list(found["n_best"][:, i]) == list(texts)
    np.testing.assert_array_equal(found["translations"], found["n_best"][:, 0])
    np.testing.assert_allclose(found["n_best_scores"], expected.scores, atol=1e-4)
    np.testing.assert_array_equal(found["scores"], found["n_best_scores"][:, 0])
    np.testing.assert_array_equal(found["truncated"], [0, 0, 1, 0, 0])
    ended = np.any(expected.ids[:, 0] == EOS, axis=1)
    np.testing.assert_array_equal(found["unfinished"], ~ended)


def test_a_row_is_the_same_in_any_batch(signatures):
    # More than are decoded at a time.
    count = CHUNK + 7
    texts, tags = (TEXTS[:1] * count), (TAGS[:1] * count)
    texts[-1], tags[-1] = TEXTS[3], TAGS[3]
    found = ask(signatures, "translate", texts=texts, languages=tags)
    for i in (0, count - 1):
        alone = ask(
            signatures, "translate", texts=texts[i : i + 1], languages=tags[i : i + 1]
        )
        assert alone["translations"][0] == found["translations"][i]
        np.testing.assert_allclose(alone["scores"][0], found["scores"][i], atol=1e-4)


def test_score_sums_the_log_probabilities_of_the_tokens(
    signatures, model, toy_vocabulary
):
    said = ["Apple basket", "", "Candle", "the end", "x"]
    found = ask(signatures, "score", texts=TEXTS, languages=TAGS, translations=said)
    source = read_sources(toy_vocabulary, TEXTS, TAGS)
    for i, target in enumerate(toy_vocabulary.encode_target(said).to_list()):
        # One by one, so without any padding.
        row = source[i : i + 1, : np.count_nonzero(source[i])]
        logits = model((row, tf.constant([target[:-1]])), decoding=True)[0]
        each = tf.nn.log_softmax(logits).numpy()[range(len(target) - 1), target[1:]]
        np.testing.assert_allclose(found["log_probs"][i], each.sum(), rtol=1e-4)
        assert found["tokens"][i] == len(target) - 1
    penalty = ((5 + found["tokens"]) / 6) ** 0.8
    np.testing.assert_allclose(found["scores"], found["log_probs"] / penalty, rtol=1e-5)
    np.testing.assert_array_equal(found["truncated"], [0, 0, 1, 0, 0])
    long = ask(
        signatures, "score", texts=["a"], languages=["de"], translations=["y " * 99]
    )
    assert long["truncated"][0] and long["tokens"][0] == OPTIONS["max_target"]


def test_tokenize_and_encode(signatures, model, toy_vocabulary):
    source = read_sources(toy_vocabulary, TEXTS, TAGS)
    found = ask(signatures, "tokenize", texts=TEXTS, languages=TAGS)
    np.testing.assert_array_equal(found["ids"], source)
    np.testing.assert_array_equal(found["lengths"], np.count_nonzero(source, axis=1))
    np.testing.assert_array_equal(found["truncated"], [0, 0, 1, 0, 0])
    encoded, mask = model.encode(source, decoding=True)
    found = ask(signatures, "encode", texts=TEXTS, languages=TAGS)
    np.testing.assert_allclose(found["encoded"], encoded, atol=1e-5)
    np.testing.assert_array_equal(found["mask"], mask)
    languages = ask(signatures, "languages")["languages"]
    assert [tag.decode() for tag in languages] == list(toy_vocabulary.languages)


def test_exactly_as_long_as_fits_is_not_truncated(signatures, toy_vocabulary):
    for words in range(1, 30):
        text = "apple " * words
        whole = toy_vocabulary.encode_source(["de"], [text]).row_lengths()[0]
        found = ask(signatures, "tokenize", texts=[text], languages=["de"])
        assert found["truncated"][0] == (whole > OPTIONS["max_source"])


@pytest.mark.parametrize("name", ["translate", "encode", "score", "tokenize"])
def test_bad_requests_are_refused_with_a_sentence(signatures, name):
    def request(texts, tags):
        more = {"translations": texts} if name == "score" else {}
        return ask(signatures, name, texts=texts, languages=tags, **more)

    assert all(len(value) == 0 for value in request([], []).values())
    with pytest.raises(tf.errors.InvalidArgumentError, match="unknown language tag"):
        request(["a"], ["nowhere"])
    with pytest.raises(tf.errors.InvalidArgumentError, match="one language tag"):
        request(["a", "b"], ["de"])
    request([b"\xff\xfe abc", "a" * 1_000_000], ["de", "de"])
    with pytest.raises(tf.errors.InvalidArgumentError, match="one translation"):
        ask(signatures, "score", texts=["a"], languages=["de"], translations=[])
    with pytest.raises(Exception, match="dtype|type|int32"):
        signatures[1][name](texts=tf.constant([1]), languages=tf.constant(["de"]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shorter_weights(dtype, model, toy_vocabulary, signatures, saved, tmp_path):
    short = Translator(model, toy_vocabulary, weights=dtype, **OPTIONS)
    folder = export.export(short, tmp_path / "short")

    def weight_bytes(path):
        files = (path / "variables").glob("*.data*")
        return sum(file.stat().st_size for file in files)

    assert weight_bytes(folder) < 0.6 * weight_bytes(saved)
    loaded = tf.saved_model.load(str(folder))
    both = {"texts": TEXTS[:1], "languages": TAGS[:1]}
    whole = ask(signatures, "encode", **both)["encoded"]
    found = ask((loaded, loaded.signatures), "encode", **both)["encoded"]
    assert 1e-6 < np.max(np.abs(found - whole)) < 0.1
    # What was exported is what the translator says in Python.
    said = ask((loaded, loaded.signatures), "translate", **both)["translations"]
    assert [text.decode() for text in said] == short.translate(TAGS[:1], TEXTS[:1])
    with pytest.raises(ValueError, match="weights='int4'"):
        Translator(model, toy_vocabulary, weights="int4")


@pytest.mark.slow
def test_the_requests_to_warm_up_with(translator, saved, tmp_path):
    """TFRecords of official messages, which the signatures take as they are."""
    pytest.importorskip("tensorflow_serving")
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    folder = export.export(translator, tmp_path / "warm", warm_up_as="translator")
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    export.check_export(folder, replace=True)  # nothing in it but what is ours
    loaded = tf.saved_model.load(str(folder))
    seen = set()
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record)
        request = log.predict_log.request
        assert request.model_spec.name == "translator"
        signature = loaded.signatures[request.model_spec.signature_name]
        wanted = signature.structured_input_signature[1]
        assert set(request.inputs) == set(wanted)
        inputs = {
            key: tf.constant(tf.make_ndarray(value))
            for key, value in request.inputs.items()
        }
        for key, value in inputs.items():
            assert wanted[key].is_compatible_with(value)
        if (request.model_spec.signature_name, len(value)) not in seen:
            response = predict_pb2.PredictResponse()
            for key, value in signature(**inputs).items():
                response.outputs[key].CopyFrom(tf.make_tensor_proto(value.numpy()))
            assert len(response.SerializeToString()) > 0
        seen.add((request.model_spec.signature_name, len(value)))
    assert {name for name, _ in seen} == {
        "translate",
        "serving_default",
        "encode",
        "score",
        "tokenize",
    }
    assert not (saved / "assets.extra" / "tf_serving_warmup_requests").exists()


def test_without_the_package_it_says_what_to_install(translator, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_serving.apis", None)
    with pytest.raises(ImportError, match=r"gshard-tf\[serve\]"):
        export.export(translator, tmp_path / "x", warm_up_as="translator")
    assert not (tmp_path / "x").exists()


def test_an_export_replaces_an_export(saved):
    assert export.check_export(saved, replace=True) == saved
    with pytest.raises(FileExistsError, match="exists already"):
        export.check_export(saved)


@pytest.mark.parametrize("thesis", ["thesis.tex", "variables/thesis.tex", None])
def test_an_export_replaces_nothing_else(translator, tmp_path, monkeypatch, thesis):
    folder = tmp_path / "mine"
    (folder / "variables").mkdir(parents=True)
    if thesis is not None:
        (folder / "saved_model.pb").write_text("")
        (folder / thesis).write_text("years of work")
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(tf.saved_model, "save", None)  # no work is done
    with pytest.raises(FileExistsError, match=str(folder)):
        export.export(translator, folder, replace=True)
    assert sorted(folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("command", ["export", "run"])
def test_the_command_asks_first(tmp_path, monkeypatch, capsys, command):
    """Before the corpus is made, the model trained or loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "r").mkdir()
    Settings().write(tmp_path / "r")
    before = sorted(tmp_path.rglob("*"))
    for folder, said in (("mine", "thesis.tex"), (".", "working folder")):
        assert cli.main([command, "--run", "r", "--saved-model", folder]) == 2
        assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
