"""Rows that are sorted by expert, from tokens and back, on any mesh.

The mechanism of dropless experts (MegaBlocks, arXiv 2211.15841): each expert multiplies
as many rows as it gets. Devices that share the experts exchange rows by an all-to-all
of their own, in manual regions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from gshard_tf.compat.tf_call_module import jax_call
from gshard_tf.parallel import ragged_exchange
from gshard_tf.parallel.ragged_dot import ragged_dot
from gshard_tf.parallel.ragged_exchange import Maps
from gshard_tf.sharding.annotations import annotate
from gshard_tf.sharding.manual import PLATFORMS, manual, mesh_axis
from gshard_tf.sharding.mesh import active_mesh


class _Layout(NamedTuple):
    """The axes that a mesh splits; None for dimensions that are whole.

    Attributes:
        rows: Logical axis of tokens and of rows, over the devices of experts, too.
        expert: Logical axis of experts.
        mlp: Logical axis of the hidden layer.
        parts: The number of devices along the axes of rows.
        sharing: The number of devices along the axes of experts.
        platform: Of the devices; None where they are those of this process.
    """

    rows: str | None = None
    expert: str | None = None
    mlp: str | None = None
    parts: int = 1
    sharing: int = 1
    platform: str | None = None

    @classmethod
    def for_tensor(cls, tensor: tf.Tensor) -> "_Layout":
        """The layout in the program that a tensor is of."""
        active = active_mesh()
        # A step of unknown shapes is traced for the shapes of its results only.
        is_partitioned = tf.is_symbolic_tensor(tensor) and (
            tensor.shape.is_fully_defined()
        )
        if active is None or not is_partitioned:
            return cls()
        rows, expert, mlp = (
            name if active.parts(name) > 1 else None
            for name in ("expert_row", "expert", "mlp")
        )
        return cls(
            rows,
            expert,
            mlp,
            active.parts("expert_row"),
            active.parts("expert"),
            PLATFORMS[active.mesh.device_type()],
        )

    def region(self, fn: Callable, in_axes: Sequence, out_axes: Any) -> Callable:
        """A function of jax as one of tensors, of which each device has its part."""
        if self.rows is None and self.mlp is None:
            return functools.partial(jax_call, fn, platform=self.platform)
        return manual(fn, in_axes, out_axes)

    @property
    def by_token(self) -> Sequence:
        """The axes of what has a row for each token."""
        return (self.rows, None)

    @property
    def by_row(self) -> Sequence:
        """The axes of rows `[T, n*K, M]`, and of choices `[T, K, M]`."""
        return (self.rows, None, None)

    @property
    def maps(self) -> Maps:
        """The axes of the maps."""
        rows = self.by_token
        return Maps(rows, rows, rows, rows, rounds=())

    def axes_without_experts(self) -> tuple[str, ...]:
        """The mesh axes along which devices have the same experts, within a region."""
        row_axes, expert_axes = (
            () if name is None else _names(mesh_axis(name))
            for name in (self.rows, self.expert)
        )
        return tuple(axis for axis in row_axes if axis not in expert_axes)

    def axis(self) -> str | tuple[str, ...] | None:
        """The mesh axis to exchange rows over, within a region."""
        return None if self.expert is None else mesh_axis(self.expert)


class RaggedDispatch:
    """Rows for the experts, from tokens and back.

    R = n*T*K rows, where n devices share the experts: as many as there may be. Rows of
    an expert are in the order of the tokens; those that are for none come last, are 0,
    and cost nothing. `sizes` has the number of each expert's rows.

    Args:
        expert_index: `[T, K]` int32, the experts of each token; E for none.
        num_experts: E.

    Raises:
        ValueError: when E does not divide by the devices that share the experts.
    """

    def __init__(self, expert_index: tf.Tensor, num_experts: int):
        self.layout = layout = _Layout.for_tensor(expert_index)
        if num_experts % layout.sharing:
            raise ValueError(
                "Dropless experts must divide by the devices that the rules split them "
                f"over. Received: num_experts={num_experts}, {layout.sharing} devices"
            )
        self._tokens = _sizes(expert_index)[0]
        # Manual regions have parts of one size.
        self._added = -self._tokens % layout.parts if layout.parts > 1 else 0
        if self._added:
            expert_index = tf.pad(
                expert_index, [[0, self._added], [0, 0]], constant_values=num_experts
            )
        maps, self.sizes = _maps_region(layout, num_experts)(expert_index)
        self.maps = Maps(*maps)

    def rows(self, tokens: tf.Tensor) -> tf.Tensor:
        """Tokens `[T, M]` -> the experts' rows, `[R, M]`."""
        if self._added:
            tokens = tf.pad(tokens, [[0, self._added], [0, 0]])
        rows = self._move(ragged_exchange.rows_of_tokens, tokens)
        return tf.reshape(rows, [-1, tokens.shape[-1]])

    def combine(self, rows: tf.Tensor) -> tf.Tensor:
        """The experts' rows `[R, M]` -> those of each token's choices, `[T, K, M]`."""
        tokens, arrived = _sizes(self.maps.row_of_arrival)  # n*K
        # The width by number: -1 would be undefined for an empty batch.
        rows = tf.reshape(rows, [tokens, arrived, rows.shape[-1]])
        choices = self._move(ragged_exchange.choices_of_rows, rows)
        return choices[: self._tokens] if self._added else choices

    def choices(self) -> tf.Tensor:
        """The number of the choice that each row is for, `[R]` int32."""
        tokens, choices = _sizes(self.maps.slot_of_choice)
        number = tf.reshape(tf.range(tokens * choices), [tokens, choices, 1])
        number = annotate(number, self.layout.by_row)
        rows = self._move(ragged_exchange.rows_of_choices, number)
        return tf.reshape(rows, [-1])

    def dot(self, rows: tf.Tensor, weight: Any, axes: Sequence[str]) -> tf.Tensor:
        """`rows` `[R, M]` by the experts' `weight` `[E, M, H]` -> `[R, H]`."""
        left, right = (name if name == self.layout.mlp else None for name in axes[1:])
        product = _product_region(self.layout, left, right)
        return product(rows, tf.convert_to_tensor(weight), self.sizes)

    def _move(self, fn: Callable, tensor: tf.Tensor) -> tf.Tensor:
        return _moving_region(self.layout, fn, tensor.shape.rank)(tensor, *self.maps)


# Regions are the same for all layers alike, so that each is traced once.


@functools.lru_cache(maxsize=64)
def _maps_region(layout: _Layout, num_experts: int) -> Callable:
    def maps_of(expert_index):
        import jax

        axis, copies = layout.axis(), layout.axes_without_experts()
        maps, sizes = ragged_exchange.index_maps(expert_index, num_experts, axis)
        if axis is not None and copies:  # one number for all
            maps = maps._replace(rounds=jax.lax.pmax(maps.rounds, copies))
        return maps, sizes

    return layout.region(maps_of, [layout.by_token], (layout.maps, (layout.rows,)))


@functools.lru_cache(maxsize=64)
def _moving_region(layout: _Layout, fn: Callable, rank: int) -> Callable:
    """`fn` of a tensor of some rank, the maps and the axis."""

    def move(tensor, *maps):
        return fn(tensor, Maps(*maps), layout.axis())

    axes = (layout.rows, *[None] * (rank - 1))
    return layout.region(move, [axes, *layout.maps], layout.by_row)


@functools.lru_cache(maxsize=64)
def _product_region(layout: _Layout, left: str | None, right: str | None) -> Callable:
    """The product of rows with matrices, whose dimensions have these axes."""

    def product(rows, matrices, sizes):
        import jax

        # The gradients of what several devices share are sums over them.
        if right is not None:
            rows = jax.lax.pcast(rows, mesh_axis(right), to="varying")
        copies = layout.axes_without_experts()
        if copies:
            matrices = jax.lax.pcast(matrices, copies, to="varying")
        # There is room for the rows of all devices that share the experts.
        spare, platform = layout.sharing, layout.platform
        outputs = ragged_dot(rows, matrices, sizes, spare, platform)
        # A device's part of the sum over a split width.
        return outputs if left is None else jax.lax.psum(outputs, mesh_axis(left))

    in_axes = [(layout.rows, left), (layout.expert, left, right), (layout.rows,)]
    return layout.region(product, in_axes, (layout.rows, right))


def _names(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis


def _sizes(matrix: tf.Tensor) -> tuple[Any, int]:
    """The shape of a matrix of known width, whose rows may be of unknown number."""
    rows, width = matrix.shape
    return (tf.shape(matrix)[0] if rows is None else rows), width
