"""Operations and Keras layers of the table: a function and the specs of its arguments.

Layers are called in training, and their gradients are computed, as in a step of `fit`.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

layers, ops = keras.layers, keras.ops
F32, I32 = tf.float32, tf.int32

# Name -> (function, specs).
Case = tuple[Callable[..., Any], list[tf.TensorSpec]]


def _f(*shape: int, dtype: tf.DType = F32) -> tf.TensorSpec:
    return tf.TensorSpec(shape, dtype)


def _with_gradient(fn: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(x: tf.Tensor) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.cast(fn(x), F32) ** 2)
        return y, tape.gradient(y, x)

    return run


def _layer(layer: keras.layers.Layer, call: Callable[..., Any] | None = None) -> Any:
    """The output of a layer in training, and the gradients of all its weights."""

    def run(x: tf.Tensor) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True) if call is None else call(layer, x)
            y = tf.reduce_sum(tf.cast(tf.nest.flatten(y)[0], F32) ** 2)
        sources = [*layer.trainable_variables]
        if x.dtype.is_floating:
            sources.append(x)
        return y, tape.gradient(y, [getattr(v, "value", v) for v in sources])

    return run


def keras_layers_of_table() -> dict[str, Case]:
    """Layers of Keras, built: make them in the scope of a strategy."""
    image, sequence, volume = _f(2, 16, 16, 4), _f(2, 12, 8), _f(1, 8, 8, 8, 2)
    table: dict[str, tuple[keras.layers.Layer, tf.TensorSpec]] = {
        "Dense": (layers.Dense(8), sequence),
        "EinsumDense": (layers.EinsumDense("abc,cd->abd", (None, 8)), sequence),
        "Embedding": (layers.Embedding(32, 8), _f(2, 12, dtype=I32)),
        "Conv1D": (layers.Conv1D(8, 3), sequence),
        "Conv1D dilated causal": (
            layers.Conv1D(8, 3, dilation_rate=2, padding="causal"),
            sequence,
        ),
        "Conv2D": (layers.Conv2D(8, 3), image),
        "Conv2D groups": (layers.Conv2D(8, 3, groups=2), image),
        "Conv3D": (layers.Conv3D(4, 3), volume),
        "DepthwiseConv2D": (layers.DepthwiseConv2D(3), image),
        "SeparableConv2D": (layers.SeparableConv2D(8, 3), image),
        "Conv2DTranspose": (layers.Conv2DTranspose(4, 3, strides=2), image),
        "MaxPooling2D": (layers.MaxPooling2D(2), image),
        "MaxPooling2D overlapping": (layers.MaxPooling2D(3, 2), image),
        "AveragePooling2D": (layers.AveragePooling2D(3, 2), image),
        "GlobalAveragePooling2D": (layers.GlobalAveragePooling2D(), image),
        "AdaptiveAveragePooling2D": (layers.AdaptiveAveragePooling2D(4), image),
        "BatchNormalization": (layers.BatchNormalization(), image),
        "LayerNormalization": (layers.LayerNormalization(), sequence),
        "RMSNormalization": (layers.RMSNormalization(), sequence),
        "GroupNormalization": (layers.GroupNormalization(2), image),
        "UnitNormalization": (layers.UnitNormalization(), sequence),
        "SpectralNormalization": (
            layers.SpectralNormalization(layers.Dense(8)),
            sequence,
        ),
        "Dropout": (layers.Dropout(0.5, seed=1), sequence),
        "SpatialDropout1D": (layers.SpatialDropout1D(0.5, seed=1), sequence),
        "AlphaDropout": (layers.AlphaDropout(0.5, seed=1), sequence),
        "GaussianNoise": (layers.GaussianNoise(0.5, seed=1), sequence),
        "GaussianDropout": (layers.GaussianDropout(0.5, seed=1), sequence),
        "SimpleRNN": (layers.SimpleRNN(8), sequence),
        "LSTM": (layers.LSTM(8), sequence),
        "GRU": (layers.GRU(8, return_sequences=True), sequence),
        "Bidirectional LSTM": (layers.Bidirectional(layers.LSTM(4)), sequence),
        "ConvLSTM1D": (layers.ConvLSTM1D(4, 3), _f(2, 4, 8, 2)),
        "TimeDistributed Dense": (layers.TimeDistributed(layers.Dense(4)), sequence),
        "UpSampling2D bilinear": (
            layers.UpSampling2D(2, interpolation="bilinear"),
            image,
        ),
        "Resizing bicubic": (layers.Resizing(24, 24, "bicubic"), image),
        "ZeroPadding2D": (layers.ZeroPadding2D(1), image),
        "Cropping2D": (layers.Cropping2D(1), image),
        "RepeatVector": (layers.RepeatVector(3), _f(4, 8)),
        "PReLU": (layers.PReLU(), sequence),
        "Softmax": (layers.Softmax(), sequence),
        "RandomFlip": (layers.RandomFlip(seed=1), image),
        "RandomRotation": (layers.RandomRotation(0.1, seed=1), image),
        "CategoryEncoding": (layers.CategoryEncoding(9), _f(4, 3, dtype=I32)),
        "Discretization": (layers.Discretization([0.0, 1.0]), sequence),
    }
    cases: dict[str, Case] = {}
    for name, (layer, spec) in table.items():
        layer(tf.zeros(spec.shape, spec.dtype))
        cases[f"layers.{name}"] = (_layer(layer), [spec])
    attention = layers.MultiHeadAttention(2, 8)
    attention(tf.zeros([2, 12, 8]), tf.zeros([2, 12, 8]))
    cases["layers.MultiHeadAttention causal"] = (
        _layer(attention, lambda layer, x: layer(x, x, use_causal_mask=True)),
        [sequence],
    )
    grouped = layers.GroupQueryAttention(8, 4, 2)
    grouped(tf.zeros([2, 12, 8]), tf.zeros([2, 12, 8]))
    cases["layers.GroupQueryAttention"] = (
        _layer(grouped, lambda layer, x: layer(x, x)),
        [sequence],
    )
    quantized = layers.Dense(8)
    quantized(tf.zeros([4, 8]))
    quantized.quantize("int8")
    cases["layers.Dense int8"] = (lambda x: quantized(x), [_f(4, 8)])
    return cases


def operations_of_table() -> dict[str, Case]:
    """Operations of TensorFlow, with a gradient where a layer would need it."""
    square, image, seed = _f(16, 16), _f(2, 16, 16, 3), _f(2, dtype=I32)
    spd = lambda x: x @ tf.transpose(x) + 16 * tf.eye(16)  # noqa: E731
    return {
        "einsum": (_with_gradient(lambda x: tf.einsum("ij,kj->ik", x, x)), [square]),
        "top_k": (_with_gradient(lambda x: tf.math.top_k(x, 3)[0]), [square]),
        "approx_max_k": (lambda x: tf.math.approx_max_k(x, 4), [_f(8, 256)]),
        "sort": (lambda x: tf.sort(x), [square]),
        "argsort stable": (lambda x: tf.argsort(x, stable=True), [square]),
        "cumsum": (_with_gradient(lambda x: tf.cumsum(x, 1)), [square]),
        "searchsorted": (lambda x: tf.searchsorted(tf.sort(x), x), [_f(16)]),
        "bincount": (
            lambda x: tf.math.bincount(x, minlength=8, maxlength=8),
            [_f(16, dtype=I32)],
        ),
        "gather": (
            _with_gradient(lambda x: tf.gather(tf.tanh(x), [0, 3, 3])),
            [square],
        ),
        "scatter_nd": (lambda x: tf.scatter_nd([[1], [3]], x[:2], [8, 16]), [square]),
        "unsorted_segment_sum": (
            lambda x: tf.math.unsorted_segment_sum(x, tf.range(16) % 3, 3),
            [square],
        ),
        "cholesky": (_with_gradient(lambda x: tf.linalg.cholesky(spd(x))), [square]),
        "qr": (lambda x: tf.linalg.qr(x), [square]),
        "svd": (lambda x: tf.linalg.svd(x), [square]),
        "eigh": (lambda x: tf.linalg.eigh(spd(x)), [square]),
        "inv, solve": (lambda x: (tf.linalg.inv(x), tf.linalg.solve(x, x)), [square]),
        "lu": (lambda x: tf.linalg.lu(x), [square]),
        "slogdet": (lambda x: tf.linalg.slogdet(x)[1], [square]),
        "triangular_solve": (lambda x: tf.linalg.triangular_solve(x, x), [square]),
        "rfft2d": (_with_gradient(lambda x: tf.abs(tf.signal.rfft2d(x))), [square]),
        "stateless_uniform": (
            lambda s: tf.random.stateless_uniform([8, 64], s),
            [seed],
        ),
        "stateless_truncated_normal": (
            lambda s: tf.random.stateless_truncated_normal([8, 64], s),
            [seed],
        ),
        "stateless_categorical": (
            lambda s: tf.random.stateless_categorical(tf.ones([4, 9]), 3, s),
            [seed],
        ),
        "stateless_gamma": (
            lambda s: tf.random.stateless_gamma([8], s, alpha=2.0),
            [seed],
        ),
        "stateless_shuffle": (
            lambda s: tf.random.experimental.stateless_shuffle(tf.range(16), s),
            [seed],
        ),
        "image.resize": (
            _with_gradient(lambda x: tf.image.resize(x, [24, 24])),
            [image],
        ),
        "image.extract_patches": (
            lambda x: tf.image.extract_patches(
                x, [1, 3, 3, 1], [1, 1, 1, 1], [1, 1, 1, 1], "SAME"
            ),
            [image],
        ),
        "image.crop_and_resize": (
            lambda x: tf.image.crop_and_resize(x, [[0.0, 0.0, 1.0, 1.0]], [0], [4, 4]),
            [image],
        ),
        "ctc_loss": (
            lambda x: ops.ctc_loss(tf.ones([2, 3], I32), x, [3, 3], [10, 10], 0),
            [_f(2, 10, 5)],
        ),
        "sparse_categorical_crossentropy": (
            _with_gradient(
                lambda x: keras.losses.SparseCategoricalCrossentropy(True)(
                    tf.zeros([16], I32), x
                )
            ),
            [square],
        ),
        "dot_product_attention": (
            _with_gradient(
                lambda x: ops.dot_product_attention(x, x, x, is_causal=True)
            ),
            [_f(2, 8, 4, 16)],
        ),
        "erf, lgamma, digamma": (
            _with_gradient(
                lambda x: tf.math.erf(x) + tf.math.lgamma(x) + tf.math.digamma(x)
            ),
            [square],
        ),
        "igamma, betainc": (
            lambda x: (tf.math.igamma(x, x), tf.math.betainc(x, x, x)),
            [square],
        ),
        "fake_quant": (
            _with_gradient(lambda x: tf.quantization.fake_quant_with_min_max_args(x)),
            [square],
        ),
        "matmul float64": (lambda x: x @ x, [_f(8, 8, dtype=tf.float64)]),
        "matmul float16": (lambda x: x @ x, [_f(8, 8, dtype=tf.float16)]),
        "matmul bfloat16": (lambda x: x @ x, [_f(8, 8, dtype=tf.bfloat16)]),
        "matmul complex64": (
            lambda x: tf.abs(tf.cast(x, tf.complex64) @ tf.cast(x, tf.complex64)),
            [square],
        ),
        "matmul int8": (
            lambda x: tf.matmul(x, x, output_type=I32),
            [_f(8, 8, dtype=tf.int8)],
        ),
        "cast float8_e4m3fn": (
            lambda x: tf.cast(tf.cast(x, "float8_e4m3fn"), F32),
            [square],
        ),
        "int64, uint64": (
            lambda x: (x * x // 3, tf.cast(x, tf.uint64) % 7, tf.argmax(x)),
            [_f(8, dtype=tf.int64)],
        ),
        "complex128": (
            lambda x: tf.abs(tf.cast(x, tf.complex128) @ tf.cast(x, tf.complex128)),
            [square],
        ),
        "while_loop": (
            lambda x: tf.while_loop(
                lambda i, y: i < 5, lambda i, y: (i + 1, y @ y), (0, x)
            )[1],
            [square],
        ),
        "cond": (lambda x: tf.cond(x[0, 0] > 0, lambda: x @ x, lambda: -x), [square]),
        "map_fn": (
            lambda x: tf.map_fn(lambda row: tf.reduce_sum(row) * row, x),
            [square],
        ),
        "scan": (lambda x: tf.scan(lambda a, row: a + row, x), [square]),
        "unique": (lambda x: tf.unique(x)[0], [_f(8)]),
        "numpy_function": (
            lambda x: tf.numpy_function(lambda a: a, [x], F32),
            [square],
        ),
        "check_numerics": (lambda x: tf.debugging.check_numerics(x, "x"), [square]),
    }
