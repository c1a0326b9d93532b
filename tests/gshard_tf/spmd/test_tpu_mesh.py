"""A mesh of TPU devices: compiled by libtpu, and run on CPU devices in their place."""

import importlib.util

import parity
import pytest
from processes import run_python

import gshard_tf
from gshard_tf.runtime import device_arrays, devices

HAVE_COMPILER = importlib.util.find_spec("libtpu") is not None
X, Y = parity.data(32)


def use(model):
    history = model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    evaluated = model.evaluate(X, Y, batch_size=16, verbose=0)
    return [history.history, evaluated, model.predict(X, batch_size=16, verbose=0)]


def test_fit_on_a_mesh_of_tpu_devices_is_that_of_plain_keras(monkeypatch):
    """The mesh says TPU, and CPU devices stand in."""
    monkeypatch.setattr(
        device_arrays, "mesh_devices", lambda mesh: devices.cpu_devices(mesh.size)
    )
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 8}, "TPU"))
    monkeypatch.setattr(parity, "strategy_of", lambda mesh: strategy)
    parity.assert_equal_runs(parity.compiled, use)
    assert strategy.mesh.device_type() == "TPU" and len(strategy.programs) == 3


# In a process of its own: libtpu stays once it is loaded.
_COMPILE = r"""
import os, sys
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
sys.path.insert(0, {tests!r})
import collections, re, keras, numpy as np, tensorflow as tf
import gshard_tf, parity
from gshard_tf.runtime.core_order import order_cores
from gshard_tf.runtime.device_arrays import Placement
from gshard_tf.runtime.devices import topology_devices
from gshard_tf.spmd.executable import compile_step

gshard_tf.request_cpu_devices(8)
keras.config.set_dtype_policy({policy!r})
x, y = parity.data(32)
strategy = parity.strategy_of(8)


def compiled():
    model = parity.classifier(dropout=0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


with strategy.scope():
    model = compiled()
model.fit(x, y, batch_size=16, verbose=0)
model.evaluate(x, y, batch_size=16, verbose=0)
model.predict(x, batch_size=16, verbose=0)
specs = tf.TensorSpec([16, 8, 4]), tf.TensorSpec([16], tf.int32)
batches = {{"train": specs, "evaluate": specs, "predict": specs[:1]}}


def of(kinds_and_runs):
    counts = collections.Counter()
    for kind, runs in kinds_and_runs:
        counts[kind] += runs
    return dict(sorted(counts.items()))


for topology in {topologies}:
    target = order_cores(topology_devices(topology), [8])
    places = np.array([device.coords for device in target])
    hops = np.abs(places - np.roll(places, -1, axis=0)).sum(axis=1)
    assert set(hops) <= {{0, 1}}, hops  # 0: two cores of a chip
    mesh = gshard_tf.create_mesh({{"expert": len(target)}}, "TPU")
    assert len(target) == 8, topology
    for mode, program in zip(batches, strategy.programs, strict=True):
        if mode not in {modes}:
            continue
        step = program.step  # the one that ran on CPU devices
        found = compile_step(
            strategy.extended.layouts, step, Placement(mesh, target)
        )
        memory = found.compiled.memory_analysis()
        ours = of((c.kind, c.runs) for c in found.collectives())
        got = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        plan = gshard_tf.plan(
            compiled, topology, mesh, batch=batches[mode], mode=mode, cache=False
        )
        theirs = of((c.kind, c.count) for c in plan.communication)
        assert ours == theirs, (topology, mode, ours, theirs)
        planned = plan.memory.arguments, plan.memory.temporaries
        # A plan counts what stays in memory beside the step, slots say.
        assert got[0] == planned[0] if mode == "train" else got[0] < planned[0], got
        assert got[1] == planned[1], (topology, mode, got, planned)
        # What a step is given and gives back, as the runtime will lay it out.
        into, out = found.compiled.input_shardings[0], found.compiled.output_shardings
        wanted = program.compiled.input_shardings[0]
        given = step.inputs + step.captures
        for new, old, value in zip(into, wanted, given, strict=True):
            shape = tuple(value.shape)
            assert new.shard_shape(shape) == old.shard_shape(shape), value
        for i, new in zip(step.updates, out[step.num_outputs :], strict=True):
            old = into[len(step.inputs) + i]
            assert new.is_equivalent_to(old, len(step.captures[i].shape))
        # The types of products, and of weights and slots.
        products = re.findall(
            r"= (\w+)\[\S* (?:convolution|dot)\(", found.compiled.as_text()
        )
        state = {{v.dtype.name for v in step.captures if v.dtype.is_floating}}
        print(topology, mode, ours, got, planned, set(products), state)
"""


def compile_for(*topologies, modes=("train", "evaluate", "predict"), policy="float32"):
    from processes import ROOT

    tests = str(ROOT / "tests")
    code = _COMPILE.format(
        tests=tests, topologies=topologies, modes=modes, policy=policy
    )
    return run_python(code, timeout=600, JAX_PLATFORMS="cpu").splitlines()


@pytest.mark.skipif(not HAVE_COMPILER, reason="needs libtpu: the extra aot")
def test_a_step_that_ran_compiles_for_a_tpu_as_planned():
    [line] = compile_for("v5e:2x4", modes=["train"])
    assert "'all-to-all': 3" in line
    assert "'f32'" in line


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_COMPILER, reason="needs libtpu: the extra aot")
def test_mixed_precision_multiplies_bfloat16_and_keeps_float32():
    lines = compile_for("v6e:2x4", policy="mixed_bfloat16")
    assert "'all-to-all': 3" in lines[0]
    assert all(line.endswith("{'bf16'} {'float32'}") for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_COMPILER, reason="needs libtpu: the extra aot")
def test_the_steps_that_ran_compile_for_a_tpu_as_planned():
    lines = compile_for("v5e:2x4")
    assert len(lines) == 3
    assert "'all-to-all': 3" in lines[0] and "'all-to-all': 2" in lines[2]


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_COMPILER, reason="needs libtpu: the extra aot")
def test_the_steps_that_ran_compile_for_other_tpus_as_planned():
    topologies = "v6e:2x4", "v4:2x2x2", "v5p:2x2x2", "tpu7x:2x2x1"
    lines = compile_for(*topologies)
    assert len(lines) == 3 * len(topologies)
    assert all("'all-to-all': 3" in line for line in lines[::3])


def test_tensorflow_for_tpus_is_refused(monkeypatch):
    from gshard_tf.compat import versions

    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: "2.20.0")
    with pytest.raises(ImportError, match="pip uninstall tensorflow-tpu libtpu; pip"):
        devices.mesh_devices(gshard_tf.create_mesh({"x": 1}, "TPU"))


def test_without_a_plugin_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]'.*Received: "):
        devices.mesh_devices(gshard_tf.create_mesh({"x": 1}, "TPU"))
    with pytest.raises(ValueError, match=r"pip install 'jax\[cuda12\]' or 'jax\[cuda"):
        devices.mesh_devices(gshard_tf.create_mesh({"x": 1}, "GPU"))


def test_another_number_than_the_runtimes_is_refused(monkeypatch):
    """On a pod, the TPU itself numbers the processes."""
    from gshard_tf.runtime.process_group import ProcessGroup

    monkeypatch.setattr(devices, "group", lambda: ProcessGroup(1, 2))
    with pytest.raises(ValueError, match="process_id=1, and the runtime's number is 0"):
        devices.mesh_devices(gshard_tf.create_mesh({"x": 8}))
