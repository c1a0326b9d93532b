"""Attention over a length that is split over devices, as a ring.

Each device has the queries, keys and values of its part of the sequence. Keys and
values go around the ring of devices, and each device adds what its queries see of
them: the softmax is accumulated (Rabe and Staats, arXiv 2112.05682; Liu et al., "Ring
Attention with Blockwise Transformers", arXiv 2310.01889). The gradient is a second
ring, which computes the weights again, and in which queries go around.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from gshard_tf.compat.tf_gradients import gradient_scope
from gshard_tf.parallel.dropout import dropped
from gshard_tf.sharding.manual import manual, mesh_axis

_QKV = ("batch", "length", "heads", None)
_IDS = ("batch", "length")
_STATISTICS = ("batch", "heads", "length")

# Finite, so that a row without any visible position gives no NaN.
_HIDDEN = -1e30


class _Options(NamedTuple):
    is_causal: bool
    has_segments: bool
    dropout: float


class _Queries(NamedTuple):
    """A device's queries `[B, T, N, D]`, and their ids `[B, T]` or None."""

    values: Any
    ids: Any


class _Keys(NamedTuple):
    """A device's keys and values `[B, L, N, D]`, and their ids `[B, L]` or None."""

    keys: Any
    values: Any
    ids: Any


@tf.autograph.experimental.do_not_convert
def ring_attention(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    causal: bool = False,
    segment_ids: tuple[tf.Tensor, tf.Tensor] | None = None,
    dropout: float = 0.0,
    seed: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns softmax attention, exactly, over a length that is split over devices.

    Rules for `batch`, `length` and `heads` say which dimensions are split. A device
    stores the scores of its own queries and one device's keys at a time: `[B, N, T, L]`
    with T and L divided by the devices. It sends its keys and values on as often as
    there are other devices. The gradient keeps queries, keys, values and outputs only.

    Args:
        query: `[B, T, N, D]`, already scaled.
        key: `[B, L, N, D]`.
        value: `[B, L, N, D]`.
        causal: Whether position t sees only positions up to t. (Blocks of scores that
            are hidden as a whole are computed all the same.)
        segment_ids: Ids of the queries `[B, T]` and of the keys `[B, L]`, ints: a query
            sees the keys with its own id. None: all.
        dropout: Rate on the attention weights.
        seed: Integer tensor `[2]` for the dropout. The mask is the one that
            `gshard_tf.random.uniform(seed, [B, N, T, L])` gives, on any number of
            devices.

    Returns:
        `[B, T, N, D]`.

    Raises:
        ValueError: for a dropout without a seed, shapes that are not static, or
            dimensions that do not divide by the devices that split them.
    """
    if dropout and seed is None:
        raise ValueError(
            f"`seed` must be given with dropout. Received: dropout={dropout}, seed=None"
        )
    options = _Options(causal, segment_ids is not None, float(dropout))
    extra = [tf.cast(ids, tf.int32) for ids in segment_ids or ()]
    if dropout:
        extra.append(tf.cast(seed, tf.uint32))
    forward, backward = _regions(options)
    scope = gradient_scope()

    @tf.custom_gradient
    def attend(*tensors):
        outputs, maximum, total = forward(*tensors)

        def gradient(upstream):
            with tf.name_scope(scope):
                found = backward(*tensors, outputs, maximum, total, upstream)
            return [*found, *(None for _ in extra)]

        return outputs, gradient

    return attend(query, key, value, *extra)


@functools.lru_cache(maxsize=64)
def _regions(options: _Options) -> tuple[Callable, Callable]:
    """The ring and that of its gradient: the same for all layers alike."""
    ids = [_IDS, _IDS] if options.has_segments else []
    seed = [(None,)] if options.dropout else []
    inputs = [_QKV, _QKV, _QKV, *ids, *seed]
    results = (_QKV, _STATISTICS, _STATISTICS)
    gradients = (_QKV,) * 3
    return (
        manual(functools.partial(_forward, options), inputs, results),
        manual(
            functools.partial(_backward, options),
            [*inputs, *results, _QKV],
            gradients,
        ),
    )


def _forward(options: _Options, query: Any, key: Any, value: Any, *extra: Any) -> Any:
    """A device's outputs, and the maximum and the sum of its rows of scores."""
    import jax.numpy as jnp
    from jax import lax

    here, n, pass_on = _ring()
    query_ids, key_ids, seed = _unpack(options, extra)
    queries = _Queries(query, query_ids)

    def attend(source, keys, maximum, total, outputs):
        block = _Block(options, queries, keys, here, source, n)
        scores, _ = block.scores()
        highest = jnp.maximum(maximum, scores.max(-1))  # [B, N, T]
        weights = jnp.exp(scores - highest[..., None])
        old = jnp.exp(maximum - highest)
        kept = block.dropped(weights, seed).astype(value.dtype)
        new = _matmul("BNTL,BLND->BNTD", kept, keys.values)
        total = total * old + weights.sum(-1)
        return highest, total, outputs * old[..., None] + new

    def turn(i, carry):
        keys, *state = carry
        keys = pass_on(keys)
        return keys, *attend((here - i) % n, keys, *state)

    # Made of an array, so that jax knows over which axes they are split.
    zeros = jnp.einsum("BTND->BNTD", query).astype(jnp.float32) * 0
    keys = _Keys(key, value, key_ids)
    state = attend(here, keys, zeros[..., 0] + 2 * _HIDDEN, zeros[..., 0], zeros)
    if n > 1:
        _, *state = lax.fori_loop(1, n, turn, (keys, *state))
    maximum, total, outputs = state
    outputs = jnp.einsum("BNTD->BTND", outputs / total[..., None])
    return outputs.astype(query.dtype), maximum, total


def _backward(options: _Options, query: Any, key: Any, value: Any, *rest: Any) -> Any:
    """A device's gradients of queries, keys and values."""
    import jax.numpy as jnp
    from jax import lax

    here, n, pass_on = _ring()
    *extra, outputs, maximum, total, upstream = rest
    query_ids, key_ids, seed = _unpack(options, extra)
    keys = _Keys(key, value, key_ids)

    def pull(source, traveling, to_key, to_value):
        queries, to_query, upstream, maximum, total, delta = traveling
        block = _Block(options, queries, keys, source, here, n)
        scores, visible = block.scores()
        weights = jnp.exp(scores - maximum[..., None]) / total[..., None]
        kept = block.dropped(weights, seed).astype(value.dtype)
        to_value = to_value + _matmul("BNTL,BTND->BLND", kept, upstream)
        to_kept = _matmul("BTND,BLND->BNTL", upstream, value)
        to_scores = weights * (block.dropped(to_kept, seed) - delta[..., None])
        if visible is not None:
            to_scores = jnp.where(visible, to_scores, 0)
        to_scores = to_scores.astype(query.dtype)
        to_query = to_query + _matmul("BNTL,BLND->BTND", to_scores, key)
        to_key = to_key + _matmul("BNTL,BTND->BLND", to_scores, queries.values)
        traveling = (queries, to_query, upstream, maximum, total, delta)
        return traveling, to_key, to_value

    def turn(i, carry):
        traveling, *sums = carry
        return pull((here - i) % n, pass_on(traveling), *sums)

    # The sum over keys of each weight times its gradient.
    delta = _matmul("BTND,BTND->BNT", upstream, outputs)
    zeros = [x.astype(jnp.float32) * 0 for x in (query, key, value)]
    queries = _Queries(query, query_ids)
    traveling = (queries, zeros[0], upstream, maximum, total, delta)
    carry = pull(here, traveling, *zeros[1:])
    if n > 1:
        carry = lax.fori_loop(1, n, turn, carry)
    (_, to_query, *_), to_key, to_value = carry
    gradients = (pass_on(to_query), to_key, to_value)  # home again
    return tuple(x.astype(query.dtype) for x in gradients)


class _Block(NamedTuple):
    """The scores of one device's queries and one device's keys.

    Attributes:
        options: Those of the attention.
        queries: The queries.
        keys: The keys.
        row: The number of the device that the queries belong to.
        column: The number of the device that the keys belong to.
        n: The number of devices of the ring.
    """

    options: _Options
    queries: _Queries
    keys: _Keys
    row: Any
    column: Any
    n: int

    def positions(self) -> tuple[Any, Any]:
        """The positions of the queries `[T]`, and of the keys `[L]`."""
        import jax.numpy as jnp

        t, size = self.queries.values.shape[1], self.keys.keys.shape[1]
        return self.row * t + jnp.arange(t), self.column * size + jnp.arange(size)

    def scores(self) -> tuple[Any, Any]:
        """Scores `[B, N, T, L]`, float32, and which of them are visible, or None."""
        import jax.numpy as jnp

        scores = _matmul("BTND,BLND->BNTL", self.queries.values, self.keys.keys)
        visible = None
        if self.options.has_segments:
            visible = self.queries.ids[:, None, :, None]
            visible = visible == self.keys.ids[:, None, None, :]
        if self.options.is_causal:
            query_position, key_position = self.positions()
            past = key_position[None, :] <= query_position[:, None]
            visible = past if visible is None else visible & past
        if visible is not None:
            scores = jnp.where(visible, scores, _HIDDEN)
        return scores, visible

    def dropped(self, weights: Any, seed: Any) -> Any:
        """`[B, N, T, L]` after dropout."""
        import jax.numpy as jnp
        from jax import lax

        if not self.options.dropout:
            return weights
        index, shape = [], []
        for name, size in zip(("batch", "heads"), weights.shape, strict=False):
            axis = mesh_axis(name)
            index.append(lax.axis_index(axis) * size + jnp.arange(size))
            shape.append(lax.axis_size(axis) * size)
        index += self.positions()
        shape += [self.n * size for size in weights.shape[2:]]
        return dropped(weights, self.options.dropout, seed, index, shape)


def _ring() -> tuple[Any, int, Callable]:
    """This device's number, their number, and a function that sends to the next."""
    import jax
    from jax import lax

    axis = mesh_axis("length")
    n = lax.axis_size(axis)
    to_next = [(i, (i + 1) % n) for i in range(n)]

    def pass_on(values):
        if n == 1:
            return values
        return jax.tree.map(lambda x: lax.ppermute(x, axis, to_next), values)

    return lax.axis_index(axis), n, pass_on


def _unpack(options: _Options, extra: Any) -> tuple[Any, Any, Any]:
    """Ids of queries and of keys, and the seed, or None."""
    ids = extra[:2] if options.has_segments else (None, None)
    return *ids, extra[-1] if options.dropout else None


def _matmul(equation: str, a: Any, b: Any) -> Any:
    import jax.numpy as jnp

    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
