"""Elementwise functions, reductions, products, linear algebra, transforms."""

from benchmarks.fuzz.drawing import Draw, Operations

operations = Operations()

operations.templates(
    """
    tf.abs(h)
    tf.exp(h)
    tf.math.expm1(h)
    tf.math.log({positive})
    tf.math.log1p({positive})
    tf.math.sqrt({positive})
    tf.math.rsqrt({positive})
    tf.math.reciprocal({positive})
    tf.math.lgamma({positive})
    tf.math.digamma({positive})
    tf.math.erf(h)
    tf.math.erfinv({unit})
    tf.math.atanh({unit})
    tf.math.acosh({above})
    tf.math.asin({unit})
    tf.math.sigmoid(h)
    tf.math.log_sigmoid(h)
    tf.math.floor(h * 1.7)
    tf.math.round(h * 1.7)
    tf.math.sign(h)
    tf.cast(h > 0.0, "float32") * h
    tf.nn.relu(h)
    tf.nn.relu6(h * 5.0)
    tf.nn.elu(h)
    tf.nn.selu(h)
    tf.nn.gelu(h)
    tf.nn.silu(h)
    tf.nn.leaky_relu(h)
    tf.nn.softplus(h)
    tf.nn.softsign(h)
    tf.nn.crelu(h)
    tf.clip_by_value(h, -0.7, 0.8)
    tf.clip_by_norm(h, 0.9, axes={axes})
    tf.math.polyval([1.0, 0.5, 0.25], h)
    tf.math.bessel_i0e(h)
    tf.math.xlogy({positive}, {positive})
    tf.math.igamma({positive}, {positive})
    tf.math.betainc({positive}, {positive}, tf.sigmoid(h))
    tf.math.zeta({above}, {positive})
    tf.math.polygamma(2.0, {positive})
    h + {broadcast}
    h * {broadcast}
    h - {same}
    h / (tf.square({broadcast}) + 0.5)
    tf.pow({positive}, {broadcast})
    tf.maximum(h, {broadcast})
    tf.minimum(h, {same})
    tf.math.squared_difference(h, {broadcast})
    tf.math.atan2(h, {same} + 3.0)
    tf.math.floormod(h, 0.7)
    tf.math.divide_no_nan(h, {broadcast})
    tf.add_n([h, {same}, tf.sin(h)])
    tf.reduce_sum(h, {axes}, keepdims={bool})
    tf.reduce_mean(h, {axes}, keepdims={bool})
    tf.reduce_max(h, {axes}, keepdims={bool})
    tf.reduce_min(h, {axes}, keepdims={bool})
    tf.reduce_prod(h, {axes})
    tf.reduce_any(h > 1.2, {axes})
    tf.reduce_all(h > -1.2, {axes})
    tf.reduce_logsumexp(h, {axes}, keepdims={bool})
    tf.math.reduce_variance(h, {axes}, keepdims={bool})
    tf.math.reduce_std(h, {axes}, keepdims=True)
    tf.math.reduce_euclidean_norm(h, {axes})
    tf.math.count_nonzero(h > 0.3, {axis})
    tf.norm(h, axis={axis}, keepdims={bool})
    tf.norm(h, ord=1, axis={axis})
    tf.nn.l2_loss(h)
    tf.nn.moments(h, {axes})[1]
    tf.nn.softmax(h, {axis})
    tf.nn.log_softmax(h, {axis})
    tf.math.l2_normalize(h, {axis})
    h - tf.reduce_mean(h, {axis}, keepdims=True)
    h * tf.stop_gradient(tf.reduce_max(h, {axis}, keepdims=True))
    tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax({same}), h)
    tf.nn.sigmoid_cross_entropy_with_logits(tf.sigmoid({same}), h)
    tf.cast(tf.cast(h, "bfloat16"), "float32")
    tf.cast(tf.cast(h, "float64") ** 2, "float32")
    tf.recompute_grad(lambda z: tf.tanh(z) * z)(h)
    tf.tensordot(h, {vector}, [[-1], [0]])
    tf.math.real(tf.signal.fft(tf.cast(h, "complex64")))
    tf.math.imag(tf.signal.fft(tf.cast(h, "complex64")))
    tf.math.real(tf.signal.ifft(tf.cast(h, "complex64")))
    tf.math.real(tf.signal.rfft(h))
    tf.signal.irfft(tf.complex(h, {same}))
    tf.signal.dct(h, type=2)
    """
)
operations.templates(
    """
    tf.matmul(h, {matrix})
    tf.matmul(h, {same}, transpose_b=True)
    tf.matmul(h, {same}, transpose_a=True)
    tf.matmul(h, h, transpose_a=True)
    h @ {matrix} + {vector}[0]
    tf.tensordot(h, h, [[0], [0]])
    tf.tensordot(h, {same}, [[0, 1], [0, 1]])
    tf.math.real(tf.signal.fft2d(tf.cast(h, "complex64")))
    tf.math.real(tf.signal.rfft2d(h))
    tf.norm(h, axis=[-2, -1])
    tf.nn.bias_add(h, {vector})
    tf.signal.frame(h, 2, 1, axis=1, pad_end=True)
    tf.signal.overlap_and_add(h, 1)
    tf.nn.softmax(h @ tf.linalg.matrix_transpose({same})) @ h
    """,
    (2, 3),
)


def _square(draw: Draw) -> str:
    """A well-conditioned symmetric matrix made of `h` [..., N, M]: [..., N, N]."""
    return "(0.2 * h @ tf.linalg.matrix_transpose(h) + 2.0 * tf.eye(h.shape[-2]))"


for name, template in {
    "cholesky": "tf.linalg.cholesky({})",
    "inv": "tf.linalg.inv({})",
    "det": "tf.linalg.det({} * 0.4)",
    "logdet": "tf.linalg.logdet({})",
    "slogdet": "tf.linalg.slogdet({})[1]",
    "solve": "tf.linalg.solve({}, h)",
    "triangular_solve": "tf.linalg.triangular_solve({}, h)",
    "cholesky_solve": "tf.linalg.cholesky_solve(tf.linalg.cholesky({}), h)",
    "eigvalsh": "tf.linalg.eigvalsh({})",
    "svd": "tf.linalg.svd({}, compute_uv=False)",
    "qr": "tf.abs(tf.linalg.qr({})[1])",
    "expm": "tf.linalg.expm(0.2 * {})",
    "matvec": "tf.linalg.matvec({}, h[..., 0])",
    "adjoint": "tf.linalg.adjoint({})",
}.items():
    operations.add(f"linalg.{name}", (2, 3))(
        lambda draw, template=template: template.format(_square(draw))
    )


@operations.add("cross", (1, 2, 3))
def _cross(draw: Draw) -> str | None:
    other = draw.input((*draw.shape[:-1], 3))
    return f"tf.linalg.cross(h[..., :3], {other})" if draw.shape[-1] >= 3 else None


@operations.add("einsum", (1, 2, 3, 4))
def _einsum(draw: Draw) -> str:
    """Letters of `h` are shared, summed, or kept; the other operand adds some."""
    letters = "abcd"[: len(draw.shape)]
    sizes = dict(zip(letters, draw.shape, strict=True))
    second = [c for c in letters if draw.maybe(0.6)]
    if draw.maybe(0.7):
        second.append("x")
        sizes["x"] = draw.number(1, 7)
    draw.rng.shuffle(second)
    out = [c for c in dict.fromkeys([*letters, *second]) if draw.maybe(0.65)]
    draw.rng.shuffle(out)
    out = out[:4]
    w = draw.input([sizes[c] for c in second])
    return f"tf.einsum('{letters},{''.join(second)}->{''.join(out)}', h, {w})"


@operations.add("attention", (3,))
def _attention(draw: Draw) -> str:
    k, v = draw.input(draw.shape), draw.input(draw.shape)
    return (
        f"tf.einsum('bqk,bkd->bqd', tf.nn.softmax(tf.einsum('bqd,bkd->bqk', h, {k}) "
        f"+ tf.linalg.band_part(tf.ones([h.shape[1]] * 2), 0, -1) * -3.0), {v})"
    )


@operations.add("batch_normalization", (2, 3, 4))
def _normalization(draw: Draw) -> str:
    axes = list(range(len(draw.shape) - 1))
    scale = draw.input(draw.shape[-1:])
    return (
        f"tf.nn.batch_normalization(h, tf.reduce_mean(h, {axes}), "
        f"tf.math.reduce_variance(h, {axes}), None, {scale}, 0.1)"
    )


@operations.add("experts", (3,))
def _experts(draw: Draw) -> str:
    """Dispatch, expert matmul, combine; `h` [G, S, M], the mask [G, S, E, C]."""
    g, s, m = draw.shape
    experts, capacity = draw.number(1, 6), draw.number(1, 3)
    mask = f"tf.nn.softmax({draw.input((g, s, experts, capacity))})"
    wi = draw.input((experts, m, draw.number(1, 6)))
    inner = f"tf.einsum('gsm,gsec->egcm', h, {mask})"
    if draw.maybe(0.7):
        inner = draw.annotation(inner, (experts, g, capacity, m))
    return f"tf.einsum('egcm,emh->egch', {inner}, {wi})"
