"""Loops and branches, with a partitioned tensor carried through them."""

from benchmarks.fuzz.drawing import Draw, Operations

operations = Operations()


@operations.add("while_loop", (1, 2, 3))
def _while(draw: Draw) -> str:
    count, w = draw.number(1, 4), draw.input(draw.shape)
    inner = "tf.tanh(z + w)"
    if draw.maybe(0.6):
        inner = draw.annotation(inner, draw.shape)
    return (
        f"(lambda w: tf.while_loop(lambda i, z: i < {count}, lambda i, z: (i + 1, "
        f"{inner}), (0, h), maximum_iterations={count})[1])({w})"
    )


@operations.add("while_loop matmul", (2, 3))
def _while_matmul(draw: Draw) -> str:
    count, w = draw.number(1, 3), draw.input((draw.shape[-1], draw.shape[-1]))
    return (
        f"(lambda w: tf.while_loop(lambda i, z: i < {count}, lambda i, z: (i + 1, "
        f"tf.tanh(z @ w)), (0, h), maximum_iterations={count})[1])({w})"
    )


@operations.add("while_loop over rows", (2, 3))
def _while_rows(draw: Draw) -> str:
    return (
        "tf.while_loop(lambda i, z: i < h.shape[0], lambda i, z: (i + 1, "
        "tf.tanh(z) + h[i]), (0, tf.zeros_like(h[0])), "
        "maximum_iterations=h.shape[0])[1]"
    )


@operations.add("scan", (2, 3))
def _scan(draw: Draw) -> str:
    reverse = draw.maybe(0.3)
    return (
        f"tf.scan(lambda z, x: tf.tanh(0.7 * z + x), h, tf.zeros_like(h[0]), "
        f"reverse={reverse})"
    )


@operations.add("scan matmul", (2, 3))
def _scan_matmul(draw: Draw) -> str:
    size = draw.shape[-1]
    w = draw.input((size, size))
    product = (
        "tf.linalg.matvec(w, z, transpose_a=True)" if len(draw.shape) == 2 else "z @ w"
    )
    return (
        f"(lambda w: tf.scan(lambda z, x: tf.tanh({product} + x), h, "
        f"tf.zeros_like(h[0])))({w})"
    )


@operations.add("scan scatter", (2,))
def _scan_scatter(draw: Draw) -> str:
    """Adds each row to the table at a place of its own, as embeddings' gradients do."""
    rows = draw.number(1, 8)
    ids = draw.ids((draw.shape[0],), rows)
    return (
        f"(lambda ids: tf.while_loop(lambda i, z: i < h.shape[0], lambda i, z: (i + 1, "
        f"tf.tensor_scatter_nd_add(z, [[ids[i]]], h[i][None])), (0, "
        f"tf.zeros([{rows}, h.shape[1]])), maximum_iterations=h.shape[0])[1])({ids})"
    )


@operations.add("while_loop gather", (2,))
def _while_gather(draw: Draw) -> str:
    """A lookup in each round, as of one embedding by several micro-batches."""
    rounds = draw.number(1, 4)
    ids = draw.ids((rounds, draw.number(1, 6)), draw.shape[0])
    return (
        f"(lambda ids: tf.while_loop(lambda i, z: i < {rounds}, lambda i, z: (i + 1, "
        f"tf.tanh(z) + tf.gather(h, ids[i])), (0, tf.gather(h, ids[0])), "
        f"maximum_iterations={rounds})[1])({ids})"
    )


operations.templates(
    """
    tf.map_fn(lambda x: tf.tanh(x) * x, h)
    tf.vectorized_map(lambda x: tf.tanh(x) * x, h)
    tf.foldl(lambda z, x: tf.tanh(z) + x, h)
    tf.cond(tf.reduce_sum(h) > 0.0, lambda: tf.tanh(h), lambda: h * 2.0)
    tf.cond(h[(0,) * len(h.shape)] > 0.0, lambda: tf.cumsum(h), lambda: h * 2.0)
    tf.switch_case(tf.cast(tf.reduce_max(h) > 1, "int32"), [lambda: h, lambda: -h])
    tf.vectorized_map(lambda x: tf.cumsum(x), h)
    """,
    (2, 3),
)
