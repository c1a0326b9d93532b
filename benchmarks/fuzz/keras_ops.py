"""`keras.ops`: a template for each function, or the reason why there is none."""

from benchmarks.fuzz.drawing import Operations

operations = Operations()


def _each(names: str, arguments: str, ranks: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    for name in names.split():
        operations.templates(f"keras.ops.{name}({arguments})", ranks)


_each(
    "abs absolute arcsinh arctan ceil celu conj conjugate copy cos cosh deg2rad elu "
    "erf erfc exp exp2 expm1 fabs floor gelu hard_shrink hard_sigmoid hard_silu "
    "hard_swish hard_tanh i0 imag isfinite isinf isnan isneginf isposinf isreal "
    "leaky_relu log_sigmoid log_softmax logical_not nan_to_num negative normalize "
    "ones_like rad2deg ravel real relu relu6 round selu sigmoid sign signbit silu sin "
    "sinc sinh size soft_shrink softmax softplus softsign sparse_sigmoid sparsemax "
    "square squareplus stop_gradient swish tan tanh tanh_shrink trunc zeros_like "
    "layer_normalization rms_normalization empty_like angle convert_to_tensor",
    "h",
)
_each("log log10 log1p log2 rsqrt sqrt reciprocal cbrt", "{positive}")
_each("arcsin arccos arctanh erfinv", "{unit}")
_each("arccosh", "{above}")
_each(
    "add arctan2 divide_no_nan equal fmax fmin greater greater_equal heaviside hypot "
    "isclose less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor "
    "maximum minimum multiply not_equal subtract nextafter",
    "h, {broadcast}",
)
_each("divide true_divide floor_divide fmod mod power", "{positive}, {positive}")
_each("threshold", "h, 0.2, -0.5")
_each("dot inner outer kron vdot", "h, {same}", (1,))
_each(
    "all amax amin any argmax argmin max mean median min nanargmax nanargmin "
    "nancumprod nancumsum nanmax nanmean nanmedian nanmin nanprod nanstd nansum "
    "nanvar prod ptp std sum var logsumexp count_nonzero cumprod cumsum sort argsort "
    "diff flip average trapezoid norm",
    "h, axis={axis}",
)
_each("nanpercentile percentile", "h, 30, axis={axis}")
_each("nanquantile quantile", "h, 0.7, axis={axis}")
_each(
    "bitwise_and bitwise_or bitwise_xor gcd lcm bitwise_left_shift bitwise_right_shift "
    "left_shift right_shift ldexp",
    "{whole}, {ids}",
)
_each("bitwise_invert bitwise_not", "{whole}")
_each("triu tril corrcoef", "h[..., :6]", (2,))
_each("diagonal swapaxes", "h, axis1=0, axis2=1", (2, 3))
_each("swapaxes", "h, 0, -1", (2, 3, 4))
_each("trace fliplr flipud rot90 vstack hstack diag diagflat", "h", (2,))
_each("diag diagflat vander", "h", (1,))
_each("segment_sum segment_prod", "h, {ids0}, num_segments=9", (1, 2, 3))

for name in ("max", "min"):  # of an empty segment: the largest number there is
    operations.templates(
        f"tf.clip_by_value(keras.ops.segment_{name}(h, {{ids0}}, 9), -3.0, 3.0)",
        (1, 2, 3),
    )
operations.templates(
    """
    keras.ops.append(h, {same}, axis={axis})
    keras.ops.argpartition(h, 0, axis={axis})[..., :1]
    keras.ops.associative_scan(lambda a, b: a * 0.5 + b, h, axis=0)
    keras.ops.associative_scan(keras.ops.multiply, h, axis={axis}, reverse={bool})
    keras.ops.binary_crossentropy(keras.ops.sigmoid({same}), keras.ops.sigmoid(h))
    keras.ops.bincount({ids}[0] if len(h.shape) > 1 else {ids}, minlength=9)
    keras.ops.broadcast_to(h, (3, *h.shape))
    keras.ops.cast(h, "bfloat16")
    keras.ops.categorical_crossentropy(keras.ops.softmax({same}), h, from_logits=True)
    keras.ops.clip(h, -0.5, 0.6)
    keras.ops.concatenate([h, {same}, h], axis={axis})
    keras.ops.cond(keras.ops.sum(h) > 0, lambda: h * 2.0, lambda: keras.ops.sin(h))
    keras.ops.custom_gradient(lambda z: (z * 2.0, lambda *a, upstream: upstream))(h)
    keras.ops.digitize(h, keras.ops.array([-0.5, 0.0, 0.7]))
    keras.ops.einsum("...a,...a->...", h, {same})
    keras.ops.expand_dims(h, {axis})
    keras.ops.fft((h, {same}))[0]
    keras.ops.fft((h, {same}))[1]
    keras.ops.fori_loop(0, {small}, lambda i, z: keras.ops.sin(z), h)
    keras.ops.full_like(h, 2.0) * h
    keras.ops.get_item(h, 0)
    keras.ops.histogram(h, bins=5, range=(-1.0, 1.0))[0]
    keras.ops.isin(keras.ops.round(h), keras.ops.array([0.0, 1.0]))
    keras.ops.irfft((h, {same}))
    keras.ops.map(lambda z: keras.ops.sin(z) * 2.0, h)
    keras.ops.moments(h, axes=[{axis}])[1]
    keras.ops.moveaxis(h, 0, -1)
    keras.ops.multi_hot({ids}, num_classes=9)
    keras.ops.one_hot({ids}, 9) * h[..., None]
    keras.ops.pad(h, [(1, 2)] * len(h.shape), mode="constant")
    keras.ops.pad(h, [(1, 0)] * len(h.shape), mode="symmetric")
    keras.ops.polar({positive}, h)
    keras.ops.psnr(h, {same}, 2.0)
    keras.ops.repeat(h, {small}, axis={axis})
    keras.ops.reshape(h, (-1, h.shape[-1]))
    keras.ops.rfft(h)[0]
    keras.ops.roll(h, {shift}, axis={axis})
    keras.ops.saturate_cast(h * 200, "int8")
    keras.ops.scan(lambda c, z: (c + z, c * z), keras.ops.zeros_like(h[0]), h)[1]
    keras.ops.scatter({ids0}[:, None], h, (9, *h.shape[1:]))
    keras.ops.scatter_update(h, [[0], [h.shape[0] - 1]], h[:2] if h.shape[0] > 1 else h)
    keras.ops.searchsorted(keras.ops.array([-1.0, 0.0, 1.0]), keras.ops.ravel(h))
    keras.ops.select([h > 0.5, h < 0.0], [h, {same}], 0.1)
    keras.ops.slice(h, [0] * len(h.shape), [max(1, s // 2) for s in h.shape])
    keras.ops.slice_update(h, [s // 2 for s in h.shape], h[({first},) * len(h.shape)])
    keras.ops.sparse_categorical_crossentropy({ids_last}, h, from_logits=True)
    keras.ops.split(h, [1], axis={axis})[0]
    keras.ops.squeeze(h[None], axis=0)
    keras.ops.stack([h, {same}], axis={axis})
    keras.ops.switch({branch}, [keras.ops.sin, keras.ops.cos], h)
    keras.ops.take(h, {ids_axis0}, axis=0)
    keras.ops.take_along_axis(h, keras.ops.argsort({same}, axis={axis2}), axis={axis2})
    keras.ops.tensordot(h, {same}, axes=[[0], [0]])
    keras.ops.tile(h, [2] * len(h.shape))
    keras.ops.top_k(h, 1)[0]
    keras.ops.transpose(h, {permutation})
    keras.ops.unravel_index({ids}, (3, 3))[0]
    keras.ops.unstack(h, axis=0)[-1]
    keras.ops.vectorized_map(lambda z: keras.ops.flip(z) if len(z.shape) else z, h)
    keras.ops.view(h, "int32") % 7
    keras.ops.view_as_real(keras.ops.view_as_complex(keras.ops.stack([h, h], -1)))
    keras.ops.where(h > 0.2, h, {broadcast})
    keras.ops.while_loop(lambda i, z: i < 2, lambda i, z: (i + 1, z * z), (0, h))[1]
    keras.ops.in_top_k({ids_last}, h, 1)
    keras.ops.glu(keras.ops.concatenate([h, {same}], axis=-1))
    """
)
operations.templates(
    """
    keras.ops.correlate(h, {same}, mode="same")
    keras.ops.unfold(keras.ops.tile(h[None, None, None], (1, 1, 3, 1)), 2)
    keras.ops.stft(keras.ops.tile(h, (8,)), 4, 2, 4)[0]
    keras.ops.extract_sequences(keras.ops.tile(h, (6,)), 4, 2)
    keras.ops.istft(keras.ops.stft(keras.ops.tile(h, (16,)), 8, 2, 8), 8, 2, 8)
    """,
    (1,),
)
operations.templates(
    """
    keras.ops.array_split(h, 2, axis=0)[1] if h.shape[0] > 1 else h
    keras.ops.vsplit(h, [1])[0]
    keras.ops.hsplit(h, [1])[0]
    keras.ops.dstack([h, {same}])
    keras.ops.cdist(h, {same})
    keras.ops.matmul(h, {matrix})
    keras.ops.fft2((h, {same}))[0]
    keras.ops.ifft2((h, {same}))[1]
    keras.ops.cross(h[:, :3], {same}[:, :3]) if h.shape[1] >= 3 else h
    keras.ops.rearrange(h, "a b -> b a")
    keras.ops.batch_normalization(h, keras.ops.mean(h, 0), keras.ops.var(h, 0) + 0.1, 1)
    keras.ops.pinv(h + 3.0 * keras.ops.eye(h.shape[0], h.shape[1]))
    keras.ops.lstsq({gram}, h)
    keras.ops.solve({gram}, h)
    keras.ops.solve_triangular({gram}, h, lower={bool})
    keras.ops.cholesky({gram})
    keras.ops.cholesky_inverse({gram})
    keras.ops.inv({gram})
    keras.ops.det(0.4 * {gram})
    keras.ops.logdet({gram})
    keras.ops.slogdet({gram})[1]
    keras.ops.eigh({gram})[0]
    keras.ops.svd({gram}, compute_uv=False)
    keras.ops.qr({gram})[1] ** 2
    keras.ops.lu_factor({gram})[0]
    keras.ops.matrix_rank({gram})
    keras.ops.meshgrid(h[0], h[:, 0])[0]
    keras.ops.jvp(keras.ops.sin, (h,), (h,))[1]
    """,
    (2,),
)
operations.templates(
    """
    keras.ops.dot_product_attention(h, {same}, {same})
    keras.ops.dot_product_attention(h, {same}, {same}, is_causal=True)
    keras.ops.average_pool(h, 2, strides={small}, padding="same")
    keras.ops.max_pool(h, 2, strides={small}, padding="same")
    keras.ops.adaptive_average_pool(h, 2)
    keras.ops.adaptive_max_pool(h, 2)
    keras.ops.conv(h, {kernel}, strides={small}, padding="same")
    keras.ops.conv_transpose(h, {kernel_back}, strides={small}, padding="same")
    keras.ops.depthwise_conv(h, {kernel_depth}, strides={small}, padding="same")
    keras.ops.separable_conv(h, {kernel_depth}, {kernel_point}, padding="same")
    keras.ops.depth_to_space(keras.ops.concatenate([h] * 4, -1), 2)
    keras.ops.space_to_depth(keras.ops.repeat(keras.ops.repeat(h, 2, 1), 2, 2), 2)
    keras.ops.dsplit(h, [1])[0]
    keras.ops.fold(keras.ops.tile(h[:, :, 0, :1], (1, 4, 9)), (4, 4), 2)[..., :1]
    keras.ops.image.affine_transform(h, {affine})
    keras.ops.image.crop_images(h, 0, 0, target_height=1, target_width=1)
    keras.ops.image.extract_patches(h, 2, padding="same")
    keras.ops.image.gaussian_blur(h, (3, 3), (1.0, 1.0))
    keras.ops.image.map_coordinates(h[0, :, :, 0], {coordinates}, order=1)
    keras.ops.image.pad_images(h, 1, 0, 1, 1)
    keras.ops.image.resize(h, (4, 5))
    keras.ops.image.rgb_to_grayscale(keras.ops.concatenate([h[..., :1]] * 3, -1))
    """,
    (4,),
)

EXCLUDED = {
    "makes a tensor of nothing, so nothing is partitioned": (
        "arange array bartlett blackman empty eye full geomspace hamming hanning"
        " identity kaiser linspace "
        "logspace ones tri zeros"
    ),
    "its result is no tensor": "allclose convert_to_numpy dtype is_tensor ndim shape",
    "the shape of its result depends on values": "nonzero unique",
    "takes sparse tensors, or text": "sparse_plus",
    "TensorFlow has no kernel of it for XLA": "ctc_decode ctc_loss eig",
    "Keras does not have it on TensorFlow": "vectorize",
    "a module of operations": "image linalg nn numpy",
}
