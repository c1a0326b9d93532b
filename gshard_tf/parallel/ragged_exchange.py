"""Tokens sorted by expert, and back, on one device or on many: functions of jax.

R = T*K choices of experts become rows. A device sends each other device the rows for
its experts, and sorts what it receives by expert. Its buffer has room for the worst
case, that all rows of all n devices are for it: n*R rows. Sorting is stable, so an
expert gets its rows in the order of the tokens, however many devices there are.

Shapes are static, and an all-to-all of the worst case would send n times the rows of an
even load. So rows are sent in rounds, each with room for a little more than an even
load, and there are as many rounds as the fullest pair of devices needs: one, mostly.
"""

import math
from typing import Any, NamedTuple

from gshard_tf.parallel.permutations import inverse, stable_order

#: Rows that a round sends from a device to another, over those of an even load: R / n.
ROOM = 1.25


class Maps(NamedTuple):
    """Places of rows; -1 for none.

    Attributes:
        choice_of_slot: `[T, n*K]` int32, the choice that is sent in each place.
        slot_of_choice: `[T, K]` int32, the inverse.
        arrival_of_row: `[T, n*K]` int32, the received place that each row, sorted by
            expert, comes from.
        row_of_arrival: `[T, n*K]` int32, the inverse.
        rounds: Int32, the number of all-to-alls that send all rows: the same on all
            devices.
    """

    choice_of_slot: Any
    slot_of_choice: Any
    arrival_of_row: Any
    row_of_arrival: Any
    rounds: Any


def index_maps(expert_index: Any, num_experts: int, axis: Any) -> tuple[Maps, Any]:
    """The maps, and the number of rows of each of the device's experts, `[E / n]`.

    Args:
        expert_index: `[T, K]` int32, the experts of the device's tokens; E for none.
        num_experts: E.
        axis: Mesh axis of the devices; None for one device.
    """
    import jax
    from jax import numpy as jnp

    tokens = expert_index.shape[0]
    chosen = expert_index.reshape(-1)  # [R]
    devices = 1 if axis is None else jax.lax.axis_size(axis)
    choices, own = chosen.shape[0], num_experts // devices
    order = stable_order(chosen, num_experts)
    place = inverse(order)
    sizes = _counts(chosen, num_experts)  # [E]
    starts = jnp.pad(jnp.cumsum(sizes), (1, 0))  # [E + 1]

    # Sent to a device: rows that lie side by side in this order.
    first = starts[:-1:own]  # [n]
    device = jnp.minimum(chosen // own, devices - 1)
    slot = device * choices + place - first[device]
    slot_of_choice = jnp.where(chosen < num_experts, slot, -1)
    within = jnp.arange(choices)
    sent = starts[own::own] - first  # [n]
    source = jnp.minimum(first[:, None] + within, choices - 1)
    choice_of_slot = jnp.where(within < sent[:, None], order[source], -1)  # [n, R]

    if axis is None:
        arrivals = jnp.where(within < starts[-1], within, -1)
        arrival_of_row = row_of_arrival = arrivals
        rounds = jnp.int32(0)
    else:
        fullest = jax.lax.pmax(jnp.max(sent), axis)
        rounds = -(-fullest // _rows_of_round(choices, devices))
        received = jax.lax.all_to_all(sizes.reshape(devices, own), axis, 0, 0)
        ends = jnp.cumsum(received, axis=1)  # [n, E / n]
        behind = within >= ends[..., None]  # [n, E / n, R]
        expert = jnp.sum(behind, axis=1).reshape(-1)  # [n*R], E / n for none
        order = stable_order(expert, own)
        place = inverse(order)
        arrival_of_row = jnp.where(expert[order] < own, order, -1)
        row_of_arrival = jnp.where(expert < own, place, -1)
        sizes = jnp.sum(received, axis=0)

    def by_token(x):
        return x.reshape(tokens, -1).astype(jnp.int32)

    maps = Maps(
        by_token(choice_of_slot),
        by_token(slot_of_choice),
        by_token(arrival_of_row),
        by_token(row_of_arrival),
        rounds.astype(jnp.int32),
    )
    return maps, sizes.astype(jnp.int32)


def _counts(values: Any, number: int) -> Any:
    """The number of times that each number below `number` is in `values` `[R]`."""
    from jax import numpy as jnp

    # Sums along the last dimension, which is what XLA is fast at on a CPU.
    found = jnp.arange(number)[:, None] == values
    return jnp.sum(found, axis=1, dtype=jnp.int32)


def rows_of_tokens(tokens: Any, maps: Maps, axis: Any) -> Any:
    """Tokens `[T, M]` -> the rows of the device's experts, `[T, n*K, M]`."""
    import jax

    choices = maps.slot_of_choice.shape[1]

    @jax.custom_vjp
    def there(tokens, maps):
        slots = maps.choice_of_slot
        token = jax.numpy.where(slots < 0, -1, slots // choices)
        return _send(tokens, token, maps, axis)

    def backward(maps, d_rows):
        return choices_of_rows(d_rows, maps, axis).sum(1), None

    there.defvjp(lambda tokens, maps: (there(tokens, maps), maps), backward)
    return there(tokens, maps)


def rows_of_choices(choices: Any, maps: Maps, axis: Any) -> Any:
    """Rows `[T, K, M]` of the choices -> those of the experts, `[T, n*K, M]`."""
    return _send(_flat(choices), maps.choice_of_slot, maps, axis)


def choices_of_rows(rows: Any, maps: Maps, axis: Any) -> Any:
    """Rows `[T, n*K, M]` -> what each token gets for its choices, `[T, K, M]`."""
    import jax

    @jax.custom_vjp
    def back(rows, maps):
        to, back = maps.row_of_arrival, maps.slot_of_choice
        return _exchange(_flat(rows), to, back, maps.rounds, axis)

    def backward(maps, d_choices):
        return rows_of_choices(d_choices, maps, axis), None

    back.defvjp(lambda rows, maps: (back(rows, maps), maps), backward)
    return back(rows, maps)


def _send(values: Any, value_of_slot: Any, maps: Maps, axis: Any) -> Any:
    """Sends rows of `values` `[., M]` to their experts: `[T, n*K, M]`."""
    if axis is None:
        return _take(values, value_of_slot)
    return _exchange(values, value_of_slot, maps.arrival_of_row, maps.rounds, axis)


def _rows_of_round(choices: int, devices: int) -> int:
    """The rows that a round sends from a device to another."""
    return min(choices, math.ceil(ROOM * choices / devices))


def _exchange(rows: Any, sent: Any, taken: Any, rounds: Any, axis: Any) -> Any:
    """Sends rows `[., M]` at `sent`, and returns those that came at `taken`.

    Args:
        rows: The rows of this device.
        sent: `[T, n*K]`, its n parts for the n devices; -1 for none, last in each part.
        taken: `[T, .]`, places in what came, of n parts from the n devices, `[n*R]`; -1
            for a row of zeros.
        rounds: See `Maps`.
        axis: The mesh axis of the devices, or several; None for one device.

    Returns:
        `[*taken.shape, M]`.
    """
    from jax import lax
    from jax import numpy as jnp

    if axis is None:
        return _take(_take(rows, sent.reshape(-1)), taken)
    devices = lax.axis_size(axis)
    sent = sent.reshape(devices, -1)  # [n, R]
    choices = sent.shape[1]
    size = _rows_of_round(choices, devices)  # C
    sent = jnp.pad(sent, ((0, 0), (0, -choices % size)), constant_values=-1)

    def one_round(i):
        slots = lax.dynamic_slice_in_dim(sent, i * size, size, 1)
        came = lax.all_to_all(_take(rows, slots), axis, 0, 0)  # [n, C, M]
        sender, place = taken // choices, taken % choices - i * size
        is_here = (taken >= 0) & (place >= 0) & (place < size)
        return is_here, _take(
            _flat(came), jnp.where(is_here, sender * size + place, -1)
        )

    def one_more(i, result):
        is_here, more = one_round(i)
        return jnp.where(is_here[..., None], more, result)

    return lax.fori_loop(1, rounds, one_more, one_round(0)[1])


def _take(rows: Any, index: Any) -> Any:
    """`rows` `[R, M]` at `index` -> `[*index.shape, M]`; zeros where it is -1."""
    from jax import numpy as jnp

    values = rows.at[jnp.maximum(index, 0)].get(mode="promise_in_bounds")
    # Not a product with the mask: an infinite row must not turn others into NaN.
    return jnp.where((index >= 0)[..., None], values, 0)


def _flat(rows: Any) -> Any:
    return rows.reshape(-1, rows.shape[-1])
