"""A step saved by Keras on a mesh and run by jax alone, beside `fit` itself."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from parity import relative_difference, strategy_of
from processes import PYTHONPATH, run_python

import gshard_tf
from gshard_tf import export
from gshard_tf.export import runner
from gshard_tf.export.exporter import halvings
from keras_layers import Dropout, MoELayer, TokenEmbedding

MODES = ("train", "evaluate", "predict")
BATCH, LENGTH, VOCABULARY, EPOCHS = 16, 8, 30, 10
RTOL = 1e-5
HAVE_COMPILER = importlib.util.find_spec("libtpu") is not None

# No TensorFlow and no Keras can be imported, and none was.
ALONE = """
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = None
from gshard_tf.export.runner import main
status = main(sys.argv[1:])
assert not [m for m in sys.modules if m.startswith(("tensorflow.", "keras."))]
sys.exit(status)
"""


def run_here(capsys, *arguments, status=0):
    """Runs the runner in this process, which is quicker; returns what it says."""
    capsys.readouterr()
    assert runner.main([str(argument) for argument in arguments]) == status
    said = capsys.readouterr()
    if status:
        return said.err
    return [json.loads(line) for line in said.out.splitlines()]


def run(*arguments, timeout=240):
    """Runs the runner where there is no TensorFlow; returns its lines."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(event, lines):
    return [line for line in lines if line["event"] == event]


def data():
    """160 rows: ten batches. Each token says what it is to be; some do not count."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, VOCABULARY, (10 * BATCH, LENGTH))
    weight = rng.integers(0, 3, x.shape).astype("float32")
    return x.astype("int32"), ((7 * x + 1) % VOCABULARY).astype("int32"), weight


def make():
    """A mixture of experts with random routing, dropout and metrics of its own."""
    ids = keras.Input([LENGTH], dtype="int32")
    x = TokenEmbedding(VOCABULARY, 16)(ids)  # of a dense gradient in plain Keras too
    normal = keras.layers.LayerNormalization()(x)
    x = x + Dropout(0.1, seed=2)(MoELayer(8, 32, seed=1, name="moe")(normal))
    model = keras.Model(ids, keras.layers.Dense(VOCABULARY)(x), name="small")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


def made(partitions):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    strategy = strategy_of(partitions)
    with strategy.scope():
        return strategy, make()


class Saved:
    """Programs, state and data in a folder, and the model that they were saved from."""

    def __init__(self, folder, partitions):
        self.folder = folder
        self.x, self.y, self.weight = data()
        self.strategy, self.model = made(partitions)
        batch = (self.x[:BATCH], self.y[:BATCH], self.weight[:BATCH])
        export.save_state(self.model_built(batch), folder / "start.npz")
        for mode in MODES if partitions > 1 else MODES[:2]:
            program = export.step_program(
                self.model, mode, batch[:1] if mode == "predict" else batch
            )
            # The step for training on another mesh too.
            meshes = [2] if mode == "train" and partitions > 1 else [partitions]
            program.save(self.program(mode), meshes, initial_state="start.npz")
        arrays = export.batch_arrays((self.x, self.y, self.weight))
        export.write_data(
            folder / "data", {name: a.astype("uint8") for name, a in arrays.items()}
        )
        export.write_data(folder / "inputs", {"x": self.x})

    def model_built(self, batch):
        export.step_program(self.model, "train", batch)
        return self.model

    def program(self, mode):
        return self.folder / f"{mode}.gshard"


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 8])
def saved(request, tmp_path_factory):
    """The same for one and for eight partitions, trained by both for 100 steps."""
    folder = tmp_path_factory.mktemp(f"export{request.param}")
    it = Saved(folder, request.param)
    it.partitions = request.param
    it.lines = run(
        it.program("train"),
        *("--data", folder / "data", "--out", folder / "run", "--steps", 10 * EPOCHS),
        *("--devices", request.param),
        *("--evaluate", it.program("evaluate"), folder / "data"),
    )
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    it.history = it.model.fit(
        it.x, it.y, sample_weight=it.weight, epochs=EPOCHS, **options
    ).history
    it.evaluation = it.model.evaluate(
        it.x,
        it.y,
        sample_weight=it.weight,
        verbose=0,
        return_dict=True,
        batch_size=BATCH,
    )
    return it


def test_a_hundred_steps_are_those_of_fit(saved):
    lines = of("train", saved.lines)
    assert [line["step"] for line in lines] == list(range(10, 110, 10))
    for name, values in saved.history.items():
        ran = [line[name] for line in lines]
        np.testing.assert_allclose(ran, values, rtol=RTOL, err_msg=name)
    assert saved.history["loss"][-1] < 0.5 * saved.history["loss"][0]


def test_state_and_evaluation_are_those_of_fit(saved):
    export.save_state(saved.model, saved.folder / "fit.npz")
    theirs, _ = export.read_state(saved.folder / "fit.npz")
    ours, meta = export.read_state(saved.folder / "run" / "state.npz")
    assert meta == {"step": 10 * EPOCHS}
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if not name.startswith("metrics/"):
            assert relative_difference(ours[name], value) <= RTOL, name
    [evaluated] = of("evaluate", saved.lines)
    for name, value in saved.evaluation.items():
        np.testing.assert_allclose(evaluated[name], value, rtol=RTOL, err_msg=name)


on_eight = pytest.mark.parametrize("saved", [8], indirect=True)


@on_eight
def test_back_into_keras_it_evaluates_identically(saved):
    """Into another model of the same code, which has not run a step."""
    [evaluated] = of("evaluate", saved.lines)
    _, model = made(saved.partitions)
    meta = export.load_state(model, saved.folder / "run" / "state.npz")
    assert meta["step"] == 10 * EPOCHS
    options = {"batch_size": BATCH, "verbose": 0, "return_dict": True}
    again = model.evaluate(saved.x, saved.y, sample_weight=saved.weight, **options)
    for name in ("loss", "accuracy"):
        assert again[name] == evaluated[name], name
    for name, value in again.items():  # entropies are compiled otherwise here
        np.testing.assert_allclose(evaluated[name], value, rtol=1e-6, err_msg=name)


@on_eight
def test_plain_keras_learns_the_same(saved):
    """The oracle knows nothing of programs: Keras without a mesh."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    plain = make()
    plain.jit_compile = False
    history = plain.fit(
        saved.x,
        saved.y,
        sample_weight=saved.weight,
        batch_size=BATCH,
        epochs=2,
        shuffle=False,
        verbose=0,
    ).history
    ran = [line["loss"] for line in of("train", saved.lines)[:2]]
    np.testing.assert_allclose(ran, history["loss"], rtol=RTOL)


@on_eight
def test_another_number_of_devices(saved):
    """The same file, saved by eight, in this process, beside the runner's numbers."""
    program = export.load(saved.program("train"), 2)
    assert program.mesh == {"expert": 2}
    arrays, _ = export.read_state(saved.folder / "start.npz")
    state = program.put_state(arrays)
    batches = export.ArrayBatches(saved.folder / "data", program.manifest.inputs)
    for number in range(10):
        outputs, state = program(batches.batch(number), state)
    ran = of("train", saved.lines)[0]
    np.testing.assert_allclose(outputs["loss"], ran["loss"], rtol=RTOL)
    [experts] = [
        t.name for t in program.manifest.state if t.name.endswith("experts/wi")
    ]
    [piece] = {shard.data.shape for shard in state[experts].addressable_shards}
    assert piece[0] == 8 // 2


@on_eight
def test_what_is_carried_is_small_and_says_what_it_is(saved):
    for mode in MODES:
        assert saved.program(mode).stat().st_size < 1 << 20, mode
    manifest = export.read_manifest(saved.program("train"))
    assert [variant.mesh["expert"] for variant in manifest.variants] == [8, 2]
    assert manifest.initial_state == "start.npz"
    assert manifest.mode == "train" and manifest.model == "small"
    inputs = [(t.name, t.shape, t.dtype, t.layout) for t in manifest.inputs]
    shape, layout = (BATCH, LENGTH), ("expert", None)
    kinds = {"x": "int32", "y": "int32", "sample_weight": "float32"}
    assert inputs == [(name, shape, kind, layout) for name, kind in kinds.items()]
    assert {t.name for t in manifest.outputs} >= {"loss", "accuracy", "moe_dropped"}
    by_path = {tensor.path: tensor for tensor in manifest.state}
    assert len(by_path) == len(manifest.state)
    for variable in saved.model.trainable_variables:
        tensor = by_path[variable.path]
        assert (tensor.role, tensor.shape) == ("weight", tuple(variable.shape))
        layout = saved.strategy.layout(variable).sharding_specs
        assert tensor.layout == tuple(None if s == "unsharded" else s for s in layout)
    for variable in saved.model.optimizer.variables:
        if variable.path in by_path:
            assert by_path[variable.path].role == "optimizer"
    metrics = {variable.path for variable in saved.model.metrics_variables}
    assert metrics >= {t.path for t in manifest.state if t.role == "metric"} != set()
    assert {t.role for t in manifest.state} >= {"weight", "optimizer", "metric"}


@on_eight
def test_stopping_and_going_on_is_not_stopping(saved, tmp_path, capsys):
    arguments = (saved.program("train"), "--data", saved.folder / "data")
    arguments += ("--out", tmp_path / "run", "--devices", 2, "--shuffle", 5)
    run_here(capsys, *arguments, "--steps", 7, "--log-every", 4)
    lines = run_here(capsys, *arguments, "--steps", 12, "--log-every", 4)
    arguments = [tmp_path / "whole" if a == tmp_path / "run" else a for a in arguments]
    whole = run_here(capsys, *arguments, "--steps", 12, "--log-every", 4)
    # Given once more it has nothing to do.
    assert [x["event"] for x in run_here(capsys, *arguments, "--steps", 12)] == ["end"]
    for step, line in zip((8, 12), of("train", lines), strict=True):
        assert line["step"] == step
        expected = of("train", whole)[step // 4 - 1]
        assert line["loss"] == expected["loss"], "means include steps before the stop"
    ours, meta = export.read_state(tmp_path / "run" / "state.npz")
    theirs, _ = export.read_state(tmp_path / "whole" / "state.npz")
    assert meta == {"step": 12}
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if '"end"' in line] == [7, 12]


@on_eight
def test_time_limit_and_signal_save_what_is_done(saved, tmp_path, capsys):
    arguments = (saved.program("train"), "--data", saved.folder / "data")
    arguments += ("--devices", 2)
    lines = run_here(capsys, *arguments, "--out", tmp_path / "a", "--time-limit", 0.001)
    assert lines[-1]["reason"] == "time" and lines[-1]["step"] == 0
    assert export.read_state(tmp_path / "a" / "state.npz")[1] == {"step": 0}

    command = [sys.executable, "-c", ALONE, *arguments, "--out", tmp_path / "b"]
    process = subprocess.Popen(
        [*map(str, command), "--steps", "1000000"],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if json.loads(line)["event"] == "train":
            process.terminate()
            break
    rest = [json.loads(line) for line in process.stdout]
    assert process.wait(60) == os.EX_TEMPFAIL
    said = f"SIGTERM: the run is saved at step {rest[-1]['step']}. Give the same"
    assert said in process.stderr.read()
    assert rest[-1]["reason"] == "SIGTERM" and rest[-1]["step"] >= 10
    _, meta = export.read_state(tmp_path / "b" / "state.npz")
    assert meta == {"step": rest[-1]["step"]}


@on_eight
def test_evaluating_and_predicting_alone(saved, tmp_path, capsys):
    state = ("--state", saved.folder / "run" / "state.npz")
    arguments = (saved.program("evaluate"), "--data", saved.folder / "data", *state)
    [line] = of("evaluate", run_here(capsys, *arguments))
    [evaluated] = of("evaluate", saved.lines)
    assert line["loss"] == evaluated["loss"] and line["step"] == 10 * EPOCHS
    arguments = (saved.program("predict"), "--data", saved.folder / "inputs", *state)
    run_here(capsys, *arguments, "--out", tmp_path)
    predicted = np.load(tmp_path / "output.npy")
    theirs = saved.model.predict(saved.x, batch_size=BATCH, verbose=0)
    assert relative_difference(predicted, theirs) <= RTOL


@on_eight
def test_what_the_runner_refuses(saved, tmp_path, capsys):
    train, data = saved.program("train"), ("--data", saved.folder / "data")
    start, steps = ("--out", tmp_path), ("--steps", 1)

    def refused(*arguments):
        return run_here(capsys, train, *data, *arguments, status=2)

    assert "Training needs an end" in refused(*start)
    assert "a folder for its state" in refused(*steps)
    said = refused(*start, *steps, "--devices", 3)
    assert "programs for the meshes {'expert': 8}, {'expert': 2}" in said
    path = saved.folder / "other.npz"
    export.write_state(path, {"model/x": np.zeros(1)}, step=0)
    said = refused(*start, *steps, "--devices", 2, "--state", path)
    assert "The program's state has" in said and "Received: nothing" in said
    handler = signal.getsignal(signal.SIGTERM)
    assert handler is signal.SIG_DFL, "the runner gives the signals back"


@on_eight
def test_what_cannot_be_saved_or_put_back(saved):
    batch = (saved.x[:BATCH], saved.y[:BATCH], saved.weight[:BATCH])
    with pytest.raises(ValueError, match="`mode` must be one of"):
        export.step_program(saved.model, "learn", batch)
    with pytest.raises(ValueError, match="needs the batch"):
        export.step_program(saved.model, "train")
    with pytest.raises(ValueError, match="must be made, and compiled, inside"):
        export.step_program(make(), "train", batch)
    program = export.step_program(saved.model, "predict", batch[:1])
    with pytest.raises(ValueError, match="axes of the strategy's, \\['expert'\\]"):
        program.save(saved.folder / "none", meshes=[{"data": 2}])
    before = saved.model.get_weights()
    arrays, _ = export.read_state(saved.folder / "start.npz")
    name = next(name for name in arrays if name.endswith("wi"))
    arrays[name] = arrays[name][:4]
    export.write_state(saved.folder / "short.npz", arrays)
    with pytest.raises(ValueError, match="has shape"):
        export.load_state(saved.model, saved.folder / "short.npz")
    for old, new in zip(before, saved.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@on_eight
@pytest.mark.skipif(not HAVE_COMPILER, reason="needs libtpu: the extra aot")
def test_the_same_file_compiles_for_tpus(saved):
    """In a process of its own, and without TensorFlow there as well."""
    printed = run_python(
        f"""
        import sys
        sys.modules["tensorflow"] = sys.modules["keras"] = None
        from gshard_tf import export
        from gshard_tf.runtime.devices import topology_devices
        program = export.load(
            {str(saved.program("train"))!r}, 8, topology_devices("v5e:2x4")
        )
        print(program.compiled.as_text().count(" all-to-all("), program.device_kind)
        """,
        loaded=False,
    )
    assert printed.split()[0] == "4" and "TPU" in printed


def test_by_default_a_file_is_for_every_halving_of_the_mesh():
    assert halvings(gshard_tf.create_mesh({"expert": 8})) == [
        {"expert": 8},
        {"expert": 4},
        {"expert": 2},
        {"expert": 1},
    ]
    sizes = [
        list(m.values()) for m in halvings(gshard_tf.create_mesh({"a": 6, "b": 2}))
    ]
    assert sizes == [[6, 2], [3, 2], [1, 2], [1, 1]]


def test_a_program_returns_numbers_and_no_strings(tmp_path):
    class Logs(keras.Sequential):
        def train_step(self, data):
            return {**super().train_step(data), "two": 2.0, "text": "abc", "none": None}

    strategy = strategy_of(2)
    with strategy.scope():
        model = Logs([keras.layers.Input([4]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    x = np.ones([4, 4], "float32")
    program = export.step_program(model, "train", (x, x[:, :1]))
    manifest = program.save(tmp_path / "train.gshard")
    assert [t.name for t in manifest.outputs] == ["loss", "two"]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_platform_that_is_not_here_is_said(platform):
    code = f"""
        import os
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # or it asks a cloud, for minutes
        from gshard_tf.export import runner
        options = ["p.gshard", "--data", "d", "--devices", "1", "--platform"]
        options = runner.parser().parse_args([*options, {platform!r}])
        try:
            runner._start_jax(options, None)
        except ValueError as error:
            print(error)
    """
    said = run_python(code, loaded=False)
    assert f"jax finds no devices of {platform} here. Take another" in said
