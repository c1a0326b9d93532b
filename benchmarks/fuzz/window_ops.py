"""Convolutions, pooling, resizing: what slides a window over an image."""

from benchmarks.fuzz.drawing import Draw, Operations

operations = Operations()


def _kernel(draw: Draw, count: int, padding: str, dilations: list[int]) -> list[int]:
    """Window sizes for the last-but-one `count` dimensions of `h`."""
    sizes = []
    for size, dilation in zip(draw.shape[1 : 1 + count], dilations, strict=True):
        most = size if padding == "VALID" else 5
        most = max(1, (most - 1) // dilation + 1)
        sizes.append(draw.number(1, min(5, most)))
    return sizes


def _strides_dilations(draw: Draw, count: int) -> tuple[list[int], list[int]]:
    if draw.maybe(0.25):
        return [1] * count, [draw.number(1, 3)] * count
    return [draw.number(1, 3)] * count, [1] * count


def _convolution(draw: Draw, count: int, grouped: bool = False) -> str:
    """`h` is [N, *space, C]; the kernel [*window, C / groups, C']."""
    channels = draw.shape[-1]
    padding = draw.choice(["SAME", "VALID"])
    strides, dilations = _strides_dilations(draw, count)
    kernel = _kernel(draw, count, padding, dilations)
    groups = 1
    if grouped:
        groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    out = groups * draw.number(1, 4)
    w = draw.input((*kernel, channels // groups, out))
    return (
        f"tf.nn.convolution(h, {w}, strides={strides}, padding={padding!r}, "
        f"dilations={dilations})"
    )


for rank in (1, 2, 3):
    operations.add(f"conv{rank}d", [rank + 2])(
        lambda d, n=rank: _convolution(d, n),
    )
operations.add("conv2d strided", [4])(lambda d: _convolution(d, 2))
operations.add("conv1d grouped", [3])(lambda d: _convolution(d, 1, grouped=True))
operations.add("conv2d grouped", [4])(lambda d: _convolution(d, 2, grouped=True))


@operations.add("depthwise_conv2d", [4])
def _depthwise(draw: Draw) -> str:
    padding = draw.choice(["SAME", "VALID"])
    strides, dilations = _strides_dilations(draw, 2)
    kernel = _kernel(draw, 2, padding, dilations)
    w = draw.input((*kernel, draw.shape[-1], draw.number(1, 3)))
    return (
        f"tf.nn.depthwise_conv2d(h, {w}, [1, {strides[0]}, {strides[1]}, 1], "
        f"{padding!r}, dilations={dilations})"
    )


@operations.add("separable_conv2d", [4])
def _separable(draw: Draw) -> str:
    padding = draw.choice(["SAME", "VALID"])
    kernel = _kernel(draw, 2, padding, [1, 1])
    channels, multiple, stride = draw.shape[-1], draw.number(1, 2), draw.number(1, 2)
    depth = draw.input((*kernel, channels, multiple))
    point = draw.input((1, 1, channels * multiple, draw.number(1, 6)))
    return (
        f"tf.nn.separable_conv2d(h, {depth}, {point}, [1, {stride}, {stride}, 1], "
        f"{padding!r})"
    )


def _transposed(draw: Draw, count: int) -> str:
    space, out = draw.shape[1:-1], draw.number(1, 5)
    stride, padding = draw.number(1, 3), draw.choice(["SAME", "VALID"])
    kernel = [draw.number(1, 4) for _ in range(count)]
    shape = [
        size * stride if padding == "SAME" else (size - 1) * stride + max(k, stride)
        for size, k in zip(space, kernel, strict=True)
    ]
    w = draw.input((*kernel, out, draw.shape[-1]))
    return (
        f"tf.nn.conv_transpose(h, {w}, {[draw.shape[0], *shape, out]}, "
        f"{[stride] * count}, {padding!r})"
    )


for rank in (1, 2, 3):
    operations.add(f"conv{rank}d_transpose", [rank + 2])(
        lambda d, n=rank: _transposed(d, n)
    )


def _pool(draw: Draw, count: int, kind: str) -> str:
    padding = draw.choice(["SAME", "VALID"])
    window = [
        draw.number(1, min(4, size) if padding == "VALID" else 4)
        for size in draw.shape[1:-1]
    ]
    strides = [draw.number(1, 4) for _ in range(count)]
    return (
        f"tf.nn.{kind}_pool{count}d(h, {window}, {strides}, {padding!r})"
        if count > 1
        else f"tf.nn.{kind}_pool1d(h, {window[0]}, {strides[0]}, {padding!r})"
    )


for kind in ("max", "avg"):
    for rank in (1, 2, 3):
        operations.add(f"{kind}_pool{rank}d", [rank + 2])(
            lambda d, n=rank, k=kind: _pool(d, n, k)
        )


@operations.add("resize", [4])
def _resize(draw: Draw) -> str:
    size = [draw.number(1, 12), draw.number(1, 12)]
    method = draw.choice(["bilinear", "nearest"])
    return f"tf.image.resize(h, {size}, {method!r})"


@operations.add("extract_patches", [4])
def _patches(draw: Draw) -> str:
    window, stride = draw.number(1, 3), draw.number(1, 3)
    return (
        f"tf.image.extract_patches(h, [1, {window}, {window}, 1], "
        f"[1, {stride}, {stride}, 1], [1, 1, 1, 1], 'SAME')"
    )


@operations.add("space_to_depth", [4])
def _space_to_depth(draw: Draw) -> str | None:
    fitting = [b for b in (2, 3) if draw.shape[1] % b == 0 and draw.shape[2] % b == 0]
    return f"tf.nn.space_to_depth(h, {draw.choice(fitting)})" if fitting else None


@operations.add("depth_to_space", [4])
def _depth_to_space(draw: Draw) -> str | None:
    return "tf.nn.depth_to_space(h, 2)" if draw.shape[3] % 4 == 0 else None


@operations.add("space_to_batch", [4])
def _space_to_batch(draw: Draw) -> str | None:
    if draw.shape[1] % 2 or draw.shape[2] % 2:
        return None
    return "tf.space_to_batch(h, [2, 2], [[0, 0], [0, 0]])"


@operations.add("fused_batch_norm", [4])
def _batch_norm(draw: Draw) -> str:
    scale, offset = draw.input(draw.shape[-1:]), draw.input(draw.shape[-1:])
    return f"tf.compat.v1.nn.fused_batch_norm(h, {scale}, {offset}, epsilon=0.1)[0]"


operations.templates(
    """
    tf.nn.local_response_normalization(h, depth_radius={small})
    tf.image.flip_left_right(h)
    tf.image.flip_up_down(h)
    tf.image.rot90(h)
    tf.image.transpose(h)
    tf.image.central_crop(h, 0.5)
    tf.image.total_variation(h)
    tf.image.adjust_contrast(h, 1.5)
    tf.image.per_image_standardization(h)
    """,
    [4],
)
