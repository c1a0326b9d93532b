"""Rows to the devices of their experts and back, against a sort in numpy."""

import math
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from gshard_tf.parallel import ragged_exchange

N, T, K, M, E = 4, 24, 2, 3, 8  # T tokens on each of N devices
R = T * K


def _loads():
    rng = np.random.default_rng(0)
    even = np.arange(N * R) % E
    return {
        "even": even,
        "random": rng.integers(0, E + 1, N * R),  # E for none
        "one expert": np.full(N * R, 5),
        "one device to another": np.where(np.arange(N * R) < R, 0, even),
        "none": np.full(N * R, E),
    }


def _exchange(tokens, expert_index, d_rows):
    """Rows of the experts, sizes, what comes back, rounds, and a gradient."""
    maps, sizes = ragged_exchange.index_maps(expert_index, E, "x")
    rows, gradient = jax.vjp(
        lambda tokens: ragged_exchange.rows_of_tokens(tokens, maps, "x"), tokens
    )
    back = ragged_exchange.choices_of_rows(rows, maps, "x")
    [d_tokens] = gradient(d_rows)
    return rows, sizes, back, maps.rounds[None], d_tokens


@pytest.fixture(scope="module")
def compiled():
    mesh = jax.make_mesh(
        (N,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:N]
    )
    step = jax.shard_map(
        _exchange, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=True
    )
    return jax.jit(step).lower(
        jnp.zeros((N * T, M)), jnp.zeros((N * T, K), "i4"), jnp.zeros((N * T, N * K, M))
    ).compile()  # fmt: skip


@pytest.mark.parametrize("load", _loads())
def test_each_expert_gets_its_rows_in_order(compiled, load):
    chosen = _loads()[load]
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(N * T, M)).astype("f")
    d_rows = rng.normal(size=(N * T, N * K, M)).astype("f")
    rows, sizes, back, rounds, d_tokens = map(
        np.asarray, compiled(tokens, chosen.reshape(N * T, K).astype("i4"), d_rows)
    )
    assert np.array_equal(sizes, np.bincount(chosen, minlength=E + 1)[:E])
    order = np.argsort(chosen, kind="stable")
    d_expected = np.zeros_like(tokens)
    own = E // N
    for device, parts in enumerate(zip(rows.reshape(N, -1, M), d_rows.reshape(N, -1, M),
                                       strict=True)):  # fmt: skip
        mine = [c for c in order if own * device <= chosen[c] < own * (device + 1)]
        received, d_received = parts
        token = np.array(mine, int) // K
        np.testing.assert_array_equal(received[: len(mine)], tokens[token])
        assert not received[len(mine) :].any()
        np.add.at(d_expected, token, d_received[: len(mine)])
    np.testing.assert_allclose(d_tokens, d_expected, atol=1e-5)
    sent = (chosen < E).reshape(N * T, K, 1)
    np.testing.assert_array_equal(back, np.where(sent, tokens[:, None], 0))

    # As many rounds as the fullest pair of devices needs.
    pairs = np.zeros((N, N + 1), int)
    np.add.at(pairs, (np.arange(N * R) // R, chosen // own), 1)
    room = math.ceil(ragged_exchange.ROOM * R / N)
    assert set(rounds) == {-(-pairs[:, :N].max() // room)}
    assert load != "even" or set(rounds) == {1}


def test_a_round_sends_little_more_than_an_even_load(compiled):
    # An all-to-all of a CPU has a result of each device.
    parts = re.findall(r"f32\[([\d,]+)\]\S* all-to-all\(", compiled.as_text())
    room = math.ceil(ragged_exchange.ROOM * R / N)
    assert parts and set(parts) == {f"1,{room},{M}"}
