"""Convolutions and pooling of images that are split by height and width."""

from typing import Any

import keras
import tensorflow as tf

from gshard_tf import (
    active_mesh,
    halo_average_pool,
    halo_convolution,
    halo_max_pool,
    halo_transposed_convolution,
)


@keras.saving.register_keras_serializable(package="gshard_tf")
class Conv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` that sends halos where rules split `height` or `width`.

    With any padding, strides, dilation, groups and sizes. Otherwise, and with channels
    first, it is Keras's own layer. On a mesh the partitioner then gathers whole images,
    except for a convolution without strides and dilation on a mesh of one axis.
    """

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        if not _is_split(inputs, self.data_format):
            return super().convolution_op(inputs, kernel)
        return halo_convolution(
            inputs,
            tf.cast(kernel, inputs.dtype),
            self.strides,
            self.dilation_rate,
            self.padding,
            self.groups,
        )


@keras.saving.register_keras_serializable(package="gshard_tf")
class Conv2DTranspose(keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` that sends halos, as `Conv2D` does."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        if not _is_split(inputs, self.data_format):
            return super().call(inputs)
        outputs = halo_transposed_convolution(
            inputs,
            tf.cast(self.kernel, inputs.dtype),
            self.compute_output_shape(tuple(inputs.shape))[1:3],
            self.strides,
            self.dilation_rate,
            self.padding,
        )
        return _activated(self, outputs)


@keras.saving.register_keras_serializable(package="gshard_tf")
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` that sends halos, as `Conv2D` does."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        if not _is_split(inputs, self.data_format):
            return super().call(inputs)
        return _activated(self, _depthwise(self, inputs, self.kernel))


@keras.saving.register_keras_serializable(package="gshard_tf")
class SeparableConv2D(keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` that sends halos, as `Conv2D` does."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        if not _is_split(inputs, self.data_format):
            return super().call(inputs)
        each = _depthwise(self, inputs, self.depthwise_kernel)
        mix = tf.cast(self.pointwise_kernel, inputs.dtype)
        return _activated(self, halo_convolution(each, mix))


@keras.saving.register_keras_serializable(package="gshard_tf")
class MaxPooling2D(keras.layers.MaxPooling2D):
    """`keras.layers.MaxPooling2D` that sends halos, as `Conv2D` does."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        if not _is_split(inputs, self.data_format):
            return super().call(inputs)
        return halo_max_pool(inputs, self.pool_size, self.strides, self.padding)


@keras.saving.register_keras_serializable(package="gshard_tf")
class AveragePooling2D(keras.layers.AveragePooling2D):
    """`keras.layers.AveragePooling2D` that sends halos, as `Conv2D` does."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        if not _is_split(inputs, self.data_format):
            return super().call(inputs)
        return halo_average_pool(inputs, self.pool_size, self.strides, self.padding)


def _depthwise(layer: Any, images: tf.Tensor, kernel: Any) -> tf.Tensor:
    """`[B, H, W, C]` with a kernel `[rows, columns, C, N]` -> `[B, H', W', C * N]`."""
    *size, channels, multiplier = kernel.shape
    kernel = tf.reshape(kernel, [*size, 1, channels * multiplier])
    return halo_convolution(
        images,
        tf.cast(kernel, images.dtype),
        layer.strides,
        layer.dilation_rate,
        layer.padding,
        groups=channels,
    )


def _activated(layer: Any, outputs: tf.Tensor) -> tf.Tensor:
    if layer.use_bias:
        outputs += tf.cast(layer.bias, outputs.dtype)
    return outputs if layer.activation is None else layer.activation(outputs)


def _is_split(images: Any, data_format: str) -> bool:
    """Returns whether rules split images by height or width.

    Not while only shapes matter: in a trace whose shapes are unknown.
    """
    active = active_mesh()
    if active is None or not tf.is_symbolic_tensor(images):
        return False
    if data_format != "channels_last" or not images.shape.is_fully_defined():
        return False
    return any(active.parts(name) > 1 for name in ("height", "width"))
