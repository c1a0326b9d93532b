"""Products of ragged groups of rows: each group of rows with a matrix of its own.

`jax.lax.ragged_dot` in blocks. jax expands its own on a CPU, into products of all rows
with all matrices, and a step that is compiled from HLO cannot have it: the way from
HLO to StableHLO lacks the operation. Here the rows of each group are multiplied in
blocks, in loops as long as they must be, so a group without rows costs nothing.

A block's matrix is copied first: XLA's CPU compiler multiplies no part of an array
where it lies. That is a small part of the time with many rows and most of it with a
few, as in decoding. So a few rows are multiplied one by one, by sums that read a matrix
once.
"""

from collections.abc import Callable
from typing import Any

from gshard_tf.parallel.permutations import stable_order

#: Rows of the largest and the smallest block.
LARGEST, SMALLEST = 256, 8
#: Sizes of the last block of a group: it computes an eighth of a block in vain at most.
STEPS = 8
#: Rows that are so few that each is multiplied by itself, and rows of a matrix that are
#: added up in one pass.
FEW, UNROLLED = 8, 16
#: Buffers up to this many times as large may turn out to hold few rows.
MOSTLY_EMPTY = 32


def ragged_dot(rows: Any, matrices: Any, sizes: Any) -> Any:
    """Products of the rows of each group with the group's matrix.

    Args:
        rows: `[R, M]`, sorted by group. Rows after those of the last group are of none:
            their results are 0, and their values affect nothing.
        matrices: `[E, M, H]`.
        sizes: `[E]` int32, the number of rows of each group.

    Returns:
        `[R, H]`.
    """
    import jax

    def in_blocks(rows, matrices, sizes):
        return _rows_by_matrices(rows, matrices, sizes, "RM,MH->RH")

    def on_cpu(rows, matrices, sizes):
        if rows.shape[0] <= FEW:
            return _row_by_row(rows, matrices, sizes)
        return jax.lax.cond(
            sizes.sum() <= FEW, _row_by_row, in_blocks, rows, matrices, sizes
        )

    @jax.custom_vjp
    def dot(rows, matrices, sizes):
        count = rows.shape[0]
        if not isinstance(count, int) or count > MOSTLY_EMPTY * FEW:
            return in_blocks(rows, matrices, sizes)
        return jax.lax.platform_dependent(
            rows, matrices, sizes, cpu=on_cpu, default=in_blocks
        )

    def forward(rows, matrices, sizes):
        return dot(rows, matrices, sizes), (rows, matrices, sizes)

    def backward(saved, d_outputs):
        rows, matrices, sizes = saved
        d_rows = _rows_by_matrices(d_outputs, matrices, sizes, "RH,MH->RM")
        return d_rows, _rows_by_rows(rows, d_outputs, sizes), None

    dot.defvjp(forward, backward)
    return dot(rows, matrices, sizes)


def _row_by_row(rows: Any, matrices: Any, sizes: Any) -> Any:
    """`ragged_dot` of a few rows, each by itself. No matrix is copied."""
    from jax import lax
    from jax import numpy as jnp

    ends = jnp.cumsum(sizes)
    _, width, hidden = matrices.shape
    outputs = _zeros((rows.shape[0], hidden), rows, matrices)

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


def _rows_by_matrices(rows: Any, matrices: Any, sizes: Any, equation: str) -> Any:
    """`[R, .]` by the matrix of each row's group.

    Args:
        rows: The rows, sorted by group.
        matrices: `[E, M, H]`.
        sizes: `[E]` int32.
        equation: Of a block of rows and a matrix.
    """
    from jax import lax
    from jax import numpy as jnp

    blocks = _Blocks(rows.shape[0], sizes)
    padded = blocks.pad(rows)
    width = matrices.shape[2 if equation.endswith("H") else 1]
    outputs = _zeros((padded.shape[0], width), rows, matrices)

    def one_block(outputs, group, matrix, start, size):
        block = lax.dynamic_slice_in_dim(padded, start, size)
        product = jnp.einsum(equation, block, matrix)
        before = lax.dynamic_slice_in_dim(outputs, start, size)
        product = jnp.where(blocks.is_inside(group, start, size), product, before)
        return lax.dynamic_update_slice_in_dim(outputs, product, start, 0)

    def last_block(outputs, group, start, size):
        return one_block(outputs, group, matrices[group], start, size)

    def full_blocks(outputs, group, count, start, size):
        # One copy of the matrix for all blocks.
        matrix = matrices[group]
        return lax.fori_loop(
            0,
            count,
            lambda i, outputs: one_block(
                outputs, group, matrix, start + i * size, size
            ),
            outputs,
        )

    outputs = blocks.for_each(outputs, last_block, full_blocks)
    return outputs[: rows.shape[0]]


def _rows_by_rows(rows: Any, others: Any, sizes: Any) -> Any:
    """`[R, M]` and `[R, H]` -> `[E, M, H]`: products, summed over each group."""
    from jax import lax
    from jax import numpy as jnp

    blocks = _Blocks(rows.shape[0], sizes)
    rows, others = blocks.pad(rows), blocks.pad(others)
    outputs = _zeros((sizes.shape[0], rows.shape[1], others.shape[1]), rows, others)

    def product(group, start, size):
        # Both: 0 times a NaN of the next group is NaN.
        inside = blocks.is_inside(group, start, size)
        left, right = (
            jnp.where(inside, lax.dynamic_slice_in_dim(x, start, size), 0)
            for x in (rows, others)
        )
        return jnp.einsum("RM,RH->MH", left, right)

    def last_block(outputs, group, start, size):
        return outputs.at[group].set(product(group, start, size))

    def full_blocks(outputs, group, count, start, size):
        total = lax.fori_loop(
            0,
            count,
            lambda i, total: total + product(group, start + i * size, size),
            outputs[group],
        )
        return outputs.at[group].set(total)

    return blocks.for_each(outputs, last_block, full_blocks)


def _zeros(shape: tuple, *arrays: Any) -> Any:
    """Zeros, which differ between the devices of a manual region where `arrays` do.

    jax wants the state of a loop to begin as it goes on.
    """
    from jax import numpy as jnp

    never = jnp.zeros((), bool)
    zero = sum(jnp.where(never, array.reshape(-1)[0], 0) for array in arrays)
    return jnp.full(shape, zero)


class _Blocks:
    """The blocks of rows of each group: full ones, and a last one of a size that fits.

    Shapes are static, so each size of a last block has a loop over the groups that end
    with it.

    Args:
        rows: R; a symbol of jax where it is not known.
        sizes: `[E]` int32, the rows of each group.
    """

    def __init__(self, rows: Any, sizes: Any):
        from jax import numpy as jnp

        average = rows // sizes.shape[0] if isinstance(rows, int) else LARGEST
        fitting = 1 << max(average - 1, 0).bit_length()
        self.largest = min(max(fitting, SMALLEST), LARGEST)
        self.step = max(self.largest // STEPS, SMALLEST)
        self.ends = jnp.cumsum(sizes)
        self.starts = self.ends - sizes
        # The last block of a group that has rows is never empty.
        self.full = jnp.maximum(sizes - 1, 0) // self.largest  # [E]
        self.last_start = self.starts + self.full * self.largest
        self.last_steps = -((self.last_start - self.ends) // self.step)  # [E]

    def pad(self, rows: Any) -> Any:
        """Rows with as many more as a block may reach beyond them."""
        from jax import numpy as jnp

        return jnp.pad(rows, ((0, self.largest), (0, 0)))

    def is_inside(self, group: Any, start: Any, size: int) -> Any:
        """`[size, 1]` bool, False for the rows of a block that are of other groups."""
        from jax import numpy as jnp

        return (start + jnp.arange(size) < self.ends[group])[:, None]

    def for_each(self, state: Any, last_block: Callable, full_blocks: Callable) -> Any:
        """Passes `state` through the blocks of all groups.

        Args:
            state: An array.
            last_block: From the state, a group, and the first row and the size of its
                last block, to the state.
            full_blocks: From the state, a group, the number of its full blocks, and the
                first row and the size of the first one, to the state.
        """
        from jax import lax
        from jax import numpy as jnp

        steps_of_full = self.largest // self.step
        order = stable_order(self.last_steps, steps_of_full)
        before = jnp.sum(self.last_steps == 0)
        for steps in range(1, steps_of_full + 1):
            count = jnp.sum(self.last_steps == steps)

            def last(i, state, size=steps * self.step):
                group = order[i]
                return last_block(state, group, self.last_start[group], size)

            state = lax.fori_loop(before, before + count, last, state)
            before += count

        order_of_full = stable_order((self.full == 0).astype(jnp.int32), 1)

        def full(i, state):
            group = order_of_full[i]
            count, start = self.full[group], self.starts[group]
            return full_blocks(state, group, count, start, self.largest)

        return lax.fori_loop(0, jnp.sum(self.full > 0), full, state)
