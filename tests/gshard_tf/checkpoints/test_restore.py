"""Restoring elsewhere: other meshes, plain Keras, from dense into experts."""

import checkpoint_runs as runs
import keras
import numpy as np
import parity
import pytest

import gshard_tf
import keras_layers
from gshard_tf.runtime.device_arrays import addressable_shards
from gshard_tf.sharding.regions import cut


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained model of a 4 x 2 mesh, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    made = runs.scoped({"data": 4, "model": 2})
    made.fit(*parity.data(16), batch_size=16, verbose=0)
    checkpoints = gshard_tf.CheckpointManager(folder, asynchronous=False)
    checkpoints.save(gshard_tf.training_state(made), 1)
    return made, folder


@pytest.mark.parametrize("mesh", [8, {"data": 2, "model": 2}, 3, None], ids=str)
def test_onto_another_mesh(saved, mesh):
    made, folder = saved
    other = runs.scoped(mesh)
    gshard_tf.CheckpointManager(folder).restore(gshard_tf.training_state(other))
    if mesh == 8:
        # Each device has its own part, and nothing has passed through the host.
        value = other.layers[0].wi.value
        assert not value._host_is_current
        expected = made.layers[0].wi.numpy()
        for region, piece in addressable_shards(value.device_copy):
            assert piece.shape[0] == 1
            np.testing.assert_array_equal(piece, cut(expected, region))
    runs.assert_same_bits(other, made)


def test_weights_alone(saved):
    made, folder = saved
    plain = parity.classifier(dropout=0.3)
    found = gshard_tf.CheckpointManager(folder).restore(
        gshard_tf.training_state(plain), extra=["optimizer/.*"]
    )
    assert all(n.startswith(("optimizer", "metrics")) for n in found.match.extra)
    for ours, theirs in zip(plain.weights, made.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_upcycling_a_dense_checkpoint(tmp_path):
    def network(layer):
        x = inputs = keras.Input((6, 8))
        x = x + layer(x)
        return keras.Model(inputs, keras.layers.Dense(2)(x))

    dense = network(keras_layers.FeedForward(16))
    checkpoints = gshard_tf.CheckpointManager(tmp_path, asynchronous=False)
    checkpoints.save(gshard_tf.training_state(dense), 1)

    def mixture():
        keras.utils.set_random_seed(1)
        return network(keras_layers.MoELayer(num_experts=4, hidden_dim=16))

    expected = mixture()
    # The other way there is, from a model in memory.
    keras_layers.upcycle(dense.layers[1], expected.layers[1])
    expected.layers[-1].set_weights(dense.layers[-1].get_weights())
    with parity.strategy_of(4).scope():
        meshed = mixture()
    found = checkpoints.restore(
        gshard_tf.training_state(meshed),
        rename=[(r"model/mo_e_layer/.*/(wi|wo)", r"model/feed_forward/\1")],
        missing=[".*router.*", ".*seed.*"],
    )
    assert len(found.match.repeated) == 2
    assert any("router" in name for name in found.match.missing)
    for ours, theirs in zip(meshed.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=ours.path)


def test_a_run_of_another_configuration(tmp_path):
    runs.run(tmp_path, mesh=2, stop_after=5, save_every=2, config={"rate": 1})
    with pytest.raises(ValueError, match="`config` must be"):
        runs.run(tmp_path, mesh=2, config={"rate": 2})
    with pytest.raises(ValueError, match="resume=False"):
        runs.run(tmp_path, mesh=2, resume=False)


def test_what_a_model_does_not_know_of(tmp_path):
    class Counting(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            return self.dense(keras.ops.reshape(x, (-1, 32)))

        def train_step(self, data):
            steps.assign_add(1)
            return super().train_step(data)

    with parity.strategy_of(2).scope():
        steps = keras.Variable(0, dtype="int32", name="steps")
        made = Counting()
        made.compile(
            "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
    x, y = parity.data(16)
    saver = gshard_tf.CheckpointCallback(tmp_path)
    made.build((None, 8, 4))
    with pytest.raises(ValueError, match="does not know of.*steps"):
        made.fit(x, y, batch_size=16, verbose=0, callbacks=[saver])
    saver.manager.close()
    saver = gshard_tf.CheckpointCallback(tmp_path, extra_state={"steps": steps})
    made.fit(x, y, batch_size=16, verbose=0, callbacks=[saver])
    assert "extra/steps" in saver.manager.manifest(1).arrays
