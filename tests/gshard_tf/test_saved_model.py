"""A model whose state is on the devices is saved for serving as in plain Keras."""

import contextlib
import gc

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

X, Y = parity.data(32)


def dropping():
    """With variables that serving does not use: seeds, slots, metrics."""
    model = keras.Sequential(
        [
            keras.layers.Input([8, 4]),
            parity.Experts(dropout=0.1),
            keras.layers.Dropout(0.2, seed=3),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


@pytest.fixture(scope="module")
def trained():
    return parity.run_on_mesh(dropping, lambda m: m.fit(X, Y, verbose=0))


# Each saves, and returns what loads and asks.


def export(model, path):
    model.export(path, verbose=False)

    def ask(x):
        loaded = tf.saved_model.load(path)
        return loaded.serve(x)

    return ask


def saved_model(model, path):
    tf.saved_model.save(model, path)

    def ask(x):
        loaded = tf.saved_model.load(path)
        [answer] = loaded.signatures["serving_default"](x).values()
        return answer

    return ask


def archive(model, path):
    archive = keras.export.ExportArchive()
    archive.track(model)
    signature = [tf.TensorSpec([None, 8, 4])]
    archive.add_endpoint("answer", lambda x: model(x, training=False), signature)
    archive.write_out(path, verbose=False)

    def ask(x):
        loaded = tf.saved_model.load(path)
        return loaded.answer(x)

    return ask


def checkpoint(model, path):
    saved = tf.train.Checkpoint(model=model).save(path)

    def ask(x):
        plain = parity.run_plain(dropping, lambda m: m).model
        restored = tf.train.Checkpoint(model=plain).restore(saved)
        restored.assert_existing_objects_matched()
        return plain(x, training=False)

    return ask


STEPS = {
    "fit": lambda model: model.fit(X, Y, verbose=0),
    "evaluate": lambda model: model.evaluate(X, Y, verbose=0),
    "predict": lambda model: model.predict(X, verbose=0),
}


@pytest.mark.broad(7)  # each way to save
@pytest.mark.parametrize("in_scope", [False, True], ids=["outside", "in scope"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("save", [export, saved_model, archive, checkpoint])
def test_saved_right_after_a_step(trained, tmp_path, save, step, in_scope):
    model = trained.model
    # Graphs of the test before, while they live, have the host copies kept current.
    gc.collect()
    # So that each case begins with weights that are nowhere but on the devices.
    model.train_on_batch(X, Y)
    STEPS[step](model)
    stale = [v.path for v in model.variables if not v.value._host_is_current]
    assert any("seed" in path for path in stale)
    with trained.strategy.scope() if in_scope else contextlib.nullcontext():
        ask = save(model, str(tmp_path / "saved"))
    answer = ask(tf.constant(X[:5]))
    plain = parity.run_plain(dropping, lambda m: m).model
    plain.set_weights(model.get_weights())
    np.testing.assert_allclose(answer, plain(X[:5], training=False), 1e-4, 1e-5)
