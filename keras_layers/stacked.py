"""Like layers in a loop, over weights that are stacked.

A program that repeats a block for every layer takes time to trace and to compile in
proportion to its depth. Here the block is in it once. Every weight has a dimension
more, "layer", in front, and a loop takes the block's weights from it.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

# Private API: as in `remat`.
from keras.src.backend import AutocastScope

from gshard_tf import logical_axes, name_axes
from keras_layers._arguments import check_int
from keras_layers.remat import (
    Effects,
    pure_call,
    read,
    recompute_units,
    slice_of,
)
from keras_layers.routing.recording import routing_is_watched
from keras_layers.step_metrics import StepMetric, counts_wait

Blocks = Sequence[keras.layers.Layer]


class Stacked(keras.layers.Layer):
    """`count` repetitions of some blocks, one after the other, as a loop.

    Args:
        make_blocks: From the number of a repetition, counted from 0, to its blocks:
            built layers `[B, L, M] -> [B, L, M]` which are the same for each
            repetition but for their names and random numbers. They give their
            initial values and the names of their metrics and are never called, except
            for those of the first one, over slices of the stacked weights.
        count: How many repetitions.
        remat: Whether training keeps only the input of each repetition, and computes
            the rest again for its gradient.

    The layer is made of a function, so it has no config; the model that makes it has.
    """

    def __init__(
        self,
        make_blocks: Callable[[int], Blocks],
        count: int,
        remat: bool = False,
        **kwargs: Any,
    ):
        count = check_int("count", count, 1)
        super().__init__(**kwargs)
        self.count = count
        self.remat = bool(remat)
        with tf.variable_creator_scope(_stand_in), AutocastScope(None):
            units = [list(make_blocks(i)) for i in range(count)]
        variables = [_variables(blocks) for blocks in units]
        _check_alike(variables)
        # Neither Keras nor a checkpoint is to find the blocks: their variables hold
        # nothing.
        self._blocks = _Untracked(units[0])
        self._repeated = _Untracked(variables)
        weights, seeds, _ = _kinds(units[0])
        self._num_weights = len(weights)
        # Only what is no weight to train is assigned in a call.
        self._carried = [i for i, v in enumerate(variables[0]) if not v.trainable]
        columns = list(zip(*variables, strict=True))[len(weights) :]
        self._seeds = [_Seeds(column) for column in columns[: len(seeds)]]
        self._stacked_metrics = [
            _StackedMetric(list(each))
            for each in zip(*(_kinds(blocks)[2] for blocks in units), strict=True)
        ]
        self.supports_masking = True

    def build(self, inputs_shape: Any = None, memory_shape: Any = None) -> None:
        del inputs_shape, memory_shape  # the blocks are built
        columns = list(zip(*self._repeated.value, strict=True))
        # A layer around this one may be reading its variables in another dtype.
        with AutocastScope(None):
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
                _stack_of(each),
                shape=(self.count, *like.shape),
                dtype=like.dtype,
                trainable=like.trainable,
                name=name,
            )
        weight.regularizer = _sum_of(like.regularizer)
        weight.constraint = _each_by_itself(like.constraint)
        axes = logical_axes(like)
        return weight if axes is None else name_axes(weight, ("layer", *axes))

    @property
    def inner_layers(self) -> Iterator[keras.layers.Layer]:
        """The blocks that stand for all, for those who name what a program does."""
        # Not a list, which Keras would look through for something to save.
        return iter(self._blocks.value)

    def stacked_variables(self) -> list[keras.Variable]:
        """The stacked variables, in the order of those of the blocks."""
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
    ) -> tf.Tensor:
        """`inputs` `[B, L, M]` through all blocks; arguments are those of the blocks.

        What is None is not passed on.
        """
        watched = routing_is_watched()
        if watched and not tf.executing_eagerly():
            raise ValueError(
                "In a graph the routing of a stacked layer stays in its loop. Call the "
                "model eagerly, or use run_eagerly=True, to record or replay it. "
                f"Received: {self.name!r} called in a graph"
            )
        tensors = {
            "memory": memory,
            "mask": mask,
            "memory_mask": memory_mask,
            "token_ids": token_ids,
        }
        names = [name for name, x in tensors.items() if x is not None]
        options = {"training": training, **({"decoding": True} if decoding else {})}
        sources = self.stacked_variables()
        stacked = read(sources)
        first_metric = len(sources) - sum(
            len(metric.variables) for metric in self._stacked_metrics
        )
        waits = counts_wait(training)
        if waits:
            # What the metrics count is added to them if somebody asks for it.
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
            effects.outputs.set_shape(inputs.shape)
            return effects.outputs, loss, list(effects.updates.values())

        def loop(inputs, shared, stacked, kept=()):
            take = slice_of if kept else operator.getitem

            def body(number, x, loss, state, kept):
                kept = [array.write(number, x) for array in kept]
                x, more, new = unit(x, shared, [take(w, number) for w in stacked])
                state = list(state)
                # Each repetition assigns its own slice.
                for i, value in zip(updated, new, strict=True):
                    state[carried.index(i)] = tf.tensor_scatter_nd_update(
                        state[carried.index(i)], [[number]], value[None]
                    )
                return number + 1, x, loss + more, state, kept

            state = [stacked[i] for i in carried]
            return tf.while_loop(
                lambda number, *_: number < self.count,
                body,
                (tf.constant(0), inputs, tf.zeros([]), state, list(kept)),
                # XLA must know it to allot what the gradient needs.
                maximum_iterations=None if kept else self.count,
            )[1:]

        def keeping(inputs, shared, stacked):
            array = tf.TensorArray(inputs.dtype, self.count, element_shape=inputs.shape)
            outputs, loss, state, (array,) = loop(inputs, shared, stacked, [array])
            kept = array.stack()
            kept.set_shape([self.count, *inputs.shape])
            return kept, outputs, loss, state

        if self.remat and training and not watched:
            trained = [i for i, w in enumerate(self._stacked_weights) if w.trainable]
            outputs, loss, state = recompute_units(
                keeping, lambda *args: unit(*args)[:2], inputs, shared, stacked, trained
            )
        else:
            outputs, loss, state, _ = loop(inputs, shared, stacked)
        if has_losses[0]:
            self.add_loss(loss)
        new = {i: state[carried.index(i)] for i in updated}
        for i, value in new.items():
            if i < first_metric or not waits:
                sources[i].assign(value)
        for metric in [] if decoding else self._stacked_metrics:
            end = first_metric + len(metric.variables)
            if waits:
                places = range(first_metric, end)
                metric.count(self.path, training, [new.get(i) for i in places])
            else:
                metric.counts_in(self.path, training)
            first_metric = end
        return outputs

    def _run(
        self, x: tf.Tensor, values: list[tf.Tensor], arguments: dict[str, Any]
    ) -> Effects:
        for block in self._blocks.value:
            # Private to Keras, which does it for the layers that it can see.
            block._clear_losses()
            # Nor does Keras freeze what it cannot see.
            block.trainable = self.trainable

        def blocks():
            outputs = x
            for block in self._blocks.value:
                outputs = block(outputs, **arguments)
            return outputs

        return pure_call(self._repeated.value[0], values, blocks)

    def blocks(self) -> Iterator[keras.layers.Layer]:
        """All blocks in order, to call other methods of theirs than `call`.

        Each is valid until the next one is asked for. Take all of them.
        """
        stacked = read(self.stacked_variables())
        for number in range(self.count):
            values = [value[number] for value in stacked]
            pairs = list(zip(self._repeated.value[0], values, strict=True))
            with AutocastScope(None):
                scope = keras.StatelessScope(pairs)
            with scope:
                yield from self._blocks.value

    def stack(self, blocks: Blocks) -> None:
        """Takes over all values of as many single blocks."""
        for target, sources in self._pairs(blocks):
            target.assign(tf.stack([source.numpy() for source in sources]))

    def unstack(self, blocks: Blocks) -> None:
        """Gives all its values to as many single blocks."""
        for source, targets in self._pairs(blocks):
            for value, target in zip(source.numpy(), targets, strict=True):
                target.assign(value)

    def _pairs(self, blocks: Blocks) -> list[tuple[keras.Variable, Any]]:
        size = len(self._blocks.value)
        if len(blocks) != size * self.count:
            raise ValueError(
                f"{self.name!r} holds {self.count} times {size} blocks. "
                f"Received: {len(blocks)} blocks"
            )
        rows = [_variables(blocks[i : i + size]) for i in range(0, len(blocks), size)]
        _check_alike([self._repeated.value[0], *rows])
        return list(zip(self.stacked_variables(), zip(*rows, strict=True), strict=True))

    def compute_output_shape(self, inputs_shape: Any, *_: Any, **__: Any) -> Any:
        return inputs_shape


class _Untracked:
    """Hides what it holds from Keras's and TensorFlow's search for variables."""

    def __init__(self, value: Any):
        self.value = value


class _StandIn:
    """In the place of a block's own `tf.Variable`: only how it would begin."""

    def __init__(self, initial_value: Callable[[], tf.Tensor]):
        self.initial_value = initial_value

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        raise ValueError(
            "This variable stands for a slice of a stacked one and has no value of "
            "its own. Read those of the `Stacked` layer."
        )


def _stand_in(next_creator: Callable, **kwargs: Any) -> _StandIn:
    del next_creator  # it would make a variable
    return _StandIn(kwargs["initial_value"])


def _stack_of(each: Sequence[keras.Variable]) -> Callable:
    """The initial values that the variables would have had, stacked."""

    stand_ins = [v.value for v in each]

    def initializer(shape: Sequence[int], dtype: Any = None) -> tf.Tensor:
        del shape
        return tf.stack([tf.cast(x.initial_value(), dtype) for x in stand_ins])

    return initializer


def _sum_of(regularizer: Callable | None) -> Callable | None:
    """A regularizer of each slice by itself."""
    if regularizer is None:
        return None
    return lambda stacked: tf.add_n([regularizer(w) for w in tf.unstack(stacked)])


def _each_by_itself(constraint: Callable | None) -> Callable | None:
    """A constraint of each slice by itself."""
    if constraint is None:
        return None
    return lambda stacked: tf.stack([constraint(w) for w in tf.unstack(stacked)])


def _kinds(blocks: Blocks) -> tuple[list, list, list]:
    """The weights of blocks, their other variables (seeds), and their metrics."""
    weights = [v for block in blocks for v in block.weights]
    known = {id(v) for v in weights}
    seeds = [v for block in blocks for v in block.variables if id(v) not in known]
    return weights, seeds, [metric for block in blocks for metric in block.metrics]


def _variables(blocks: Blocks) -> list[keras.Variable]:
    weights, seeds, metrics = _kinds(blocks)
    return [*weights, *seeds, *(v for metric in metrics for v in metric.variables)]


def _check_alike(rows: Sequence[Sequence[keras.Variable]]) -> None:
    shapes = [[(v.name, tuple(v.shape), v.dtype) for v in row] for row in rows]
    for row in shapes[1:]:
        if row != shapes[0]:
            differing = set(row) ^ set(shapes[0])
            raise ValueError(
                "Stacked blocks must have the same weights. Received: "
                f"{len(row)} and {len(shapes[0])} variables, only in one of them "
                f"{sorted(differing)}"
            )


class _Seeds(keras.random.SeedGenerator):
    """The states `[count, 2]` of one generator of each repetition.

    It is a `SeedGenerator` so that Keras counts the state among a layer's seeds, not
    among its weights.
    """

    def __init__(self, each: Sequence[keras.Variable]):
        # Not that of the base class, which makes one state.
        self.name = each[0].path.split("/")[-2]
        self._initial_seed = None
        self.state = keras.Variable(
            _stack_of(each),
            shape=(len(each), *each[0].shape),
            dtype=each[0].dtype,
            trainable=False,
            name=each[0].name,
        )

    def next(self, ordered: bool = True) -> tf.Tensor:
        raise NotImplementedError("The blocks of a Stacked layer draw their own seeds.")


class _StackedMetric(StepMetric):
    """One metric of each repetition, with the names that each of them gives.

    Args:
        each: The metrics; their variables hold nothing.
    """

    def __init__(self, each: Sequence[keras.metrics.Metric]):
        super().__init__(name=f"stacked_{each[0].name}", dtype="float32")
        self._each = _Untracked(list(each))
        for variables in zip(*(metric.variables for metric in each), strict=True):
            like = variables[0]
            self.add_variable(
                (len(each), *like.shape),
                _stack_of(variables),
                dtype=like.dtype,
                name=like.name,
            )

    def update_state(self, counts: Sequence[tf.Tensor | None]) -> None:
        """Adds what was counted to each variable, None for nothing."""
        for variable, count in zip(self.variables, counts, strict=True):
            if count is not None:
                variable.assign_add(count)

    def result(self) -> dict[str, tf.Tensor]:
        self.count_what_waits()
        values = [tf.unstack(value) for value in read(self.variables)]
        results = {}
        for metric, own in zip(
            self._each.value, zip(*values, strict=True), strict=True
        ):
            with keras.StatelessScope(list(zip(metric.variables, own, strict=True))):
                found = metric.result()
            found = found if isinstance(found, dict) else {metric.name: found}
            results.update({f"{self.qualifier}{n}": x for n, x in found.items()})
        return results


def stack_weights(unrolled: Any, stacked: Any) -> None:
    """Copies weights, seeds and metrics of a `Transformer` into a stacked one.

    Args:
        unrolled: A built `Transformer` with `stacked=False`.
        stacked: A built one with `stacked=True` and else the same arguments.

    An optimizer's slots are not copied.

    Raises:
        ValueError: if the two do not fit each other.
    """
    for stack, blocks in _check_pair(unrolled, stacked):
        stack.stack(blocks)
    for ours, theirs in _shared(unrolled, stacked):
        theirs.assign(ours.numpy())


def unstack_weights(stacked: Any, unrolled: Any) -> None:
    """The way back: copies a stacked `Transformer` into one that is not.

    Args:
        stacked: A built `Transformer` with `stacked=True`.
        unrolled: A built one with `stacked=False` and else the same arguments.

    Raises:
        ValueError: if the two do not fit each other.
    """
    for stack, blocks in _check_pair(unrolled, stacked):
        stack.unstack(blocks)
    for ours, theirs in _shared(unrolled, stacked):
        ours.assign(theirs.numpy())


def _check_pair(unrolled: Any, stacked: Any) -> list[tuple[Stacked, Blocks]]:
    if getattr(unrolled, "stacked", None) is not False or not getattr(
        stacked, "stacked", False
    ):
        raise ValueError(
            "One Transformer is stacked and the other is not. Received: "
            f"stacked={getattr(unrolled, 'stacked', None)} for the unrolled one, "
            f"stacked={getattr(stacked, 'stacked', None)} for the stacked one"
        )
    for model in (unrolled, stacked):
        if not model.built:
            raise ValueError(
                "Build both models first, with model.build(). "
                f"Received: {model.name!r}, not built"
            )
    return [
        (stacked.encoder_stack, unrolled.encoder_blocks),
        (stacked.decoder_stack, unrolled.decoder_blocks),
    ]


def _shared(unrolled: Any, stacked: Any) -> list[tuple[Any, Any]]:
    """Pairs of variables of what is outside the blocks."""
    pairs = []
    for name in (
        "source_embedding",
        "target_embedding",
        "embedding_dropout",
        "encoder_norm",
        "decoder_norm",
        "projection",
    ):
        layers = [getattr(model, name) for model in (unrolled, stacked)]
        ours, theirs = ([] if x is None else x.variables for x in layers)
        _check_alike([ours, theirs])
        pairs += zip(ours, theirs, strict=True)
    return pairs
