"""What is saved on a mesh is a Keras model like any other."""

import gc
import pathlib

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from processes import run_python
from tensorflow.core.protobuf import saved_model_pb2

X, Y = parity.data(32)
FIT = {"batch_size": 16, "epochs": 2, "verbose": 0, "shuffle": False}
CUSTOM = {"Experts": parity.Experts}


@pytest.fixture(scope="module")
def trained():
    """A model that was trained on the mesh; tests bring it back as they found it."""
    return parity.run_on_mesh(parity.compiled, lambda m: m.fit(X, Y, **FIT))


def test_keras_file_there_and_back(trained, tmp_path):
    trained.model.save(tmp_path / "model.keras")
    plain = keras.models.load_model(tmp_path / "model.keras", CUSTOM)
    parity.assert_same_saved(plain, trained.model)
    np.testing.assert_allclose(
        plain.predict(X, verbose=0), trained.model.predict(X, verbose=0), rtol=1e-4
    )
    # Inside a scope of another mesh, with its optimizer, and going on from there.
    strategy = parity.strategy_of({"data": 4, "model": 2})
    with strategy.scope():
        meshed = keras.models.load_model(tmp_path / "model.keras", CUSTOM)
    parity.assert_same_saved(meshed, trained.model)
    histories = [model.fit(X, Y, **FIT).history for model in (plain, meshed)]
    parity.assert_close(histories[1], histories[0], parity.RTOL, "history")
    parity.assert_same_state(meshed, plain)
    assert strategy.layout(meshed.layers[0].wi).sharding_specs[0] == "data"
    assert len(strategy.programs) == 1


def test_weights_file_there_and_back(trained, tmp_path):
    before = parity.state(trained.model)
    trained.model.save_weights(tmp_path / "w.weights.h5")
    trained.model.train_on_batch(X[:16], Y[:16])
    trained.model.load_weights(tmp_path / "w.weights.h5")
    after = parity.state(trained.model)
    for name in before:
        if "loss" not in name and "total" not in name and "count" not in name:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_set_weights_of_a_plain_model(trained):
    plain = parity.run_plain(parity.compiled, lambda m: m.fit(X, Y, **FIT)).model
    before = trained.model.get_weights()
    trained.model.set_weights([2 * w for w in plain.get_weights()])
    plain.set_weights([2 * w for w in plain.get_weights()])
    parity.assert_close(
        trained.model.predict(X, batch_size=16, verbose=0),
        plain.predict(X, batch_size=16, verbose=0),
        parity.RTOL,
        "predictions",
    )
    trained.model.set_weights(before)


def test_tf_train_checkpoint_there_and_back(trained, tmp_path):
    model = trained.model
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(str(tmp_path / "ckpt"))
    saved = parity.state(model)
    history = model.fit(X, Y, **FIT).history
    moved = parity.state(model)
    assert any(np.abs(moved[name] - saved[name]).max() > 1e-3 for name in saved)
    checkpoint.restore(path).assert_existing_objects_matched()
    for name, value in parity.state(model).items():
        if "experts" in name or "kernel" in name or "iteration" in name:
            np.testing.assert_array_equal(value, saved[name], err_msg=name)
    # Training goes on from what was restored.
    parity.assert_close(model.fit(X, Y, **FIT).history, history, 1e-6, "history")
    checkpoint.restore(path)
    # Into another mesh, and into no mesh.
    for strategy in (parity.strategy_of(2), tf.distribute.get_strategy()):
        with strategy.scope():
            other = parity.compiled()
            other.optimizer.build(other.trainable_variables)
        restored = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
        restored.restore(path).assert_existing_objects_matched()
        for ours, theirs in zip(
            other.optimizer.variables, model.optimizer.variables, strict=True
        ):
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_tf_train_checkpoint_in_scope(trained, tmp_path):
    # In the scope its own counter of saves becomes a variable on the mesh.
    with trained.strategy.scope():
        checkpoint = tf.train.Checkpoint(model=trained.model)
        path = checkpoint.save(str(tmp_path / "ckpt"))
        checkpoint.restore(path).assert_existing_objects_matched()
    assert path.endswith("ckpt-1")
    assert trained.strategy.extended.owns(checkpoint.save_counter)


def test_clone(trained):
    with trained.strategy.scope():
        clone = keras.models.clone_model(trained.model)
    clone.set_weights(trained.model.get_weights())
    np.testing.assert_array_equal(
        clone.predict(X, verbose=0), trained.model.predict(X, verbose=0)
    )


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    trained.model.export(path, verbose=False)
    return path


def test_an_exported_model_needs_only_tensorflow(trained, exported, tmp_path):
    expected = trained.model.predict(X[:5], verbose=0)
    np.savez(tmp_path / "data.npz", x=X[:5], y=expected)
    run_python(
        f"""
        import sys
        import numpy as np
        import tensorflow as tf

        model = tf.saved_model.load({str(exported)!r})
        data = np.load({str(tmp_path / "data.npz")!r})
        x, y = data["x"], data["y"]
        np.testing.assert_allclose(model.serve(x), y, rtol=1e-4, atol=1e-5)
        signature = model.signatures["serving_default"]
        # Any number of examples.
        assert list(signature(tf.constant(x[:2])).values())[0].shape == (2, 3)
        assert "gshard_tf" not in sys.modules
        """
    )


def nodes_of(path):
    """Each function's nodes, by the kind of function; `None` is the main graph."""
    proto = saved_model_pb2.SavedModel.FromString(
        (pathlib.Path(path) / "saved_model.pb").read_bytes()
    )
    [graph] = proto.meta_graphs
    for saved in graph.object_graph_def.nodes:
        assert saved.variable.device == ""
    return [
        node
        for function in graph.graph_def.library.function
        # TensorFlow's own functions that save and restore name the host.
        if "_traced_" not in function.signature.name
        for node in function.node_def
    ]


def test_an_exported_model_names_no_device_and_has_no_annotation(exported):
    nodes = nodes_of(exported)
    assert len(nodes) > 10
    assert {node.op for node in nodes}.isdisjoint(
        {"XlaSharding", "PyFunc", "EagerPyFunc", "PyFuncStateless"}
    )
    assert {node.device for node in nodes} == {""}


def test_training_goes_on_after_an_export(trained, tmp_path):
    model = trained.model
    before = model.get_weights()
    model.export(tmp_path / "again", verbose=False)
    gc.collect()
    assert not any(v.value._has_reader_graphs() for v in model.variables)
    model.fit(X, Y, **FIT)
    # What was exported does not change.
    loaded = tf.saved_model.load(tmp_path / "again")
    after = model.get_weights()
    assert np.abs(after[0] - before[0]).max() > 1e-3
    model.set_weights(before)
    np.testing.assert_allclose(
        loaded.serve(X[:4]), model.predict(X[:4], verbose=0), rtol=1e-4, atol=1e-5
    )
