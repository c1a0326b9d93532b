"""Keeps TensorFlow, which only traces, off the GPUs that jax's runtime is to use."""

import tensorflow as tf


def hide_gpus_from_tensorflow() -> None:
    """Hides all GPUs from TensorFlow, which else takes the memory of each.

    Raises:
        RuntimeError: when TensorFlow has started with them. It holds their memory until
            the process ends.
    """
    if not tf.config.get_visible_devices("GPU"):
        return
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError as error:
        raise RuntimeError(
            "TensorFlow must not use the GPUs of a mesh: it holds their memory, which "
            "jax needs. Make the strategy before anything else uses TensorFlow (a "
            "tensor, a layer, a dataset), or begin the program with "
            'tf.config.set_visible_devices([], "GPU"). Received: a TensorFlow that '
            f"has started: {error}"
        ) from error
