"""Rematerialisation: activations computed again for the gradient, not kept for it.

Keras's layers have side effects, which must happen once: losses that they add,
metrics that they count, seeds that they use up. So a call is made a function of
everything that it reads and returning everything that it changes (`pure_call`), and
that function is what is computed twice (`recompute`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

# Private API: the dtype that variables are cast to when a layer reads them. On an
# upgrade, check that `Layer.__call__` still enters an `AutocastScope`.
from keras.src.backend import AutocastScope, get_autocast_scope

# Public in XLA, not in TensorFlow, where Keras's backend takes it from, too.
from tensorflow.compiler.tf2xla.python.xla import optimization_barrier

# Private API: keeps operations off all tapes, as in `tf.recompute_grad`.
from tensorflow.python.eager import record

# Private API: whether a graph is going to be compiled by XLA.
from tensorflow.python.ops import control_flow_util

from keras_layers.routing.recording import routing_is_watched
from keras_layers.step_metrics import counting_at_once


class Effects(NamedTuple):
    """What a call did.

    Attributes:
        outputs: What it returned.
        losses: What `add_loss` was called with.
        updates: Index into `variables` -> the new value of each that was assigned.
    """

    outputs: Any
    losses: list[tf.Tensor]
    updates: dict[int, tf.Tensor]


def state_of(layer: keras.layers.Layer) -> list[keras.Variable]:
    """All variables that a call of `layer` may read or assign."""
    return [*layer.variables, *layer.metrics_variables]


def read(variables: Sequence[keras.Variable]) -> list[tf.Tensor]:
    """Their values, in the dtype in which they are stored."""
    with AutocastScope(None):
        return [tf.convert_to_tensor(variable) for variable in variables]


def pure_call(
    variables: Sequence[keras.Variable],
    values: Sequence[tf.Tensor],
    function: Callable[[], Any],
) -> Effects:
    """Calls `function` with `values` in the place of `variables`; changes nothing."""
    with AutocastScope(None):  # or master weights would be rounded here
        scope = keras.StatelessScope(
            list(zip(variables, values, strict=True)), collect_losses=True
        )
    before = [scope.get_current_value(variable) for variable in variables]
    with scope, counting_at_once():
        outputs = function()
    after = [scope.get_current_value(variable) for variable in variables]
    updates = {
        i: tf.stop_gradient(new)
        for i, (old, new) in enumerate(zip(before, after, strict=True))
        if new is not old
    }
    return Effects(outputs, list(scope.losses), updates)


def recompute(
    function: Callable[..., tuple[list[tf.Tensor], list[tf.Tensor]]],
    tensors: Sequence[tf.Tensor],
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """`function(*tensors)`, for whose gradient only `tensors` are kept.

    Args:
        function: Reads no variable, and changes none. Returns tensors that have a
            gradient, and tensors that have none.
        tensors: Of any dtype. Those of floats have a gradient.

    Returns:
        What `function` returns.
    """
    # tf.recompute_grad does nearly this. It makes the recomputation wait for the
    # gradient by adding 0, made of the gradient's first element, to every argument: a
    # broadcast from one device to all on a mesh, a pass over all weights, impossible
    # for bools, and XLA may see that it is 0.
    autocast = get_autocast_scope()
    count = 0
    # `custom_gradient` hands over copies. In the body of a loop a copy of what no turn
    # changes, all layers' weights say, is kept once per turn; the thing itself is not.
    kept = list(tensors)

    @tf.custom_gradient
    def forward(*tensors):
        with record.stop_recording():
            outputs, others = function(*tensors)
        nonlocal count
        count = len(outputs)

        def gradient(*d_results):
            later, d_outputs = _after(kept, d_results[:count])
            floats = [x for x in later if x.dtype.is_floating]
            with tf.GradientTape() as tape:
                tape.watch(floats)
                with AutocastScope(autocast and autocast.dtype):
                    again, _ = function(*later)
            found = iter(tape.gradient(again, floats, d_outputs))
            return [next(found) if x.dtype.is_floating else None for x in later]

        return [*outputs, *others], gradient

    results = forward(*tensors)
    return results[:count], results[count:]


def recompute_units(
    forward: Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor, list[tf.Tensor]]],
    unit: Callable[..., tuple[tf.Tensor, tf.Tensor]],
    inputs: tf.Tensor,
    shared: Sequence[tf.Tensor],
    stacked: Sequence[tf.Tensor],
    trained: Sequence[int],
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """A loop of like units, for whose gradient only each unit's input is kept.

    The gradient is a loop of its own, from the last unit to the first, rather than
    what TensorFlow makes of a loop. That one would add each unit's gradient of its
    slice, with zeros around it, to the gradient of all slices: a pass over all weights
    in every turn. And TensorFlow looks for constants among what goes into a loop and
    does not change there, so zeros of the size of all weights would have to fit into
    the memory of the machine that only lowers the program.

    Args:
        forward: The loop, `(inputs, shared, stacked) -> (inputs of all units
            [count, ...], outputs, loss, state)`. It reads no variable.
        unit: What a turn of it does, `(inputs, shared, slices) -> (outputs, loss)`.
            Outputs are of the shape of inputs, and the sum of all losses is `loss`.
        inputs: Of the first unit.
        shared: Tensors that all units read. Those of floats have a gradient.
        stacked: Tensors `[count, ...]`; each unit reads its own slices.
        trained: Places in `stacked` of those that have a gradient.

    Returns:
        Outputs, loss and state. State has no gradient.
    """
    autocast = get_autocast_scope()
    first = 1 + len(shared)
    # In what a unit reads: its input, what is shared, its slices.
    floats = [i for i, x in enumerate(shared, 1) if x.dtype.is_floating]
    places = [0, *floats, *(first + i for i in trained)]

    @tf.custom_gradient
    def whole(inputs, *tensors):
        shared, stacked = tensors[: first - 1], tensors[first - 1 :]
        with record.stop_recording():
            kept, outputs, loss, state = forward(inputs, shared, stacked)
        count = kept.shape[0]

        def gradient(d_outputs, d_loss, *_):
            def body(turn, d_x, d_shared, d_slices):
                number = count - 1 - turn
                slices = [slice_of(w, number) for w in stacked]
                values = [kept[number], *shared, *slices]
                # Both loops in one, that is a single turn each, are found to be so.
                values, d_results = _after(values, [d_x, tf.identity(d_loss)])
                sources = [values[i] for i in places]
                with tf.GradientTape() as tape:
                    tape.watch(sources)
                    with AutocastScope(autocast and autocast.dtype):
                        results = unit(values[0], values[1:first], values[first:])
                d_x, *found = (
                    tf.convert_to_tensor(d)
                    for d in tape.gradient(
                        results,
                        sources,
                        d_results,
                        unconnected_gradients=tf.UnconnectedGradients.ZERO,
                    )
                )
                d_x.set_shape(inputs.shape)
                sums = [a + b for a, b in zip(d_shared, found, strict=False)]
                arrays = [
                    array.write(number, d)
                    for array, d in zip(d_slices, found[len(floats) :], strict=True)
                ]
                return turn + 1, d_x, sums, arrays

            d_outputs.set_shape(inputs.shape)
            zeros = [tf.zeros_like(shared[i - 1]) for i in floats]
            arrays = [_array_like(stacked[i]) for i in trained]
            _, d_inputs, sums, arrays = tf.while_loop(
                lambda turn, *_: turn < count,
                body,
                (tf.constant(0), d_outputs, zeros, arrays),
            )
            found = {i - 1: d for i, d in zip(floats, sums, strict=True)}
            for i, array in zip(trained, arrays, strict=True):
                found[first - 1 + i] = array.stack()
            return [d_inputs, *(found.get(i) for i in range(len(tensors)))]

        return [outputs, loss, *state], gradient

    outputs, loss, *state = whole(inputs, *shared, *stacked)
    return outputs, loss, state


def slice_of(stacked: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """`stacked[number]`, of weights that a loop only reads."""
    found = stacked[number]
    if found.dtype != tf.float32:
        return found
    # The TPU compiler sees that products round their operands to bfloat16, and would
    # carry a bfloat16 copy of all weights through the loops, half of their memory
    # again. It does not for what is looked at in float32 as well.
    nan = tf.constant(float("nan"))
    return tf.where(tf.math.is_nan(found), nan, found)


def _array_like(stacked: tf.Tensor) -> tf.TensorArray:
    return tf.TensorArray(
        stacked.dtype, stacked.shape[0], element_shape=stacked.shape[1:]
    )


def _after(
    tensors: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor]
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """The same, but not before all `gradients` are there.

    Or a compiler would find the same operations on the same tensors twice, compute
    them once, and keep the results all the while; or do all of it early.
    """
    if tf.executing_eagerly():
        return [tf.identity(x) for x in tensors], list(gradients)
    together = [*tensors, *gradients]
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        # XLA does not look at control dependencies.
        held = list(optimization_barrier(*together))
        for x, y in zip(together, held, strict=True):
            y.set_shape(x.shape)
        # Its CPU compiler keeps barriers for a while only, then schedules what it can
        # as early as it can. There a value has to be needed: each element's gradient,
        # so that nothing crosses devices. It is only looked at for being NaN, which
        # would spread anyway.
        x, gradient = held[0], held[len(tensors)]
        if x.shape == gradient.shape and x.dtype == gradient.dtype:
            nan = tf.constant(float("nan"), x.dtype)
            held[0] = tf.where(tf.math.is_nan(gradient), nan, x)
    else:
        with tf.control_dependencies(gradients):
            held = [tf.identity(x) for x in together]
    return held[: len(tensors)], held[len(tensors) :]


def rematerialize(
    layer: keras.layers.Layer, function: Callable[..., tf.Tensor], *tensors: Any
) -> tf.Tensor:
    """`function(*tensors)`, part of a call of `layer`, without keeping activations.

    What `function` does to variables, losses and metrics of `layer` happens once. Its
    random numbers are the same both times.

    Args:
        layer: Built; everything that `function` reads is among its variables.
        function: Returns a tensor.
        *tensors: Tensors or None.
    """
    if routing_is_watched():
        # Plans are recorded, or used up, by each call; and whoever looks at them
        # does not look at memory.
        return function(*tensors)
    variables = state_of(layer)
    given = [i for i, x in enumerate(tensors) if x is not None]
    updated: list[int] = []

    def whole(*values):
        arguments = list(tensors)
        for i, value in zip(given, values[: len(given)], strict=True):
            arguments[i] = value
        effects = pure_call(
            variables, values[len(given) :], lambda: function(*arguments)
        )
        updated[:] = effects.updates
        return [effects.outputs, *effects.losses], list(effects.updates.values())

    (outputs, *losses), new = recompute(
        whole, [*(tensors[i] for i in given), *read(variables)]
    )
    for loss in losses:
        layer.add_loss(loss)
    for i, value in zip(updated, new, strict=True):
        variables[i].assign(value)
    return outputs
