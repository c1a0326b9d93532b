"""No step waits for the one before it, and what nobody reads is not brought back.

Stand-ins for results on the devices let nobody read them before a certain step has
started: where a step waited for another, the test would wait until it fails.
"""

import os
import threading
import time

import numpy as np
import parity
import pytest
import tensorflow as tf

from gshard_tf.runtime.operation_threads import has_two_threads
from gshard_tf.spmd.executable import StartedStep
from gshard_tf.spmd.loop_results import LoopResults
from gshard_tf.spmd.program import SpmdProgram

X, Y = parity.data(36)


class Result:
    """A result on the devices that is there once `last` is the latest step."""

    reads = 0

    def __init__(self, value, started, last):
        self.value, self.started, self.last = value, started, last
        self.shape, self.dtype = value.shape, value.dtype

    def is_ready(self):
        return len(self.started) >= self.last

    def __array__(self, dtype=None, copy=None):
        end = time.monotonic() + 20
        while not self.is_ready():
            assert time.monotonic() < end, "a step waits for the results of another"
            time.sleep(0.001)
        Result.reads += 1
        return np.asarray(self.value)


@pytest.fixture
def started(monkeypatch):
    """The steps that have started; call it with the last ones of all executions."""
    steps, lasts = [], []
    run = SpmdProgram.__call__

    def stand_in(self, inputs, captures):
        outputs, updated = run(self, inputs, captures)
        steps.append(self)
        last = next((n for n in lasts if n >= len(steps)), None)
        if last is not None:
            outputs = [Result(output, steps, last) for output in outputs]
        return outputs, updated

    monkeypatch.setattr(SpmdProgram, "__call__", stand_in)
    Result.reads = 0

    def expect(*last_steps):
        lasts[:] = last_steps
        steps.clear()
        return steps

    return expect


FIT = {"batch_size": 4, "shuffle": False, "verbose": 0}


def test_the_steps_of_an_execution_do_not_wait_for_each_other(started):
    """9 steps as 4 + 4 + 1: the last is not a full execution."""
    steps = started(4, 8, 9)

    def use(model):
        return model.fit(X, Y, **FIT).history

    plain = parity.run_plain(parity.compiled, use)
    meshed = parity.run_on_mesh(
        lambda: parity.compiled(steps_per_execution=4), use, mesh=2
    )
    assert len(steps) == 9
    # The loss and the accuracy, once an execution.
    assert Result.reads == 2 * 3
    parity.assert_close(meshed.result, plain.result, parity.RTOL, "history")
    parity.assert_same_state(meshed.model, plain.model)

    steps = started(4, 8, 9)
    Result.reads = 0
    evaluated = meshed.model.evaluate(X, Y, batch_size=4, verbose=0)
    assert (len(steps), Result.reads) == (9, 2 * 3)
    expected = plain.model.evaluate(X, Y, batch_size=4, verbose=0)
    parity.assert_close(evaluated, expected, parity.RTOL, "evaluated")


def test_one_thread_of_tensorflow_overlaps_nothing(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4}, raising=False)
    assert has_two_threads()
    # A container of one processor, on a machine of eight.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert not has_two_threads()
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "2")
    assert has_two_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "1")
    assert not has_two_threads()


def test_a_step_without_results_waits_for_nothing(monkeypatch):
    def refuse(self, values):
        raise AssertionError("waits")

    monkeypatch.setattr(SpmdProgram, "wait", refuse)
    monkeypatch.setattr(StartedStep, "is_ready", refuse)
    strategy = parity.strategy_of(2)
    with strategy.scope():
        total = tf.Variable([1.0, 2.0])

    @tf.function
    def step(x):
        total.assign_add(x)

    for _ in range(3):
        assert strategy.run(step, args=(tf.constant([1.0, 1.0]),)) is None
    np.testing.assert_array_equal(total.numpy(), [4.0, 5.0])


def test_a_loop_that_reads_nothing_waits_for_nothing(started):
    """Each result is there when the last step has started, and not before."""
    steps = started(5)
    strategy = parity.strategy_of(2)
    with strategy.scope():
        total = tf.Variable([1.0, 2.0])

    @tf.function
    def step(x):
        total.assign_add(x)
        return {"sum": tf.reduce_sum(total), "name": None}

    results = [strategy.run(step, args=(tf.ones([2]),)) for _ in range(5)]
    assert len(steps) == 5
    # In any order, by an operation, a function and numpy.
    assert float(results[4]["sum"] + 1.0) == 14.0
    assert float(tf.function(lambda x: 2.0 * x)(results[0]["sum"])) == 10.0
    assert [r["sum"].numpy() for r in results] == [5.0, 7.0, 9.0, 11.0, 13.0]
    assert results[0]["name"] is None and results[0]["sum"].shape == []
    np.testing.assert_array_equal(total.numpy(), [6.0, 7.0])


def test_a_loop_that_uses_all_results_gets_all_of_them():
    """Only Keras's own loop is known to drop results."""
    strategy = parity.strategy_of(2)

    @tf.function
    def loop(data):
        total = tf.zeros([2])
        for x in data:
            total += strategy.run(lambda x: 2.0 * x, args=(x,))
        return total

    data = tf.data.Dataset.from_tensors(tf.constant([1.0, 3.0])).repeat(5)
    np.testing.assert_array_equal(loop(data), [10.0, 30.0])


def test_inputs_are_copied_before_their_memory_is_used_again():
    strategy = parity.strategy_of(2)
    step = tf.function(lambda x: x + 1.0)
    strategy.run(step, args=(tf.zeros([4096]),))
    array = np.zeros([4096], "float32")
    (value,) = strategy.programs[0].put_inputs([array])
    array[:] = 7.0
    np.testing.assert_array_equal(value, np.zeros([4096]))


class Broken(Result):
    def is_ready(self):
        return True

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("the device is gone")


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_a_step_that_fails_on_the_device_leaves_no_values(
    monkeypatch, steps_per_execution
):
    model = parity.run_on_mesh(
        lambda: parity.compiled(steps_per_execution=steps_per_execution),
        lambda model: model.fit(X[:8], Y[:8], **FIT),
        mesh=2,
    ).model
    run = SpmdProgram.__call__

    def fail(self, inputs, captures):
        outputs, updated = run(self, inputs, captures)
        return [Broken(output, (), 0) for output in outputs], updated

    monkeypatch.setattr(SpmdProgram, "__call__", fail)
    with pytest.raises(tf.errors.UnknownError, match="the device is gone"):
        model.fit(X[:8], Y[:8], **FIT)
    assert "the device is gone" in str(model.distribute_strategy.last_error)
    with pytest.raises(RuntimeError, match="was lost in a step.*checkpoint"):
        model.get_weights()


def test_an_error_belongs_to_the_results_of_its_step(monkeypatch):
    strategy = parity.strategy_of(2)
    step = tf.function(lambda x: x + 1.0)
    x = tf.zeros([2])
    good = strategy.run(step, args=(x,))
    with monkeypatch.context() as patch:
        patch.setattr(
            SpmdProgram, "__call__", lambda *_: ([Broken(np.ones(2), (), 0)], [])
        )
        bad = strategy.run(step, args=(x,))
        with pytest.raises(tf.errors.UnknownError, match="the device is gone"):
            bad.numpy()
    after = strategy.run(step, args=(x,))
    np.testing.assert_array_equal(good, after)
    assert "the device is gone" in str(strategy.last_error)


class Ready:
    def __init__(self, values):
        self.outputs = [np.array(values)]

    def is_ready(self):
        return True

    def read(self):
        return self.outputs


def test_results_of_a_loop():
    results = LoopResults(3)
    assert results.put(Ready([1.0])) == 1
    # Another step follows while the first one's results are awaited.
    timer = threading.Timer(0.001, lambda: results.put(Ready([2.0])))
    timer.start()
    assert results.read(1)[0].tolist() in ([0.0], [1.0])
    timer.join()
    # The data ends: nothing follows the second.
    assert results.read(2)[0].tolist() == [2.0]
    assert results.read(1)[0].tolist() == [0.0]
