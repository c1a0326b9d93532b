"""Halos: what a device's windows need of the parts that its neighbors hold.

GSPMD (arXiv 2105.04663, section 4.3) does the same in its partitioner. A dimension that
does not divide by the devices has its last parts padded, of inputs and of outputs, as
everywhere. So the rows that a device needs may lie elsewhere on each device.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Window:
    """A window that moves along one dimension of an image.

    Output `o` sees the elements `o * stride - before + k * dilation` for `k < size`, of
    the image with `spread - 1` zeros between its elements.

    Attributes:
        size: The elements that it sees.
        stride: Between outputs.
        dilation: Between the elements that it sees.
        before: The padding before the image.
        inputs: The size of the image.
        outputs: The number of windows.
        spread: The stride of a transposed convolution, whose `stride` is 1.
    """

    size: int
    stride: int
    dilation: int
    before: int
    inputs: int
    outputs: int
    spread: int = 1

    def reach(self, outputs: int) -> int:
        """The elements from the first to the last that some outputs see."""
        return (outputs - 1) * self.stride + (self.size - 1) * self.dilation + 1


@dataclasses.dataclass(frozen=True)
class Shares:
    """The elements that each of `n` devices holds, makes and needs.

    Positions are those of a device's own part: its first element is 0, and the last
    one of the device before it is -1.
    """

    window: Window
    n: int

    @property
    def held(self) -> int:
        return -(-self.window.inputs // self.n)

    @property
    def made(self) -> int:
        return -(-self.window.outputs // self.n)

    @functools.cached_property
    def starts(self) -> list[tuple[int, int]]:
        """The beginning of the windows of each device that has outputs.

        The position of an element; and how many zeros of a spread image come first.
        """
        found = []
        for device in range(-(-self.window.outputs // self.made)):
            at = device * self.made * self.window.stride - self.window.before
            element, zeros = divmod(at, self.window.spread)
            found.append((element - device * self.held, zeros))
        return found

    @functools.cached_property
    def phase(self) -> int | None:
        """The zeros that come first; None where devices differ."""
        phases = {zeros for _, zeros in self.starts}
        return phases.pop() if len(phases) == 1 else None

    @property
    def needed(self) -> int:
        """The elements that a device's windows see, from the first to the last."""
        spread = self.window.spread
        zeros = spread - 1 if self.phase is None else self.phase
        return (zeros + self.window.reach(self.made) - 1) // spread + 1

    def begins(self) -> list[int]:
        """The position that each device's windows begin at.

        A device without outputs does as the last one that has some.
        """
        found = [element for element, _ in self.starts]
        return found + found[-1:] * (self.n - len(found))

    def halo(self) -> tuple[int, int]:
        """The elements before and after a part that some device needs."""
        begins = self.begins()
        return max(0, -min(begins)), max(0, max(begins) + self.needed - self.held)

    def receivers(self, distance: int) -> list[tuple[int, int]]:
        """The pairs of a device and another one that needs some of its part.

        Args:
            distance: Of the first from the second.
        """
        begin, end = distance * self.held, (distance + 1) * self.held
        pairs = []
        for device, (element, zeros) in enumerate(self.starts):
            made = min(self.made, self.window.outputs - device * self.made)
            last = element + (zeros + self.window.reach(made) - 1) // self.window.spread
            sender = device + distance
            if 0 <= sender < self.n and element < end and begin <= last:
                pairs.append((sender, device))
        return pairs


@dataclasses.dataclass(frozen=True)
class Reached:
    """A dimension with all that its windows see.

    Attributes:
        padding: What pads it yet, before and after, with zeros.
        skipped: The outputs to leave out before a device's own (an index array), or
            None: there are none.
        made: A device's outputs.
    """

    padding: tuple[int, int]
    skipped: Any
    made: int


def exchange(
    images: Any,
    dimensions: Sequence[int],
    axes: Sequence[str | tuple[str, ...]],
    windows: Sequence[Window],
    edge: float = 0.0,
) -> tuple[Any, list[Reached]]:
    """Returns parts of images with their halos; in a manual region.

    Dimensions come one after another, so that corners come with the second.

    Args:
        images: A device's part.
        dimensions: Those that the windows move along.
        axes: The mesh axis of each.
        windows: The window of each.
        edge: The value beyond the image.
    """
    reached = []
    for dimension, axis, window in zip(dimensions, axes, windows, strict=True):
        images, each = _exchange(images, dimension, axis, window, edge)
        reached.append(each)
    return images, reached


def own_outputs(outputs: Any, dimensions: Sequence[int], all_reached: Any) -> Any:
    """Returns a device's own outputs of those that it computed."""
    from jax import lax

    for dimension, reached in zip(dimensions, all_reached, strict=True):
        if reached.skipped is not None:
            outputs = lax.dynamic_slice_in_dim(
                outputs, reached.skipped, reached.made, dimension
            )
    return outputs


def _exchange(
    x: Any, dimension: int, axis: Any, window: Window, edge: float
) -> tuple[Any, Reached]:
    import jax.numpy as jnp
    from jax import lax

    n, here = lax.axis_size(axis), lax.axis_index(axis)
    shares = Shares(window, n)
    if n == 1:
        spread_size = (window.inputs - 1) * window.spread + 1
        after = window.reach(window.outputs) - window.before - spread_size
        # A pooling whose strides leave elements out needs no cut.
        after = after if window.spread > 1 else max(after, 0)
        return x, Reached((window.before, after), None, window.outputs)

    held = shares.held
    before, after = shares.halo()
    parts = []
    for distance in range(-before // held, -(-after // held) + 1):
        begin = max(-before - distance * held, 0)
        end = min(held + after - distance * held, held)
        part = lax.slice_in_dim(x, begin, end, axis=dimension)
        if distance:
            pairs = shares.receivers(distance)
            part = _moved(part, axis, here, n, pairs, edge)
        parts.append(part)
    joined = jnp.concatenate(parts, dimension) if len(parts) > 1 else parts[0]

    begins = [before + position for position in shares.begins()]
    if len(set(begins)) == 1:
        end = begins[0] + shares.needed
        x = lax.slice_in_dim(joined, begins[0], end, axis=dimension)
    else:
        first = jnp.asarray(begins)[here]
        x = lax.dynamic_slice_in_dim(joined, first, shares.needed, dimension)

    reach = window.reach(shares.made)
    spread_size = (shares.needed - 1) * window.spread + 1
    if shares.phase is not None:
        padding = (-shares.phase, shares.phase + reach - spread_size)
        return x, Reached(padding, None, shares.made)
    phases = [zeros for _, zeros in shares.starts]
    phases += phases[-1:] * (n - len(phases))
    padding = (0, window.spread - 1 + reach - spread_size)
    return x, Reached(padding, jnp.asarray(phases)[here], shares.made)


def _moved(
    part: Any, axis: Any, here: Any, n: int, pairs: Sequence, edge: float
) -> Any:
    """A part of a neighbor, or `edge` where there is none."""
    import jax.numpy as jnp
    from jax import lax

    if not pairs:
        return jnp.full_like(part, edge)
    moved = lax.ppermute(part, axis, pairs)
    if edge == 0:  # what nobody sends
        return moved
    receivers = {receiver for _, receiver in pairs}
    receives = jnp.asarray([device in receivers for device in range(n)])[here]
    return jnp.where(receives, moved, edge)
