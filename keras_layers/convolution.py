"""Convolution and pooling of images that are split by height and width."""

from typing import Any

import keras
import tensorflow as tf

from gshard_tf import active_mesh, annotate, halo_convolution, halo_max_pool

_AXES = ("batch", "height", "width", None)


@keras.saving.register_keras_serializable(package="gshard_tf")
class Conv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` that sends halos where rules split `height` or `width`.

    Otherwise, and for what a halo is not for (another padding than "same", groups,
    channels first, parts that do not divide by the stride), it is Keras's own layer. On
    a mesh the partitioner then gathers whole images, except for a convolution without
    strides and dilation on a mesh of one axis.
    """

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        is_same = self.padding == "same" and self.data_format == "channels_last"
        if self.groups > 1 or not is_same or not _is_split(inputs, self.strides):
            return super().convolution_op(inputs, kernel)
        outputs = halo_convolution(
            annotate(inputs, _AXES),
            tf.cast(kernel, inputs.dtype),
            self.strides,
            self.dilation_rate,
        )
        return annotate(outputs, _AXES)


@keras.saving.register_keras_serializable(package="gshard_tf")
class MaxPooling2D(keras.layers.MaxPooling2D):
    """`keras.layers.MaxPooling2D` that sends halos where rules split images.

    As `Conv2D` is: with padding "same" and channels last.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        is_same = self.padding == "same" and self.data_format == "channels_last"
        if not is_same or not _is_split(inputs, self.strides):
            return super().call(inputs)
        images = annotate(inputs, _AXES)
        outputs = halo_max_pool(images, self.pool_size, self.strides)
        return annotate(outputs, _AXES)


def _is_split(images: Any, strides: tuple[int, int]) -> bool:
    """Returns whether rules split images into parts that divide by the strides.

    Not while only shapes matter: in a trace whose shapes are unknown.
    """
    active = active_mesh()
    if active is None or not tf.is_symbolic_tensor(images):
        return False
    sizes = images.shape[1:3]
    if not images.shape.is_fully_defined():
        return False
    axes = [active.rules.rules.get(name) for name in ("height", "width")]
    parts = [1 if axis is None else active.mesh.dim_size(axis) for axis in axes]
    return any(n > 1 for n in parts) and all(
        size % (n * stride) == 0
        for size, n, stride in zip(sizes, parts, strides, strict=True)
    )
