"""Operations that move elements: slices, pads, gathers, scatters, sorts, scans."""

import math

from benchmarks.fuzz.drawing import Draw, Operations

operations = Operations()

operations.templates(
    """
    tf.reverse(h, [{axis}])
    tf.roll(h, {shift}, {axis})
    tf.roll(h, 1, 0) + tf.roll(h, -1, 0)
    tf.roll(h, [1, {shift}], [0, -1])
    tf.transpose(h, {permutation})
    tf.concat([h, {same}], {axis})
    tf.concat([h, h], {axis})
    tf.concat([h[1:], h[:1]], 0) + tf.concat([h[-1:], h[:-1]], 0)
    tf.concat([h[1:], h[-1:] * 2.0], 0)
    tf.concat([h, tf.ones_like(h[:1])], 0)
    tf.concat([tf.zeros_like(h[:2]), h, h[:1]], 0)
    tf.stack([h, {same}], {axis})
    tf.expand_dims(h, {axis})
    tf.repeat(h, {small}, {axis})
    tf.where(h > 0.1, h, {same})
    tf.where(h > {same}, tf.sin(h), h * 0.5)
    tf.sort(h, axis={axis})
    tf.sort(h, axis={axis}, direction="DESCENDING")
    tf.argsort(h, axis={axis})
    tf.gather(h, tf.argsort(h[..., 0] if len(h.shape) > 1 else h, axis=0), axis=0)
    tf.argmax(h, {axis})
    tf.argmin(h, {axis}, output_type="int32")
    tf.cumsum(h, {axis}, exclusive={bool}, reverse={bool})
    tf.math.cumprod(h, {axis}, exclusive={bool}, reverse={bool})
    tf.math.cumulative_logsumexp(h, {axis})
    tf.unstack(h, axis=0)[0] * tf.unstack(h, axis=0)[-1]
    h[::2]
    h[::-1]
    h[..., ::-2]
    h[-1:]
    h[1:] - h[:-1]
    tf.reshape(h, [-1])
    tf.reshape(h, [1, -1])
    tf.reshape(h, [h.shape[-1], -1])
    tf.linalg.diag(h[..., :5])
    tf.one_hot(tf.argmax(h, -1), 5)
    tf.searchsorted(tf.sort(h, -1), tf.sort({same}, -1))
    """
)
operations.templates(
    """
    tf.linalg.matrix_transpose(h)
    tf.linalg.band_part(h, {small}, 0)
    tf.linalg.diag_part(h)
    tf.linalg.set_diag(h, tf.linalg.diag_part(h) * 2.0)
    tf.linalg.trace(h)
    h[:, ::-1]
    h[:, 1:] * h[:, :-1]
    tf.concat([h[:, -2:], h, h[:, :2]], 1)
    tf.concat([h[:, 1:], h[:, :1]], 1) * tf.concat([h[:, -1:], h[:, :-1]], 1)
    tf.gather(h, [0, 0], axis=1)
    tf.reshape(h, [h.shape[0] * h.shape[1], *h.shape[2:]])
    """,
    (2, 3, 4),
)


def _factors(draw: Draw, total: int) -> list[int]:
    """A random shape of `total` elements."""
    shape = []
    while total > 1 and len(shape) < 3:
        factor = draw.choice([n for n in range(1, total + 1) if total % n == 0])
        shape.append(factor)
        total //= factor
    return [*shape, total]


@operations.add("reshape")
def _reshape(draw: Draw) -> str:
    return f"tf.reshape(h, {_factors(draw, math.prod(draw.shape))})"


@operations.add("pad")
def _pad(draw: Draw) -> str:
    mode = draw.choice(["CONSTANT", "CONSTANT", "REFLECT", "SYMMETRIC"])
    pads = []
    for size in draw.shape:
        most = {"CONSTANT": 4, "REFLECT": size - 1, "SYMMETRIC": size}[mode]
        pads.append([draw.number(0, min(most, 3)) for _ in range(2)])
    return f"tf.pad(h, {pads}, {mode!r})"


@operations.add("concat of other sizes")
def _concat_sizes(draw: Draw) -> str:
    axis = draw.number(0, len(draw.shape) - 1)
    shape = list(draw.shape)
    shape[axis] = draw.number(1, 5)
    parts = ["h", draw.input(shape, annotated=0.6)]
    draw.rng.shuffle(parts)
    return f"tf.concat([{', '.join(parts)}], {axis})"


@operations.add("slice")
def _slice(draw: Draw) -> str:
    begin = [draw.number(0, size - 1) for size in draw.shape]
    size = [draw.number(1, s - b) for s, b in zip(draw.shape, begin, strict=True)]
    return f"tf.slice(h, {begin}, {size})"


@operations.add("dynamic slice")
def _dynamic_slice(draw: Draw) -> str:
    dimension = draw.number(0, len(draw.shape) - 1)
    taken = draw.number(1, draw.shape[dimension])
    start = draw.ids((), draw.shape[dimension] - taken + 1)
    size = list(draw.shape)
    size[dimension] = taken
    return f"tf.slice(h, {_begin(draw, dimension, start)}, {size})"


def _begin(draw: Draw, dimension: int, start: str) -> str:
    """Returns the begin of a slice, 0 but for one dimension, of 32 or 64 bits."""
    begin = ["0"] * len(draw.shape)
    begin[dimension] = start
    text = f"tf.stack([{', '.join(begin)}])"
    return f'tf.cast({text}, "int64")' if draw.maybe(0.4) else text


@operations.add("dynamic slice update")
def _slice_update(draw: Draw) -> str:
    dimension = draw.number(0, len(draw.shape) - 1)
    shape = list(draw.shape)
    shape[dimension] = draw.number(1, shape[dimension])
    start = draw.ids((), draw.shape[dimension] - shape[dimension] + 1)
    begin = _begin(draw, dimension, start)
    return f"keras.ops.slice_update(h, {begin}, {draw.input(shape)})"


@operations.add("strided slice")
def _strided_slice(draw: Draw) -> str:
    parts = []
    for size in draw.shape:
        begin = draw.number(0, size - 1)
        step = draw.choice([1, 1, 2, 3, -1])
        parts.append(f"{begin}::{step}" if step < 0 or draw.maybe() else f"::{step}")
    return f"h[{', '.join(parts)}]"


@operations.add("tile")
def _tile(draw: Draw) -> str:
    return f"tf.tile(h, {[draw.choice([1, 1, 2, 3]) for _ in draw.shape]})"


@operations.add("split and join")
def _split(draw: Draw) -> str | None:
    axis = draw.number(0, len(draw.shape) - 1)
    counts = [n for n in range(2, 7) if draw.shape[axis] % n == 0]
    if not counts:
        return None
    other = draw.number(0, len(draw.shape) - 1)
    return f"tf.concat(tf.split(h, {draw.choice(counts)}, {axis})[::-1], {other})"


@operations.add("top_k")
def _top_k(draw: Draw) -> str:
    k = draw.number(1, draw.shape[-1])
    return f"tf.math.top_k(h, {k}).{draw.choice(['values', 'values', 'indices'])}"


@operations.add("reverse_sequence", (2, 3))
def _reverse_sequence(draw: Draw) -> str:
    lengths = draw.ids(draw.shape[:1], draw.shape[1] + 1)
    return f"tf.reverse_sequence(h, {lengths}, seq_axis=1, batch_axis=0)"


@operations.add("gather")
def _gather(draw: Draw) -> str:
    axis = draw.number(0, len(draw.shape) - 1)
    shape = draw.draw_shape(draw.number(0, 2))
    return f"tf.gather(h, {draw.ids(shape, draw.shape[axis])}, axis={axis})"


@operations.add("gather batch_dims", (2, 3))
def _gather_batch(draw: Draw) -> str:
    ids = draw.ids((draw.shape[0], draw.size()), draw.shape[1])
    return f"tf.gather(h, {ids}, axis=1, batch_dims=1)"


@operations.add("gather_nd", (1, 2, 3))
def _gather_nd(draw: Draw) -> str:
    depth = draw.number(1, len(draw.shape))
    rows = draw.size()
    parts = [draw.ids((rows,), size) for size in draw.shape[:depth]]
    return f"tf.gather_nd(h, tf.stack([{', '.join(parts)}], -1))"


@operations.add("take_along_axis", (2, 3))
def _take_along(draw: Draw) -> str:
    axis = draw.number(0, len(draw.shape) - 1)
    ids = draw.ids(draw.shape, draw.shape[axis])
    return f"keras.ops.take_along_axis(h, {ids}, axis={axis})"


@operations.add("scatter_nd", (1, 2, 3))
def _scatter_nd(draw: Draw) -> str:
    rows = draw.size()
    ids = draw.ids((draw.shape[0], 1), rows)
    return f"tf.scatter_nd({ids}, h, {[rows, *draw.shape[1:]]})"


@operations.add("scatter_nd of rank 2 ids", (1, 2, 3))
def _scatter_nd2(draw: Draw) -> str:
    shape = [draw.number(1, 8), draw.number(1, 6)]
    ids = [draw.ids(draw.shape[:1], size) for size in shape]
    return (
        f"tf.scatter_nd(tf.stack([{', '.join(ids)}], -1), h, "
        f"{[*shape, *draw.shape[1:]]})"
    )


for name in ("add", "sub", "max", "min", "update"):

    @operations.add(f"tensor_scatter_nd_{name}", (1, 2, 3))
    def _tensor_scatter(draw: Draw, name: str = name) -> str:
        rows = draw.number(1, draw.shape[0])
        updates = draw.input((rows, *draw.shape[1:]))
        # No row twice: which of two updates wins is nobody's promise.
        ids = (
            f"tf.argsort({draw.ids((draw.shape[0],), 99)}, stable=True)[:{rows}, None]"
        )
        if name == "add":
            ids = draw.ids((rows, 1), draw.shape[0])
        return f"tf.tensor_scatter_nd_{name}(h, {ids}, {updates})"


for name in ("sum", "max", "min", "prod", "mean", "sqrt_n"):

    @operations.add(f"unsorted_segment_{name}", (1, 2, 3))
    def _unsorted(draw: Draw, name: str = name) -> str:
        count = draw.number(1, 12)
        ids = draw.ids(draw.shape[: draw.number(1, min(2, len(draw.shape)))], count)
        reduced = f"tf.math.unsorted_segment_{name}(h, {ids}, {count})"
        # Empty segments have the largest number there is.
        return (
            f"tf.clip_by_value({reduced}, -3.0, 3.0)"
            if name in ("max", "min")
            else reduced
        )


for name in ("sum", "mean", "max", "min", "prod"):

    @operations.add(f"segment_{name}", (1, 2))
    def _segment(draw: Draw, name: str = name) -> str:
        ids = [0]
        for _ in range(draw.shape[0] - 1):
            ids.append(ids[-1] + draw.number(0, 1))
        return f"tf.math.segment_{name}(h, {ids})"


@operations.add("bincount", (1, 2))
def _bincount(draw: Draw) -> str:
    count = draw.number(1, 9)
    ids = draw.ids(draw.shape, count)
    return (
        f"tf.math.bincount({ids}, weights=h, minlength={count}, maxlength={count})"
        if len(draw.shape) == 1
        else f"keras.ops.bincount({ids}, weights=h, minlength={count})"
    )


@operations.add("embedding_lookup", (2,))
def _embedding(draw: Draw) -> str:
    ids = draw.ids(draw.draw_shape(draw.number(1, 2)), draw.shape[0])
    return f"tf.nn.embedding_lookup(h, {ids})"


@operations.add("one_hot matmul", (2,))
def _one_hot(draw: Draw) -> str:
    count = draw.size()
    return f"tf.one_hot({draw.ids(draw.shape[:1], count)}, {count}, axis=0) @ h"


@operations.add("concat of pads", (1, 2))
def _concat_pads(draw: Draw) -> str:
    """Both ends of one tensor, twice, as in a stencil that is transposed twice."""
    k = draw.number(1, max(1, draw.shape[0] - 1))
    return (
        f"tf.concat([h[{k}:], h[:{k}]], 0) * tf.concat([h[-{k}:], h[:-{k}]], 0) + "
        f"tf.pad(h[{k}:], [[0, {k}]] + [[0, 0]] * (len(h.shape) - 1))"
    )


@operations.add("sparse cross entropy", (2, 3))
def _sparse_ce(draw: Draw) -> str:
    labels = draw.ids(draw.shape[:-1], draw.shape[-1])
    return f"tf.nn.sparse_softmax_cross_entropy_with_logits(labels={labels}, logits=h)"
