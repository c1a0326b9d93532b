"""Shapes of the batch that Keras builds a model with, under a strategy.

Under a strategy, `fit` and `evaluate` build a model before they trace a step: they
read a batch, and call the model with the shapes of what `(x, y, sample_weight)` would
be of it. Without one they do neither, and the step's trace builds what it uses. Here is
how the first is made to read nothing, and the second to fail without harm.
"""

import inspect
from collections.abc import Iterator
from types import CodeType, TracebackType

import tensorflow as tf

# Private API: how `fit` builds a model, and what it iterates over. On an upgrade, check
# that both still read batches through a `TFEpochIterator`, which hands its dataset to
# `experimental_distribute_dataset` when it is made; that only `_maybe_symbolic_build`
# reads a batch for its shapes; and that it calls `_symbolic_build` in a scope of the
# strategy.
from keras.src.backend.tensorflow.core import compute_output_spec
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer, TFEpochIterator

from gshard_tf.compat.tf_distribute import AroundScope

_BUILD = TensorFlowTrainer._maybe_symbolic_build.__code__
_BUILD_FROM_SHAPES = TensorFlowTrainer._symbolic_build.__code__


class _UnreadEpochIterator(TFEpochIterator):
    """An epoch iterator that gives Keras a batch's shapes without reading a batch."""

    def __iter__(self) -> Iterator:
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        if caller is None or caller.f_code is not _BUILD:
            return super().__iter__()
        batch = tf.nest.map_structure(
            # An Optional stands for None.
            lambda spec: None if isinstance(spec, tf.OptionalSpec) else spec,
            self._distributed_dataset.element_spec,
        )
        return iter([(0, 0, iter([batch]))])


def read_no_batch_to_build() -> None:
    """Keeps `fit`, if it is what asks a strategy for a dataset, from reading it early.

    A batch that is read to see its shapes is lost to a dataset that cannot begin anew,
    and the workers of a `PyDataset` hand out what they have made by then later on. The
    iterator is changed, of this call of `fit` alone.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not TFEpochIterator.__init__.__code__:
        frame = frame.f_back
    if frame is not None:
        iterator = frame.f_locals["self"]
        if type(iterator) is TFEpochIterator:
            iterator.__class__ = _UnreadEpochIterator


class BuildingMayFail(AroundScope):
    """A strategy's scope, in which Keras may find that it cannot build a model.

    A model with a `train_step` of its own and no `call`, say, or with batches that are
    no `(x, y, sample_weight)`. The trace of its step then makes what it uses, or fails
    for the same reason, as without a strategy.
    """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._scope.__exit__(kind, error, trace)
        return isinstance(error, Exception) and _failed_to_build(trace)


def _failed_to_build(trace: TracebackType | None) -> bool:
    codes: list[CodeType] = []
    while trace is not None and len(codes) < 3:
        codes.append(trace.tb_frame.f_code)
        trace = trace.tb_next
    return codes[:2] == [_BUILD, _BUILD_FROM_SHAPES] and (
        # Not what it does besides: building the optimizer.
        codes[2:] in ([], [compute_output_spec.__code__])
    )
