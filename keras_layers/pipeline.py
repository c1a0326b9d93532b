"""A stack as a pipeline: stages side by side, and microbatches that pass through them.

GSPMD (arXiv 2105.04663, section 3.3): tensors have a dimension of stages, over which a
block is mapped (`gshard_tf.vmap`). In each tick every stage computes a microbatch of
its own, and the buffer that holds them is shifted by one stage. Split over devices, the
shift is a collective-permute, and all else is local. Activations are computed again for
the gradient, as in GPipe (arXiv 1811.06965, section 2.3).

Dimensions: P stages, U units of a stage, K microbatches, T = K + P - 1 ticks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from gshard_tf import annotate, vmap
from gshard_tf.compat.keras_calls import current_autocast
from gshard_tf.compat.tf_gradients import gradient_scope, stop_recording
from keras_layers._shapes import static_shape
from keras_layers.pipeline_shape import TOKEN_AXES, Pipeline
from keras_layers.remat import behind_barrier, weight_slice

Unit = Callable[..., tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]]


def run_pipeline(
    unit: Unit,
    pipeline: Pipeline,
    inputs: tf.Tensor,
    shared: Sequence[tf.Tensor],
    values: Sequence[tf.Tensor],
    trained: Sequence[int],
    state: Sequence[int],
    counted: Sequence[int],
    training: bool | None,
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """Runs microbatches through all units.

    Args:
        unit: `(x, shared, values, number) -> (outputs, loss, new state)`: a unit on
            microbatch `number`, a scalar int32. Outputs are of the shape of x.
        pipeline: The pipeline.
        inputs: `[K, ...]`, the microbatches.
        shared: Tensors `[K, ...]` that all units read. Those of floats have a gradient.
        values: Tensors `[U, P, ...]`; each unit reads its own.
        trained: Indices into `values` of those that have a gradient.
        state: Indices of those that a unit changes: the order of its results.
        counted: Indices of the state of which a unit reads what the microbatch before
            left. It always reads the first value of the rest, of which the last
            microbatch's change stays.
        training: Whether a gradient is likely to be asked for.

    Returns:
        Outputs `[K, ...]`, the sum of the losses of all units as a mean over
        microbatches, and the state `[U, P, ...]`.
    """
    run = _Run(unit, pipeline, list(trained), list(state), list(counted))
    count = len(shared)
    scope = gradient_scope()

    @tf.custom_gradient
    def whole(inputs, *tensors):
        shared, values = tensors[:count], tensors[count:]
        with stop_recording():
            kept, *results = run.forward(inputs, shared, values, bool(training))

        def gradient(d_outputs, d_loss, *_):
            unit_inputs = kept
            # In the layer's scope, as the gradients of other operations are.
            with tf.name_scope(scope):
                if not training:
                    unit_inputs = run.forward(inputs, shared, values, True)[0]
                d_inputs, gradients = run.backward(
                    unit_inputs, shared, values, d_outputs, d_loss
                )
            return [d_inputs, *(gradients.get(i) for i in range(len(tensors)))]

        outputs, loss, new = results
        return [outputs, loss, *new], gradient

    outputs, loss, *new = whole(inputs, *shared, *values)
    outputs.set_shape(inputs.shape)
    return outputs, loss, new


class _Run:
    """Both passes of a pipeline. Arguments are those of `run_pipeline`."""

    def __init__(
        self,
        unit: Unit,
        pipeline: Pipeline,
        trained: list[int],
        state: list[int],
        counted: list[int],
    ):
        self.unit = unit
        self.pipeline = pipeline
        self.trained = trained
        self.state = state
        self.counted = counted
        self.autocast = current_autocast()

    def forward(
        self,
        inputs: tf.Tensor,
        shared: Sequence[tf.Tensor],
        values: Sequence[tf.Tensor],
        keep: bool,
    ) -> tuple[Any, tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Returns all units' inputs `[T * U, P, ...]`, outputs, loss and state."""
        stages, units, microbatches = self.pipeline
        stage = vmap(self.unit, "stage")
        like = tf.broadcast_to(inputs[0], [stages, *static_shape(inputs[0])])
        like = _annotated(like)

        def tick(t, y, losses, state, kept, ends):
            number, valid = self._microbatch(t)
            x = _shifted(inputs[tf.minimum(t, microbatches - 1)], y)
            here = [_annotated(tf.gather(z, number)) for z in shared]

            def turn(j, x, losses, state, kept):
                kept = [array.write(t * units + j, x) for array in kept]
                own = [weight_slice(w, j) for w in values]
                for i, w in zip(self.state, state, strict=True):
                    if i in self.counted:
                        own[i] = w[j]
                x, loss, new = stage(x, here, own, number)
                losses += _where(valid, loss, 0.0)
                state = [
                    tf.tensor_scatter_nd_update(w, [[j]], _where(valid, v, w[j])[None])
                    for w, v in zip(state, new, strict=True)
                ]
                return j + 1, _annotated(x), losses, state, kept

            _, x, losses, state, kept = tf.while_loop(
                lambda j, *_: j < units,
                turn,
                (tf.constant(0), x, losses, state, kept),
            )
            # Until the last stage has the first microbatch, another takes its place.
            end = tf.maximum(t - (stages - 1), 0)
            return t + 1, x, losses, state, kept, ends.write(end, x)

        kept = []
        if keep:
            kept = [_array(inputs.dtype, self.pipeline.ticks * units, like.shape)]
        ends = _array(inputs.dtype, microbatches, like.shape)
        _, _, losses, state, kept, ends = tf.while_loop(
            lambda t, *_: t < self.pipeline.ticks,
            tick,
            (
                tf.constant(0),
                like,
                tf.zeros([stages]),
                [values[i] for i in self.state],
                kept,
                ends,
            ),
        )
        unit_inputs = kept[0].stack() if keep else None
        outputs = self._of_stage(ends.stack(), stages - 1)
        return unit_inputs, outputs, tf.reduce_sum(losses) / microbatches, state

    def backward(
        self,
        unit_inputs: tf.Tensor,
        shared: Sequence[tf.Tensor],
        values: Sequence[tf.Tensor],
        d_outputs: tf.Tensor,
        d_loss: tf.Tensor,
    ) -> tuple[tf.Tensor, dict[int, tf.Tensor]]:
        """Returns the gradients of the inputs, and of other tensors by index.

        Gradients go from the last stage to the first, and those of `shared` with them.
        A bubble's gradients are 0, because those that enter it are.
        """
        stages, units, microbatches = self.pipeline
        ticks = self.pipeline.ticks
        floats = [i for i, z in enumerate(shared) if z.dtype.is_floating]
        stage = vmap(self._unit_gradient(len(shared), floats), "stage")

        def tick(turn, d_x, d_shared, d_values, d_ends, d_shared_ends):
            t = ticks - 1 - turn
            number, valid = self._microbatch(t)
            here = [_annotated(tf.gather(z, number)) for z in shared]
            end = t - (stages - 1)
            d_end = d_outputs[tf.maximum(end, 0)]
            d_x = _shifted(tf.where(end >= 0, d_end, tf.zeros_like(d_end)), d_x, -1)
            d_shared = [_shifted(tf.zeros_like(d[0]), d, -1) for d in d_shared]
            d_unit_loss = tf.where(valid, d_loss / microbatches, 0.0)

            def unit_turn(i, d_x, d_shared, d_values):
                j = units - 1 - i
                own = [weight_slice(w, j) for w in values]
                tensors = [unit_inputs[t * units + j], *here, *own]
                tensors, d_results = behind_barrier(tensors, [d_x, d_unit_loss])
                d_x, more, d_own = stage(tensors, d_results, number)
                d_shared = [
                    _annotated(a + b) for a, b in zip(d_shared, more, strict=True)
                ]
                d_values = [
                    array.write(j, array.read(j) + d)
                    for array, d in zip(d_values, d_own, strict=True)
                ]
                return i + 1, _annotated(d_x), d_shared, d_values

            _, d_x, d_shared, d_values = tf.while_loop(
                lambda i, *_: i < units,
                unit_turn,
                (tf.constant(0), d_x, d_shared, d_values),
            )
            # A microbatch enters at the tick of its number.
            start = tf.minimum(t, microbatches - 1)
            d_ends = d_ends.write(start, d_x)
            d_shared_ends = [
                array.write(start, d)
                for array, d in zip(d_shared_ends, d_shared, strict=True)
            ]
            return turn + 1, d_x, d_shared, d_values, d_ends, d_shared_ends

        d_x = tf.zeros_like(unit_inputs[0])
        d_shared = [
            tf.zeros([stages, *static_shape(shared[i])[1:]], shared[i].dtype)
            for i in floats
        ]
        _, _, _, d_values, d_ends, d_shared_ends = tf.while_loop(
            lambda turn, *_: turn < ticks,
            tick,
            (
                tf.constant(0),
                _annotated(d_x),
                [_annotated(d) for d in d_shared],
                [_sums_like(values[i]) for i in self.trained],
                _array(d_x.dtype, microbatches, d_x.shape),
                [_array(d.dtype, microbatches, d.shape) for d in d_shared],
            ),
        )
        gradients = {
            i: self._of_stage(ends.stack(), 0)
            for i, ends in zip(floats, d_shared_ends, strict=True)
        }
        for i, array in zip(self.trained, d_values, strict=True):
            gradients[len(shared) + i] = array.stack()
        return self._of_stage(d_ends.stack(), 0), gradients

    def _unit_gradient(self, count: int, floats: Sequence[int]) -> Callable[..., Any]:
        """The gradient of a unit: of x, of the floats that are shared, of weights."""
        wanted = [0, *(1 + i for i in floats), *(1 + count + i for i in self.trained)]

        def gradient(tensors, d_results, number):
            sources = [tensors[i] for i in wanted]
            with tf.GradientTape() as tape:
                tape.watch(sources)
                with self.autocast():
                    results = self.unit(
                        tensors[0], tensors[1 : 1 + count], tensors[1 + count :], number
                    )
            d_x, *others = tape.gradient(
                results[:2],
                sources,
                d_results,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            others = [tf.convert_to_tensor(d) for d in others]
            return d_x, others[: len(floats)], others[len(floats) :]

        return gradient

    def _microbatch(self, t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The microbatch `[P]` of each stage at tick t, and whether there is one."""
        stages, _, microbatches = self.pipeline
        number = annotate(t - tf.range(stages), ("stage",))
        valid = (number >= 0) & (number < microbatches)
        return tf.clip_by_value(number, 0, microbatches - 1), valid

    def _of_stage(self, x: tf.Tensor, stage: int) -> tf.Tensor:
        """`[K, P, ...]` -> `[K, ...]`, those of one stage, on all devices."""
        # A sum: a slice of a dimension that is split may gather it.
        here = tf.range(self.pipeline.stages) == stage
        here = tf.reshape(here, [-1, *[1] * (len(x.shape) - 2)])
        x = tf.reduce_sum(tf.where(here, x, tf.zeros([], x.dtype)), axis=1)
        return annotate(x, (None, *TOKEN_AXES[: len(x.shape) - 1]))


def _shifted(new: tf.Tensor, buffer: tf.Tensor, by: int = 1) -> tf.Tensor:
    """`buffer` `[P, ...]` moved on by one stage, with `new` in the place that is left.

    Args:
        new: `[...]`.
        buffer: The buffer.
        by: 1: to the next stage. -1: to the one before.
    """
    stages = buffer.shape[0]
    if stages == 1:
        return _annotated(new[None])
    # Not a concatenation, which the partitioner makes of all-to-alls.
    pad = [[0, 0]] * (len(buffer.shape) - 1)
    if by == 1:
        moved = tf.pad(buffer, [[1, 0], *pad])[:-1]
    else:
        moved = tf.pad(buffer, [[0, 1], *pad])[1:]
    place = tf.range(stages) == (0 if by == 1 else stages - 1)
    return _annotated(_where(place, new[None], _annotated(moved)))


def _annotated(x: tf.Tensor) -> tf.Tensor:
    """`x` `[P, B, ...]`, each stage's part on its devices."""
    return annotate(x, ("stage", *TOKEN_AXES[: len(x.shape) - 1]))


def _where(valid: tf.Tensor, new: tf.Tensor, old: Any) -> tf.Tensor:
    """Selects by stage: `[P]`, `[P, ...]`, `[P, ...]`."""
    valid = tf.reshape(valid, [-1, *[1] * (len(new.shape) - 1)])
    return tf.where(valid, new, old)


def _array(dtype: tf.DType, size: int, shape: Any) -> tf.TensorArray:
    return tf.TensorArray(dtype, size, element_shape=shape, clear_after_read=False)


def _sums_like(x: tf.Tensor) -> tf.TensorArray:
    """Zeros of the shape of `x`, to add to."""
    array = _array(x.dtype, x.shape[0], x.shape[1:])
    # In a graph what was not written is 0, and is no constant.
    return array.unstack(tf.zeros_like(x)) if tf.executing_eagerly() else array
