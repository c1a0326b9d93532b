"""Manual regions in programs that jax alone runs, on a mesh of another size."""

import json

import keras
import numpy as np
from parity import relative_difference, strategy_of

import gshard_tf
from gshard_tf import export
from gshard_tf.export import runner
from keras_layers import MultiHeadAttention


def test_a_ring_runs_on_fewer_devices(tmp_path, capsys):
    rules = gshard_tf.AxisRules({"length": "seq"})
    strategy = strategy_of({"seq": 8}, rules=rules)
    with strategy.scope():
        inputs = keras.Input([16, 8])
        attention = MultiHeadAttention(2, 4, context_parallel="ring")
        model = keras.Model(inputs, attention(inputs, causal=True))
    x = np.random.default_rng(0).normal(size=[2, 16, 8]).astype("float32")
    expected = model.predict(x, batch_size=2, verbose=0)
    export.save_state(model, tmp_path / "state.npz")
    program = export.step_program(model, "predict", x)
    program.save(tmp_path / "predict.gshard", [4], initial_state="state.npz")
    export.write_data(tmp_path / "inputs", {"x": x})
    arguments = ["--data", tmp_path / "inputs", "--out", tmp_path / "out"]
    arguments = [tmp_path / "predict.gshard", *arguments, "--devices", "4"]
    assert runner.main([str(each) for each in arguments]) == 0
    loaded = json.loads(capsys.readouterr().out.splitlines()[0])
    assert loaded["mesh"] == {"seq": 4}
    found = np.load(tmp_path / "out" / "output.npy")
    assert relative_difference(found, expected) < 1e-5
