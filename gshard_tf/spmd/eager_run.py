"""A step that is called eagerly, and whose results are read in the background."""

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from gshard_tf.compat.tf_executors import in_background
from gshard_tf.spmd import lowering
from gshard_tf.spmd.executable import StartedStep
from gshard_tf.spmd.step import Step

if TYPE_CHECKING:
    from gshard_tf.spmd.strategy import SpmdExtended


class EagerRun:
    """Calls a function of the user's as a step.

    It returns when the step has started. Whoever reads a result waits for it.

    Args:
        extended: The `SpmdExtended` of the strategy that runs it.
        fn: The function. It is held weakly, so that the program goes when it goes.
    """

    def __init__(self, extended: "SpmdExtended", fn: Callable):
        proxy = weakref.proxy(fn)
        self._numbers = itertools.count()
        self._started: dict[int, tuple[Step, StartedStep]] = {}
        self._readers: weakref.WeakKeyDictionary[Step, _Reader] = (
            weakref.WeakKeyDictionary()
        )
        started, numbers = self._started, self._numbers

        def put(step: Step, run: StartedStep) -> int:
            number = next(numbers)
            started[number] = step, run
            return number

        @tf.function(autograph=False)
        def start(args: tuple, kwargs: dict) -> tf.Tensor:
            return Step(extended, proxy, (args, kwargs)).start_from_graph(put)

        self._start = start

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        step, run = self._started.pop(int(self._start(args, kwargs)))
        if not step.output_specs:
            return lowering.pack(step.structure, [])
        if step not in self._readers:
            self._readers[step] = _Reader(step.output_specs)
        outputs = self._readers[step](lambda: step.read(run))
        return lowering.pack(step.structure, outputs)


class _Reader:
    """Makes tensors of arrays that are there later.

    Args:
        specs: Those of the arrays.
    """

    def __init__(self, specs: list[tf.TensorSpec]):
        self._numbers = itertools.count()
        self._unread: dict[int, Callable[[], list[np.ndarray]]] = {}
        unread = self._unread

        @tf.function(autograph=False)
        def read(number: tf.Tensor) -> list[tf.Tensor]:
            outputs = tf.numpy_function(
                lambda i: unread.pop(int(i))(),
                [number],
                [spec.dtype for spec in specs],
                stateful=False,
                name="gshard_results",
            )
            for output, spec in zip(outputs, specs, strict=True):
                output.set_shape(spec.shape)
            return outputs

        self._read = read

    def __call__(self, arrays: Callable[[], list[np.ndarray]]) -> list[tf.Tensor]:
        """Returns tensors of what `arrays` returns; whoever reads one waits for it."""
        number = next(self._numbers)
        self._unread[number] = arrays
        key = tf.constant(number, tf.int64)
        with in_background():
            return self._read(key)
