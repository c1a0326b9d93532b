"""`ragged_dot` on a TPU: Pallas kernels that visit the tiles of each group's rows.

A tile of rows is visited once by each group that has rows in it, and a visit's product
is kept for these rows alone. The grid is as long as the visits are, so a group without
rows costs nothing, and a matrix is read where it lies.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

#: Rows of a tile: an eighth of an even load, so that few are computed in vain, between
#: the least and the most.
LEAST, MOST = 128, 512
#: Columns of a tile, the first that divides the width. A narrower width is one tile.
COLUMNS = (512, 256, 128)


def fits(rows: Any, matrices: Any) -> bool:
    """Returns whether the kernels can multiply these, by their shapes and dtypes."""
    return (
        isinstance(rows.shape[0], int)
        and rows.shape[0] > 0
        and all(_columns(width) for width in matrices.shape[1:])
        and rows.dtype == matrices.dtype
        and rows.dtype.name in ("float32", "bfloat16")
    )


def in_tiles(
    rows: Any, matrices: Any, sizes: Any, spare: int, interpret: bool = False
) -> Any:
    """`ragged_dot` of rows `[R, M]` and matrices `[E, M, H]` -> `[R, H]`."""
    return _rows_by_matrices(rows, matrices, sizes, spare, False, interpret)


def gradients_in_tiles(
    rows: Any,
    matrices: Any,
    sizes: Any,
    d_outputs: Any,
    spare: int,
    interpret: bool = False,
) -> Any:
    """Gradients of `ragged_dot` for rows `[R, M]` and matrices `[E, M, H]`."""
    return (
        _rows_by_matrices(d_outputs, matrices, sizes, spare, True, interpret),
        _rows_by_rows(rows, d_outputs, sizes, spare, matrices.dtype, interpret),
    )


class _Visits(NamedTuple):
    """The visits to tiles, in the order of the rows.

    Attributes:
        group: `[V]` int32, the group of each visit.
        tile: `[V]` int32, the number of its tile.
        start: `[E]` int32, the first row of each group.
        end: `[E]` int32, the row after its last one.
        count: Int32 `[1]`, the number of visits. Others are made up.
    """

    group: Any
    tile: Any
    start: Any
    end: Any
    count: Any


def _visits(rows: int, sizes: Any, tile_rows: int, of_all_groups: bool) -> _Visits:
    """The visits of groups that have rows, or of all groups."""
    from jax import numpy as jnp

    end = jnp.cumsum(sizes, dtype=jnp.int32)
    start = end - sizes
    tiles = jnp.where(sizes > 0, -(-end // tile_rows) - start // tile_rows, 0)
    if of_all_groups:
        tiles = jnp.maximum(tiles, 1)
    last = jnp.cumsum(tiles, dtype=jnp.int32)  # [E]
    # A group begins in a tile that another one has visited, or in a new one.
    number = jnp.arange(-(-rows // tile_rows) + sizes.shape[0], dtype=jnp.int32)  # [V]
    group = jnp.sum(number[:, None] >= last, axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, sizes.shape[0] - 1)
    tile = start[group] // tile_rows + number - (last - tiles)[group]
    # An empty group may begin after the last tile.
    tile = jnp.minimum(tile, (rows - 1) // tile_rows)
    return _Visits(group, tile, start, end, last[-1:])


def _rows_by_matrices(
    rows: Any, matrices: Any, sizes: Any, spare: int, transposed: bool, interpret: bool
) -> Any:
    """`[R, .]` by the matrix of each row's group, or by its transpose."""
    import jax
    from jax import numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    inner, outer = matrices.shape[:0:-1] if transposed else matrices.shape[1:]
    m, k, n = _tile_rows(rows, sizes, spare), _columns(inner), _columns(outer)
    visits = _visits(rows.shape[0], sizes, m, of_all_groups=False)
    steps = inner // k

    def kernel(group, tile, start, end, count, rows, matrix, outputs, total):
        visit, step = pl.program_id(1), pl.program_id(2)

        @pl.when(step == 0)
        def _begin():
            total[...] = jnp.zeros_like(total)

        total[...] += jax.lax.dot_general(
            rows[...],
            matrix[...],
            (((1,), (1 if transposed else 0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

        @pl.when(step == steps - 1)
        def _end():
            own = _own(visit, m, group, tile, start, end)
            before = outputs[...].astype(jnp.float32)
            outputs[...] = jnp.where(own, total[...], before).astype(outputs.dtype)

    def matrix_index(column, visit, step, group, *_):
        return (group[visit], *((column, step) if transposed else (step, column)))

    product = _call(
        kernel,
        visits,
        grid=(outer // n, visits.count[0], steps),
        in_specs=[
            pl.BlockSpec(
                (m, k), lambda column, visit, step, _, tile, *__: (tile[visit], step)
            ),
            pl.BlockSpec((None, *((n, k) if transposed else (k, n))), matrix_index),
        ],
        out_spec=pl.BlockSpec(
            (m, n), lambda column, visit, step, _, tile, *__: (tile[visit], column)
        ),
        out_shape=(rows.shape[0], outer),
        dtype=rows.dtype,
        scratch=pltpu.VMEM((m, n), jnp.float32),
        flops=2 * _rows_computed(rows, sizes, spare) * inner * outer,
        interpret=interpret,
    )(rows, matrices)
    # Tiles of no group were not written.
    is_of_a_group = jnp.arange(rows.shape[0]) < visits.end[-1]
    return jnp.where(is_of_a_group[:, None], product, 0)


def _rows_by_rows(
    rows: Any, others: Any, sizes: Any, spare: int, dtype: Any, interpret: bool
) -> Any:
    """`[R, M]` and `[R, H]` -> `[E, M, H]`: products, summed over each group."""
    import jax
    from jax import numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    width, hidden = rows.shape[1], others.shape[1]
    m, k, n = _tile_rows(rows, sizes, spare), _columns(width), _columns(hidden)
    # Also of groups without rows, whose sums are 0.
    visits = _visits(rows.shape[0], sizes, m, of_all_groups=True)

    def kernel(group, tile, start, end, count, rows, others, outputs, total):
        visit = pl.program_id(2)
        now = group[visit]
        last = count[0] - 1
        before = group[jnp.maximum(visit - 1, 0)]
        after = group[jnp.minimum(visit + 1, last)]

        @pl.when((visit == 0) | (before != now))
        def _begin():
            total[...] = jnp.zeros_like(total)

        # Both: 0 times a NaN of another group is NaN.
        own = _own(visit, m, group, tile, start, end)
        left, right = (
            jnp.where(own, x[...].astype(jnp.float32), 0).astype(x.dtype)
            for x in (rows, others)
        )
        total[...] += jax.lax.dot_general(
            left,
            right,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

        @pl.when((visit == last) | (after != now))
        def _end():
            outputs[...] = total[...].astype(outputs.dtype)

    return _call(
        kernel,
        visits,
        grid=(width // k, hidden // n, visits.count[0]),
        in_specs=[
            pl.BlockSpec(
                (m, k), lambda row, column, visit, _, tile, *__: (tile[visit], row)
            ),
            pl.BlockSpec(
                (m, n), lambda row, column, visit, _, tile, *__: (tile[visit], column)
            ),
        ],
        out_spec=pl.BlockSpec(
            (None, k, n),
            lambda row, column, visit, group, *_: (group[visit], row, column),
        ),
        out_shape=(sizes.shape[0], width, hidden),
        dtype=dtype,
        scratch=pltpu.VMEM((k, n), jnp.float32),
        flops=2 * _rows_computed(rows, sizes, spare) * width * hidden,
        interpret=interpret,
    )(rows, others)


def _own(visit: Any, rows: int, group: Any, tile: Any, start: Any, end: Any) -> Any:
    """`[rows, 1]` bool: the rows of a visit's tile that are of its group."""
    import jax
    from jax import numpy as jnp

    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) + tile[visit] * rows
    return (row >= start[group[visit]]) & (row < end[group[visit]])


def _call(
    kernel: Callable,
    visits: _Visits,
    *,
    grid: tuple,
    in_specs: list,
    out_spec: Any,
    out_shape: tuple,
    dtype: Any,
    scratch: Any,
    flops: int,
    interpret: bool,
) -> Callable:
    """The kernel as a function of two arrays."""
    import jax
    from jax import numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def result(*inputs):
        """Has its shape, and differs between devices where one of the inputs does."""
        return jnp.full(out_shape, sum(x.reshape(-1)[0] for x in inputs), dtype)

    def call(left, right):
        inputs = (*visits, left, right)
        size = math.prod(out_shape) * dtype.itemsize
        return pl.pallas_call(
            kernel,
            out_shape=jax.eval_shape(result, *inputs),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(visits),
                grid=grid,
                in_specs=in_specs,
                out_specs=out_spec,
                scratch_shapes=[scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary")
            ),
            cost_estimate=pl.CostEstimate(
                flops=flops,
                bytes_accessed=left.nbytes + right.nbytes + size,
                transcendentals=0,
            ),
            interpret=interpret,
        )(*inputs)

    return call


def _tile_rows(rows: Any, sizes: Any, spare: int) -> int:
    eighth = rows.shape[0] // (8 * sizes.shape[0] * spare)
    return min(max(1 << max(eighth - 1, 0).bit_length(), LEAST), MOST)


def _rows_computed(rows: Any, sizes: Any, spare: int) -> int:
    """Rows of all visits under an even load: a tile with a border counts twice."""
    tile_rows = _tile_rows(rows, sizes, spare)
    tiles = -(-rows.shape[0] // (spare * tile_rows))
    return (tiles + sizes.shape[0] - 1) * tile_rows


def _columns(width: int) -> int:
    """The columns of a tile; 0 if none is of a size that fits."""
    if width <= COLUMNS[0]:
        return width
    return next((size for size in COLUMNS if width % size == 0), 0)
