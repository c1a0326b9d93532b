"""Repeated blocks as a loop over stacked weights.

A program that repeats a block for every layer takes time to trace and to compile in
proportion to its depth. Here the block is in it once. Every weight has one more
dimension, "layer", in front, and each turn of a loop takes its slices.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from gshard_tf import logical_axes, name_axes, random
from gshard_tf.compat.keras_calls import clear_losses, no_autocast
from keras_layers._arguments import check_int
from keras_layers._stacked_variables import (
    Blocks,
    Untracked,
    _Seeds,
    _StackedMetric,
    block_variables,
    check_same_variables,
    stacked_constraint,
    stacked_initializer,
    stacked_regularizer,
    stand_in,
    variables_by_kind,
)
from keras_layers.pipeline import run_pipeline
from keras_layers.pipeline_shape import (
    check_pipeline,
    from_microbatches,
    from_stages,
    to_microbatches,
    to_stages,
)
from keras_layers.remat import (
    Effects,
    pure_call,
    recompute_units,
    stored_values,
    weight_slice,
)
from keras_layers.routing.balancing import parts_of_batch
from keras_layers.routing.recording import routing_is_watched
from keras_layers.step_metrics import counts_are_deferred


class Stacked(keras.layers.Layer):
    """`count` repetitions of some blocks, one after the other, as a loop.

    Args:
        make_blocks: From the index of a repetition to its blocks: built layers
            `[B, L, M] -> [B, L, M]` which are the same for each repetition but for
            their names and random numbers. They provide initial values and the names
            of metrics. Only those of the first repetition are called, over slices of
            the stacked weights.
        count: How many repetitions.
        remat: Whether training keeps only the input of each repetition, and computes
            the rest again for its gradient.
        microbatches: K, of a pipeline (see `Transformer`); None: no pipeline.

    The layer has no config, because of `make_blocks`; the model around it has one.
    """

    def __init__(
        self,
        make_blocks: Callable[[int], Blocks],
        count: int,
        remat: bool = False,
        microbatches: int | None = None,
        **kwargs: Any,
    ):
        count = check_int("count", count, 1)
        super().__init__(**kwargs)
        self.count = count
        self.remat = bool(remat)
        self.microbatches = microbatches
        with tf.variable_creator_scope(stand_in), no_autocast():
            units = [list(make_blocks(i)) for i in range(count)]
        variables = [block_variables(blocks) for blocks in units]
        check_same_variables(variables)
        # Hidden from Keras and checkpoints: the blocks' variables are placeholders.
        self._blocks = Untracked(units[0])
        self._repeated = Untracked(variables)
        weights, seeds, _ = variables_by_kind(units[0])
        self._num_weights = len(weights)
        # A call assigns only variables that are not trained.
        self._carried = [i for i, v in enumerate(variables[0]) if not v.trainable]
        columns = list(zip(*variables, strict=True))[len(weights) :]
        self._seeds = [_Seeds(column) for column in columns[: len(seeds)]]
        self._stacked_metrics = [
            _StackedMetric(list(each))
            for each in zip(
                *(variables_by_kind(blocks)[2] for blocks in units), strict=True
            )
        ]
        self.supports_masking = True

    def build(self, inputs_shape: Any = None, memory_shape: Any = None) -> None:
        del inputs_shape, memory_shape  # the blocks are built
        columns = list(zip(*self._repeated.value, strict=True))
        # A layer around this one may be reading its variables in another dtype.
        with no_autocast():
            self._stacked_weights = [
                self._stacked_weight(column) for column in columns[: self._num_weights]
            ]

    def _stacked_weight(self, each: Sequence[keras.Variable]) -> keras.Variable:
        like = each[0]
        *scopes, name = like.path.split("/")
        with contextlib.ExitStack() as stack:
            # `add_weight` would leave the path within the block out.
            for scope in scopes:
                stack.enter_context(keras.name_scope(scope))
            weight = keras.Variable(
                stacked_initializer(each),
                shape=(self.count, *like.shape),
                dtype=like.dtype,
                trainable=like.trainable,
                name=name,
            )
        weight.regularizer = stacked_regularizer(like.regularizer)
        weight.constraint = stacked_constraint(like.constraint)
        axes = logical_axes(like)
        if self.microbatches is not None:
            # The layers of a stage, one after another.
            return name_axes(weight, ("stage", *(axes or [None] * len(like.shape))))
        return weight if axes is None else name_axes(weight, ("layer", *axes))

    @property
    def inner_layers(self) -> Iterator[keras.layers.Layer]:
        """Blocks of the first repetition, for tools that name a program's layers."""
        # Not a list, which Keras would search for layers to save.
        return iter(self._blocks.value)

    def stacked_variables(self) -> list[keras.Variable]:
        """Returns the stacked variables, in the order of those of the blocks."""
        metrics = [v for metric in self._stacked_metrics for v in metric.variables]
        return [*self._stacked_weights, *(s.state for s in self._seeds), *metrics]

    def call(
        self,
        inputs: tf.Tensor,
        memory: tf.Tensor | None = None,
        mask: tf.Tensor | None = None,
        memory_mask: tf.Tensor | None = None,
        training: bool | None = None,
        decoding: bool = False,
        token_ids: tf.Tensor | None = None,
        segment_ids: tf.Tensor | None = None,
        memory_segment_ids: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Runs `inputs` `[B, L, M]` through all blocks, with the blocks' arguments.

        Arguments that are None are not passed on.
        """
        watched = routing_is_watched()
        if watched and not tf.executing_eagerly():
            raise ValueError(
                "A stacked layer must be called eagerly for its routing to be recorded "
                "or replayed: in a graph it stays in the loop. Use run_eagerly=True. "
                f"Received: {self.name!r} called in a graph"
            )
        tensors = {
            "memory": memory,
            "mask": mask,
            "memory_mask": memory_mask,
            "token_ids": token_ids,
            "segment_ids": segment_ids,
            "memory_segment_ids": memory_segment_ids,
        }
        names = [name for name, x in tensors.items() if x is not None]
        options = {"training": training, **({"decoding": True} if decoding else {})}
        sources = self.stacked_variables()
        stacked = stored_values(sources)
        first_metric = len(sources) - sum(
            len(metric.variables) for metric in self._stacked_metrics
        )
        deferred = counts_are_deferred(training)
        if deferred:
            # Counts are added to the metrics when their results are read.
            stacked[first_metric:] = [tf.zeros_like(x) for x in stacked[first_metric:]]
        shared = [tensors[name] for name in names]
        carried = list(self._carried)
        updated: list[int] = []
        has_losses = [False]

        def unit(x, shared, values):
            effects = self._run(
                x, values, {**dict(zip(names, shared, strict=True)), **options}
            )
            updated[:] = effects.updates
            has_losses[:] = [bool(effects.losses)]
            loss = tf.add_n(
                [tf.zeros([]), *(tf.cast(y, tf.float32) for y in effects.losses)]
            )
            effects.outputs.set_shape(x.shape)
            return effects.outputs, loss, list(effects.updates.values())

        def loop(inputs, shared, stacked, unit_inputs=()):
            take = weight_slice if unit_inputs else operator.getitem

            def body(number, x, loss, state, unit_inputs):
                unit_inputs = [array.write(number, x) for array in unit_inputs]
                x, more, new = unit(x, shared, [take(w, number) for w in stacked])
                state = list(state)
                # Each repetition assigns its own slice.
                for i, value in zip(updated, new, strict=True):
                    state[carried.index(i)] = tf.tensor_scatter_nd_update(
                        state[carried.index(i)], [[number]], value[None]
                    )
                return number + 1, x, loss + more, state, unit_inputs

            state = [stacked[i] for i in carried]
            return tf.while_loop(
                lambda number, *_: number < self.count,
                body,
                (tf.constant(0), inputs, tf.zeros([]), state, list(unit_inputs)),
                # XLA must know it to allot what the gradient needs.
                maximum_iterations=None if unit_inputs else self.count,
            )[1:]

        def loop_with_inputs(inputs, shared, stacked):
            array = tf.TensorArray(inputs.dtype, self.count, element_shape=inputs.shape)
            outputs, loss, state, (array,) = loop(inputs, shared, stacked, [array])
            unit_inputs = array.stack()
            unit_inputs.set_shape([self.count, *inputs.shape])
            return unit_inputs, outputs, loss, state

        if self.microbatches is not None and not watched and not decoding:
            outputs, loss, state = self._run_pipeline(
                self.microbatches,
                unit,
                inputs,
                shared,
                stacked,
                updated,
                first_metric,
                training,
            )
        elif self.remat and training and not watched:
            trained = [i for i, w in enumerate(self._stacked_weights) if w.trainable]
            outputs, loss, state = recompute_units(
                loop_with_inputs,
                lambda *args: unit(*args)[:2],
                inputs,
                shared,
                stacked,
                trained,
            )
        else:
            outputs, loss, state, _ = loop(inputs, shared, stacked)
        if has_losses[0]:
            self.add_loss(loss)
        new = {i: state[carried.index(i)] for i in updated}
        for i, value in new.items():
            if i < first_metric or not deferred:
                sources[i].assign(value)
        for metric in [] if decoding else self._stacked_metrics:
            end = first_metric + len(metric.variables)
            if deferred:
                indices = range(first_metric, end)
                metric.count(self.path, training, [new.get(i) for i in indices])
            else:
                metric.join_step(self.path, training)
            first_metric = end
        return outputs

    def _run_pipeline(
        self,
        count: int,
        unit: Callable,
        inputs: tf.Tensor,
        shared: list[tf.Tensor],
        stacked: list[tf.Tensor],
        updated: list[int],
        first_metric: int,
        training: bool | None,
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Runs `unit` as `Stacked.call` does, on `count` microbatches, in stages."""
        carried = self._carried
        pipeline = check_pipeline(self.name, self.count, count, inputs.shape[0])

        def of_microbatch(x, shared, values, number):
            with random.microbatch(number, count), parts_of_batch(count):
                outputs, loss, new = unit(x, shared, values)
            new = dict(zip(updated, new, strict=True))
            return outputs, loss, [new.get(i, values[i]) for i in carried]

        outputs, loss, state = run_pipeline(
            of_microbatch,
            pipeline,
            to_microbatches(inputs, count),
            [to_microbatches(x, count) for x in shared],
            [to_stages(x, pipeline) for x in stacked],
            [i for i, w in enumerate(self._stacked_weights) if w.trainable],
            carried,
            range(first_metric, len(stacked)),
            training,
        )
        return from_microbatches(outputs), loss, [from_stages(x) for x in state]

    def _run(
        self, x: tf.Tensor, values: list[tf.Tensor], arguments: dict[str, Any]
    ) -> Effects:
        for block in self._blocks.value:
            # Keras clears only the layers that it tracks.
            clear_losses(block)
            # Nor does Keras freeze hidden layers.
            block.trainable = self.trainable

        def blocks():
            outputs = x
            for block in self._blocks.value:
                outputs = block(outputs, **arguments)
            return outputs

        return pure_call(self._repeated.value[0], values, blocks)

    def blocks(self) -> Iterator[keras.layers.Layer]:
        """Yields all blocks in order, to call methods of theirs other than `call`.

        Each is valid until the next one. The iteration must be completed.
        """
        stacked = stored_values(self.stacked_variables())
        for number in range(self.count):
            values = [value[number] for value in stacked]
            pairs = list(zip(self._repeated.value[0], values, strict=True))
            with no_autocast():
                scope = keras.StatelessScope(pairs)
            with scope:
                yield from self._blocks.value

    def stack(self, blocks: Blocks) -> None:
        """Copies all values of as many single blocks into the stack."""
        for target, sources in self._pairs(blocks):
            target.assign(tf.stack([source.numpy() for source in sources]))

    def unstack(self, blocks: Blocks) -> None:
        """Copies all values of the stack into as many single blocks."""
        for source, targets in self._pairs(blocks):
            for value, target in zip(source.numpy(), targets, strict=True):
                target.assign(value)

    def _pairs(self, blocks: Blocks) -> list[tuple[keras.Variable, Any]]:
        size = len(self._blocks.value)
        if len(blocks) != size * self.count:
            raise ValueError(
                f"Blocks for {self.name!r} must be {self.count} times {size}. "
                f"Received: {len(blocks)} blocks"
            )
        rows = [
            block_variables(blocks[i : i + size]) for i in range(0, len(blocks), size)
        ]
        check_same_variables([self._repeated.value[0], *rows])
        return list(zip(self.stacked_variables(), zip(*rows, strict=True), strict=True))

    def compute_output_shape(self, inputs_shape: Any, *_: Any, **__: Any) -> Any:
        return inputs_shape
