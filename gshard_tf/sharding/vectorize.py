"""Functions mapped over a leading dimension, which the partitioner splits.

GSPMD (arXiv 2105.04663, section 3.3) reduces pipeline parallelism to tensors with a
dimension of stages: "vectorized_map", with annotations inside that keep the dimension
split.
"""

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

# Logical axes of the dimensions that tensors have outside of the functions that are
# being mapped, outermost first.
_AXES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "gshard_tf_vectorized_axes", default=()
)

# Name of each pipeline -> its stages and microbatches, where somebody asks.
_PIPELINES: contextvars.ContextVar[dict[str, tuple[int, int]] | None] = (
    contextvars.ContextVar("gshard_tf_pipelines", default=None)
)


def vmap(fn: Callable[..., Any], axis: str) -> Callable[..., Any]:
    """Returns `fn` mapped over the first dimension of all its arguments, at once.

    It is `tf.vectorized_map`, but annotations within `fn` (`annotate`) hold for the
    tensors with that dimension, which they split as the rules split `axis`. Each device
    then computes the elements that it has. `axis` and those that `fn` annotates must
    not map to the same mesh axis.

    A custom gradient within `fn` holds where `fn` itself asks for the gradient. The
    gradient of the mapped function is that of TensorFlow's own operations.

    Args:
        fn: A function of tensors, which returns a nest of tensors. It must not read or
            assign variables, nor use manual regions (`gshard_tf.manual`).
        axis: The logical axis of the first dimension, such as `"stage"`.

    Returns:
        A function of nests of tensors. Results have the dimension in front, too.

    Raises:
        ValueError: when it is called, for a function with a manual region or another
            operation that TensorFlow cannot map.
    """

    @tf.autograph.experimental.do_not_convert
    def mapped(*arguments: Any) -> Any:
        arguments = tf.nest.map_structure(tf.convert_to_tensor, arguments)
        # Of a dimension of 1 TensorFlow takes the element, and computes without it.
        is_one = all(x.shape[0] == 1 for x in tf.nest.flatten(arguments))

        def element(arguments):
            token = _AXES.set((*_AXES.get(), *([] if is_one else [axis])))
            try:
                return fn(*arguments)
            finally:
                _AXES.reset(token)

        try:
            # A loop in its place would compute element after element, on all devices.
            return tf.vectorized_map(element, arguments, fallback_to_while_loop=False)
        except ValueError as error:
            found = re.search(r"No pfor vectorization defined for (\w+)", str(error))
            if found is None:
                raise
            raise ValueError(
                f"A function that is mapped over {axis!r} must consist of operations "
                "that TensorFlow can map. A manual region (attention with "
                "context_parallel, dropless experts) is none. "
                f"Received: an operation {found[1]}"
            ) from error

    return mapped


def mapped_axes() -> tuple[str, ...]:
    """Returns the axes of the dimensions that functions are being mapped over."""
    return _AXES.get()


@contextlib.contextmanager
def recorded_pipelines() -> Iterator[dict[str, tuple[int, int]]]:
    """Context that yields the stages and microbatches of pipelines traced in it."""
    found: dict[str, tuple[int, int]] = {}
    token = _PIPELINES.set(found)
    try:
        yield found
    finally:
        _PIPELINES.reset(token)


def record_pipeline(name: str, stages: int, microbatches: int) -> None:
    """Tells a plan, if one is being made, of a pipeline that is traced.

    For layers of your own: `Plan.pipelines` then has it. Otherwise it does nothing.

    Args:
        name: The layer's name.
        stages: P, the number of stages.
        microbatches: K, how many pass through them.
    """
    found = _PIPELINES.get()
    if found is not None:
        found[name] = (stages, microbatches)
