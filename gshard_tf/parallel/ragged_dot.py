"""Products of ragged groups of rows: each group of rows with a matrix of its own.

`jax.lax.ragged_dot` in blocks. jax expands its own on a CPU, into products of all rows
with all matrices, and a step that is compiled from HLO cannot have it: the way from
HLO to StableHLO lacks the operation. Here the rows of each group are multiplied in
blocks, in loops as long as they must be, so a group without rows costs nothing. (For a
TPU there are kernels, in `ragged_dot_tpu`.)

A block's matrix is copied first: XLA's CPU compiler multiplies no part of an array
where it lies. That is a small part of the time with many rows and most of it with a
few, as in decoding. So a few rows are multiplied one by one, by sums that read a matrix
once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from gshard_tf.parallel import ragged_dot_tpu
from gshard_tf.parallel.permutations import stable_order

#: Rows of the largest and the smallest full block.
LARGEST, SMALLEST = 512, 8
#: A full block has as many rows as an even load, or as many times more.
LARGER = 4
#: Sizes of the last block of a group, in eighths of an even load. They go beyond it, so
#: that a group that is a little larger needs no second block.
EIGHTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
#: Rows that are so few that each is multiplied by itself, and rows of a matrix that are
#: added up in one pass.
FEW, UNROLLED = 8, 16
#: Buffers up to this many times as large may turn out to hold few rows.
MOSTLY_EMPTY = 32


def ragged_dot(
    rows: Any,
    matrices: Any,
    sizes: Any,
    spare: int = 1,
    platform: str | None = None,
) -> Any:
    """Products of the rows of each group with the group's matrix.

    Args:
        rows: `[R, M]`, sorted by group. Rows after those of the last group are of none:
            their results are 0, and their values affect nothing.
        matrices: `[E, M, H]`.
        sizes: `[E]` int32, the number of rows of each group.
        spare: How many times as many rows as usual there is room for. It changes the
            time, no result.
        platform: That of the devices as jax calls it, where it is known. A TPU has
            kernels.

    Returns:
        `[R, H]`.
    """
    import jax

    has_kernels = platform == "tpu" and ragged_dot_tpu.fits(rows, matrices)
    in_blocks = functools.partial(_in_blocks, spare=spare)

    def on_cpu(rows, matrices, sizes):
        if rows.shape[0] <= FEW:
            return _row_by_row(rows, matrices, sizes)
        return jax.lax.cond(
            sizes.sum() <= FEW, _row_by_row, in_blocks, rows, matrices, sizes
        )

    @jax.custom_vjp
    def dot(rows, matrices, sizes):
        count = rows.shape[0]
        if has_kernels:
            return ragged_dot_tpu.in_tiles(rows, matrices, sizes, spare)
        if not isinstance(count, int) or count > MOSTLY_EMPTY * FEW:
            return in_blocks(rows, matrices, sizes)
        return jax.lax.platform_dependent(
            rows, matrices, sizes, cpu=on_cpu, default=in_blocks
        )

    def forward(rows, matrices, sizes):
        return dot(rows, matrices, sizes), (rows, matrices, sizes)

    def backward(saved, d_outputs):
        rows, matrices, sizes = saved
        gradients_of = (
            ragged_dot_tpu.gradients_in_tiles if has_kernels else _gradients_in_blocks
        )
        gradients = gradients_of(rows, matrices, sizes, d_outputs, spare)
        return *gradients, None

    dot.defvjp(forward, backward)
    return dot(rows, matrices, sizes)


def _row_by_row(rows: Any, matrices: Any, sizes: Any) -> Any:
    """`ragged_dot` of a few rows, each by itself. No matrix is copied."""
    from jax import lax
    from jax import numpy as jnp

    ends = jnp.cumsum(sizes)
    _, width, hidden = matrices.shape
    outputs = _zeros((rows.shape[0], hidden), rows.dtype, rows, matrices)

    def add(total, row, group, start, count):
        # In one pass, which fuses with the reading of the matrix.
        for i in range(count):
            part = lax.dynamic_slice(matrices, (group, start + i, 0), (1, 1, hidden))
            factor = lax.dynamic_slice_in_dim(row, start + i, 1)
            total = total + factor * part.reshape(-1).astype(total.dtype)
        return total

    def one_row(i, outputs):
        group = jnp.sum(ends <= i)
        total = outputs[i].astype(jnp.promote_types(outputs.dtype, jnp.float32))
        row = rows[i].astype(total.dtype)
        whole, rest = divmod(width, UNROLLED)
        total = lax.fori_loop(
            0,
            whole,
            lambda j, total: add(total, row, group, j * UNROLLED, UNROLLED),
            total,
        )
        total = add(total, row, group, whole * UNROLLED, rest)
        return outputs.at[i].set(total.astype(outputs.dtype))

    return lax.fori_loop(0, ends[-1], one_row, outputs)


def _in_blocks(rows: Any, matrices: Any, sizes: Any, spare: int) -> Any:
    """`ragged_dot`, block by block."""
    from jax import numpy as jnp

    blocks = _Blocks(rows.shape[0], sizes, spare)
    rows, count = blocks.pad(rows), rows.shape[0]
    shape = (rows.shape[0], matrices.shape[2])
    outputs = _zeros(shape, rows.dtype, rows, matrices)

    def one_block(outputs, matrix, block):
        product = jnp.einsum("RM,MH->RH", block.of(rows), matrix)
        return block.set(outputs, product)

    def full_blocks(outputs, group, blocks):
        # One copy of the matrix for all blocks.
        matrix = matrices[group]
        return blocks(lambda outputs, block: one_block(outputs, matrix, block), outputs)

    outputs = blocks.for_each(
        outputs,
        lambda outputs, group, block: one_block(outputs, matrices[group], block),
        full_blocks,
    )
    return outputs[:count]


def _gradients_in_blocks(
    rows: Any, matrices: Any, sizes: Any, d_outputs: Any, spare: int
) -> Any:
    """Gradients of `ragged_dot` for rows `[R, M]` and matrices `[E, M, H]`."""
    from jax import numpy as jnp

    blocks = _Blocks(rows.shape[0], sizes, spare)
    rows, d_outputs, count = blocks.pad(rows), blocks.pad(d_outputs), rows.shape[0]
    arrays = (rows, matrices, d_outputs)
    d_rows, d_matrices = (_zeros(x.shape, x.dtype, *arrays) for x in arrays[:2])

    def one_block(d_rows, matrix, block):
        """Its part of both."""
        # Both are masked: 0 times a NaN of the next group is NaN.
        left, right = block.own(rows), block.own(d_outputs)
        d_rows = block.set(d_rows, jnp.einsum("RH,MH->RM", right, matrix))
        return d_rows, jnp.einsum("RM,RH->MH", left, right)

    def last_block(state, group, block):
        d_rows, d_matrices = state
        d_rows, d_matrix = one_block(d_rows, matrices[group], block)
        return d_rows, d_matrices.at[group].set(d_matrix)

    def full_blocks(state, group, blocks):
        d_rows, d_matrices = state
        matrix = matrices[group]

        def add(state, block):
            d_rows, total = state
            d_rows, d_matrix = one_block(d_rows, matrix, block)
            return d_rows, total + d_matrix

        d_rows, d_matrix = blocks(add, (d_rows, d_matrices[group]))
        return d_rows, d_matrices.at[group].set(d_matrix)

    d_rows, d_matrices = blocks.for_each((d_rows, d_matrices), last_block, full_blocks)
    return d_rows[:count], d_matrices


def _zeros(shape: tuple, dtype: Any, *arrays: Any) -> Any:
    """Zeros, which differ between the devices of a manual region where `arrays` do.

    jax wants the state of a loop to begin as it goes on.
    """
    from jax import numpy as jnp

    never = jnp.zeros((), bool)
    zero = sum(jnp.where(never, array.reshape(-1)[0], 0) for array in arrays)
    return jnp.full(shape, zero, dtype)


class _Block(NamedTuple):
    """Rows that lie side by side, of which some are of a group.

    Attributes:
        start: Its first row.
        size: The number of its rows.
        inside: `[size, 1]` bool, False for the rows that are of other groups.
    """

    start: Any
    size: int
    inside: Any

    def of(self, rows: Any) -> Any:
        """Its part of an array `[R, .]`."""
        from jax import lax

        return lax.dynamic_slice_in_dim(rows, self.start, self.size)

    def own(self, rows: Any) -> Any:
        """Its part of an array, with zeros for rows of other groups."""
        from jax import numpy as jnp

        return jnp.where(self.inside, self.of(rows), 0)

    def set(self, rows: Any, values: Any) -> Any:
        """The array with other values for the rows of the group."""
        from jax import lax
        from jax import numpy as jnp

        values = jnp.where(self.inside, values, self.of(rows))
        return lax.dynamic_update_slice_in_dim(rows, values, self.start, 0)


class _Blocks:
    """The blocks of rows of each group: full ones, and a last one of a size that fits.

    Large blocks are multiplied faster, and the last one computes few rows in vain.
    Shapes are static, so each size of a last block has a loop over the groups that end
    with it.

    Args:
        rows: R; a symbol of jax where it is not known.
        sizes: `[E]` int32, the rows of each group.
        spare: How many times as many rows as usual there is room for.
    """

    def __init__(self, rows: Any, sizes: Any, spare: int):
        from jax import numpy as jnp

        groups = sizes.shape[0] * spare
        average = rows // groups if isinstance(rows, int) else LARGEST
        fitting = 1 << max(average - 1, 0).bit_length()
        even = min(max(fitting, SMALLEST), LARGEST)
        larger = min(LARGER * even, LARGEST)
        # Multiples of the smallest block.
        unit = 8 * SMALLEST
        self.last_sizes = sorted({-(-even * n // unit) * SMALLEST for n in EIGHTHS})
        # Blocks must fit into the array, where they may lie anywhere.
        most = max(self.last_sizes[-1], larger)
        self.added = 0 if isinstance(rows, int) and rows >= most else most
        self.rows = rows + self.added
        self.ends = jnp.cumsum(sizes)
        start = self.ends - sizes
        # The first row of full blocks, their number and their size.
        self.full: list[tuple[Any, Any, int]] = []
        for size in sorted({larger, even}, reverse=True):
            count = (self.ends - start) // size  # [E]
            if size == even:
                beyond = self.ends - start - self.last_sizes[-1]
                count = jnp.maximum(-(-beyond // size), 0)
            self.full.append((start, count, size))
            start = start + count * size
        self.last_start = start
        # The number of sizes up to the one that fits, 0 for no block, [E].
        smaller = jnp.asarray([0, *self.last_sizes[:-1]])
        self.last_steps = jnp.sum((self.ends - start)[:, None] > smaller, axis=1)

    def pad(self, rows: Any) -> Any:
        """Rows with as many more as make room for a block."""
        from jax import numpy as jnp

        return jnp.pad(rows, ((0, self.added), (0, 0))) if self.added else rows

    def block(self, group: Any, start: Any, size: int) -> _Block:
        """The block of a group's rows from `start` on."""
        from jax import numpy as jnp

        first = jnp.minimum(start, self.rows - size)
        row = first + jnp.arange(size)
        inside = (row >= start) & (row < self.ends[group])
        return _Block(first, size, inside[:, None])

    def for_each(self, state: Any, last_block: Callable, full_blocks: Callable) -> Any:
        """Passes `state` through the blocks of all groups.

        Args:
            state: A nest of arrays.
            last_block: From the state, a group and its last block, to the state.
            full_blocks: From the state, a group, and a loop over its full blocks, to
                the state. The loop takes a function from a state and a block to the
                state, and the first one.
        """
        from jax import lax
        from jax import numpy as jnp

        order = stable_order(self.last_steps, len(self.last_sizes))
        before = jnp.sum(self.last_steps == 0)
        for steps, size in enumerate(self.last_sizes, 1):
            count = jnp.sum(self.last_steps == steps)

            def last(i, state, size=size):
                group = order[i]
                block = self.block(group, self.last_start[group], size)
                return last_block(state, group, block)

            state = lax.fori_loop(before, before + count, last, state)
            before += count

        for starts, counts, size in self.full:
            state = self._for_each_full(state, starts, counts, size, full_blocks)
        return state

    def _for_each_full(
        self, state: Any, starts: Any, counts: Any, size: int, full_blocks: Callable
    ) -> Any:
        """Passes `state` through the groups that have full blocks of this size."""
        from jax import lax
        from jax import numpy as jnp

        order = stable_order((counts == 0).astype(jnp.int32), 1)

        def one_group(i, state):
            group = order[i]
            start, count = starts[group], counts[group]

            def blocks(fn, state):
                def one_block(j, state):
                    return fn(state, self.block(group, start + j * size, size))

                return lax.fori_loop(0, count, one_block, state)

            return full_blocks(state, group, blocks)

        return lax.fori_loop(0, jnp.sum(counts > 0), one_group, state)
