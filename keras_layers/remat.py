"""Rematerialization: activations computed again for the gradient, not kept for it.

Keras's layers have side effects, which must happen once: losses that they add,
metrics that they count, seeds that they use up. So a call becomes a pure function from
everything that it reads to everything that it changes (`pure_call`), and that function
is computed twice (`recompute`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gshard_tf.compat.keras_calls import current_autocast, no_autocast
from gshard_tf.compat.tf_gradients import stop_recording
from gshard_tf.compat.tf_graphs import is_compiled_by_tensorflow
from gshard_tf.compat.tf_xla import optimization_barrier
from keras_layers.routing.recording import routing_is_watched
from keras_layers.step_metrics import immediate_counts


class Effects(NamedTuple):
    """Outputs and side effects of a call.

    Attributes:
        outputs: The returned value.
        losses: Arguments of `add_loss`.
        updates: Index into `variables` -> the new value of each that was assigned.
    """

    outputs: Any
    losses: list[tf.Tensor]
    updates: dict[int, tf.Tensor]


def call_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns all variables that a call of `layer` may read or assign."""
    return [*layer.variables, *layer.metrics_variables]


def stored_values(variables: Sequence[keras.Variable]) -> list[tf.Tensor]:
    """Returns the variables' values, in the dtype in which they are stored."""
    with no_autocast():
        return [tf.convert_to_tensor(variable) for variable in variables]


def pure_call(
    variables: Sequence[keras.Variable],
    values: Sequence[tf.Tensor],
    function: Callable[[], Any],
) -> Effects:
    """Calls `function` with `values` in place of `variables`, without side effects."""
    with no_autocast():  # or master weights would be rounded here
        scope = keras.StatelessScope(
            list(zip(variables, values, strict=True)), collect_losses=True
        )
    before = [scope.get_current_value(variable) for variable in variables]
    with scope, immediate_counts():
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
    """Returns `function(*tensors)`, keeping only `tensors` for its gradient.

    Args:
        function: Reads no variable, and changes none. Returns tensors that have a
            gradient, and tensors that have none.
        tensors: Tensors of any dtype. Those of floats have a gradient.

    Returns:
        The results of `function`.
    """
    # Not tf.recompute_grad. It delays the recomputation by adding 0, computed from the
    # gradient's first element, to every argument: a broadcast from one device to all
    # on a mesh, a pass over all weights, impossible for bools, and XLA may see the 0.
    autocast = current_autocast()
    count = 0
    # `custom_gradient` passes copies. In the body of a loop a copy of a constant, such
    # as all layers' weights, is kept once per turn; the constant itself is not.
    kept = list(tensors)

    @tf.custom_gradient
    def forward(*tensors):
        with stop_recording():
            outputs, others = function(*tensors)
        nonlocal count
        count = len(outputs)

        def gradient(*d_results):
            later, d_outputs = behind_barrier(kept, d_results[:count])
            floats = [x for x in later if x.dtype.is_floating]
            with tf.GradientTape() as tape:
                tape.watch(floats)
                with autocast():
                    again, _ = function(*later)
            gradients = iter(tape.gradient(again, floats, d_outputs))
            return [next(gradients) if x.dtype.is_floating else None for x in later]

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
    """Runs a loop of equal units, keeping only each unit's input for its gradient.

    The gradient is a loop of its own, from the last unit to the first, not the one that
    TensorFlow derives. That would add each unit's gradient of its slice, with zeros
    around it, to the gradient of all slices: a pass over all weights in every turn. And
    TensorFlow folds constants that go into a loop, so zeros of the size of all weights
    would have to fit into the memory of the machine that only lowers the program.

    Args:
        forward: The loop, `(inputs, shared, stacked) -> (inputs of all units
            [count, ...], outputs, loss, state)`. It reads no variable.
        unit: One turn of it, `(inputs, shared, slices) -> (outputs, loss)`.
            Outputs are of the shape of inputs, and the sum of all losses is `loss`.
        inputs: Inputs of the first unit.
        shared: Tensors that all units read. Those of floats have a gradient.
        stacked: Tensors `[count, ...]`; each unit reads its own slices.
        trained: Indices into `stacked` of those that have a gradient.

    Returns:
        Outputs, loss and state. State has no gradient.
    """
    autocast = current_autocast()
    first = 1 + len(shared)
    # A unit reads its input, the shared tensors, its slices.
    floats = [i for i, x in enumerate(shared, 1) if x.dtype.is_floating]
    differentiable = [0, *floats, *(first + i for i in trained)]

    @tf.custom_gradient
    def whole(inputs, *tensors):
        shared, stacked = tensors[: first - 1], tensors[first - 1 :]
        with stop_recording():
            kept, outputs, loss, state = forward(inputs, shared, stacked)
        count = kept.shape[0]

        def gradient(d_outputs, d_loss, *_):
            def body(turn, d_x, d_shared, d_slices):
                number = count - 1 - turn
                slices = [weight_slice(w, number) for w in stacked]
                values = [kept[number], *shared, *slices]
                # XLA would merge the two loops if each is a single turn.
                values, d_results = behind_barrier(values, [d_x, tf.identity(d_loss)])
                sources = [values[i] for i in differentiable]
                with tf.GradientTape() as tape:
                    tape.watch(sources)
                    with autocast():
                        results = unit(values[0], values[1:first], values[first:])
                d_x, *gradients = (
                    tf.convert_to_tensor(d)
                    for d in tape.gradient(
                        results,
                        sources,
                        d_results,
                        unconnected_gradients=tf.UnconnectedGradients.ZERO,
                    )
                )
                d_x.set_shape(inputs.shape)
                sums = [a + b for a, b in zip(d_shared, gradients, strict=False)]
                arrays = [
                    array.write(number, d)
                    for array, d in zip(d_slices, gradients[len(floats) :], strict=True)
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
            gradients = {i - 1: d for i, d in zip(floats, sums, strict=True)}
            for i, array in zip(trained, arrays, strict=True):
                gradients[first - 1 + i] = array.stack()
            return [d_inputs, *(gradients.get(i) for i in range(len(tensors)))]

        return [outputs, loss, *state], gradient

    outputs, loss, *state = whole(inputs, *shared, *stacked)
    return outputs, loss, state


def weight_slice(stacked: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Returns `stacked[number]`, of weights that a loop only reads."""
    weight = stacked[number]
    if weight.dtype != tf.float32:
        return weight
    # The TPU compiler sees that matmuls round their operands to bfloat16, and would
    # carry a bfloat16 copy of all weights through the loops, half of their memory
    # again. It does not for values that are compared in float32 as well.
    nan = tf.constant(float("nan"))
    return tf.where(tf.math.is_nan(weight), nan, weight)


def _array_like(stacked: tf.Tensor) -> tf.TensorArray:
    return tf.TensorArray(
        stacked.dtype, stacked.shape[0], element_shape=stacked.shape[1:]
    )


def behind_barrier(
    tensors: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor]
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Returns both lists, available only after all `gradients` are computed.

    Else a compiler would find the same operations on the same tensors twice, compute
    them once, and keep the results; or run all of it early.
    """
    if tf.executing_eagerly():
        return [tf.identity(x) for x in tensors], list(gradients)
    values = [*tensors, *gradients]
    if is_compiled_by_tensorflow(tf.compat.v1.get_default_graph()):
        # XLA ignores control dependencies.
        delayed = optimization_barrier(values)
        # Its CPU compiler drops barriers at some point, then schedules all operations
        # as early as it can. There a value must depend on the gradient, element by
        # element, so that nothing crosses devices. Only its NaNs count, which would
        # spread anyway.
        x, gradient = delayed[0], delayed[len(tensors)]
        if x.shape == gradient.shape and x.dtype == gradient.dtype:
            nan = tf.constant(float("nan"), x.dtype)
            delayed[0] = tf.where(tf.math.is_nan(gradient), nan, x)
    else:
        with tf.control_dependencies(gradients):
            delayed = [tf.identity(x) for x in values]
    return delayed[: len(tensors)], delayed[len(tensors) :]


def rematerialize(
    layer: keras.layers.Layer, function: Callable[..., tf.Tensor], *tensors: Any
) -> tf.Tensor:
    """Runs `function(*tensors)`, part of a call of `layer`, keeping no activations.

    Side effects on variables, losses and metrics of `layer` happen once. Random numbers
    are the same both times.

    Args:
        layer: Built; everything that `function` reads is among its variables.
        function: Returns a tensor.
        *tensors: Tensors or None.
    """
    if routing_is_watched():
        # Each call records a routing, or uses one up; memory does not matter then.
        return function(*tensors)
    variables = call_variables(layer)
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
        whole, [*(tensors[i] for i in given), *stored_values(variables)]
    )
    for loss in losses:
        layer.add_loss(loss)
    for i, value in zip(updated, new, strict=True):
        variables[i].assign(value)
    return outputs
