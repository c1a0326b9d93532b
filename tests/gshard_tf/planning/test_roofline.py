"""The estimate of a step: by hand, and never above what the paper measured."""

import types

import numpy as np
import pytest

from gshard_tf.hlo.collectives import Collective
from gshard_tf.planning.chips import CHIPS, Topology
from gshard_tf.planning.roofline import Interconnect, step_time
from gshard_tf.sharding.mesh import create_mesh

V3 = CHIPS["v3"]


def slice_of(chip, *shape):
    """A slice with chips in row-major order, and the cores of a chip side by side."""
    places = [
        types.SimpleNamespace(coords=place)
        for place in np.ndindex(*shape)
        for _ in range(chip.devices)
    ]
    return Topology("test", places, chip, shape)


def collective(kind, size, groups):
    return Collective(kind, (("f32", (size // 4,)),), size, "", groups=np.array(groups))


# Cores, chips, microseconds for 8 MB and 32 MB per core: Figure 9 of the paper.
FIGURE_9 = [
    (16, (2, 4), 284, 1100),
    (32, (4, 4), 295, 1140),
    (128, (8, 8), 729, 2570),
    (512, (16, 16), 1290, 5040),
    (2048, (32, 32), 2340, 10560),
]


@pytest.mark.parametrize("cores, shape, small, large", FIGURE_9)
def test_no_exchange_is_estimated_slower_than_the_paper_measured(
    cores, shape, small, large
):
    links = Interconnect(slice_of(V3, *shape), V3)
    for megabytes, measured in ((8, small), (32, large)):
        seconds = links.seconds(
            collective("all-to-all", megabytes * 10**6, [range(cores)])
        )
        assert 0.2 * measured < 1e6 * seconds < measured


def test_an_exchange_by_hand():
    # 16 cores on 2 x 4 chips. Over the longer side each chip's 2 x 1 MB go half
    # across the middle of a line of 4: 4 chips x 2 MB / 2 / 2 directions... / 1 link.
    links = Interconnect(slice_of(V3, 2, 4), V3)
    seconds = links.seconds(collective("all-to-all", 10**6, [range(16)]))
    assert seconds == pytest.approx(2 * 10**6 * 4 / 4 / V3.link_bandwidth)
    # Twice as fast where the line closes to a ring.
    v4 = CHIPS["v4"]
    line = Interconnect(slice_of(v4, 2, 2, 2), v4)
    ring = Interconnect(slice_of(v4, 4, 4, 4), v4)
    assert ring.seconds(collective("all-to-all", 10**6, [range(64)])) == pytest.approx(
        line.seconds(collective("all-to-all", 10**6, [range(8)]))
    )


def test_sums_and_gathers_by_hand():
    v5e = CHIPS["v5e"]
    links = Interconnect(slice_of(v5e, 2, 4), v5e)
    everyone = [range(8)]
    moved = {"all-gather": 1, "reduce-scatter": 8, "all-reduce": 2}
    for kind, times in moved.items():
        seconds = links.seconds(collective(kind, 10**6, everyone))
        assert seconds == pytest.approx(times * 1e6 * 7 / 8 / 2 / v5e.link_bandwidth)
    # Cores of one chip need no link.
    links = Interconnect(slice_of(V3, 2, 2), V3)
    assert links.seconds(collective("all-reduce", 10**6, [[0, 1]])) == 0
    assert links.seconds(collective("all-reduce", 10**6, [[0], [1]])) == 0


def test_groups_are_those_of_the_mesh():
    """A row of the mesh is one of the slice, whatever order the devices come in."""
    v5e = CHIPS["v5e"]
    tiles = [(2 * i + k, 2 * j + m) for j, i, m, k in np.ndindex(2, 2, 2, 2)]
    places = [
        types.SimpleNamespace(coords=(*chip, 0), core_on_chip=0, process_index=0)
        for chip in tiles
    ]
    given = Topology("test", places, v5e, (4, 4))
    ordered = given.in_order_of(create_mesh({"data": 4, "model": 4}, "TPU"))
    gather = collective("all-gather", 10**6, np.arange(16).reshape(4, 4))
    one_link = 10**6 * 3 / 4 / v5e.link_bandwidth
    assert Interconnect(ordered, v5e).seconds(gather) == pytest.approx(one_link)
    assert Interconnect(given, v5e).seconds(gather) == pytest.approx(one_link / 2)


def test_a_permutation_costs_a_hop():
    links = Interconnect(slice_of(V3, 2, 2), V3)
    near = Collective("collective-permute", (), 10**6, "", pairs=np.array([[0, 1]]))
    far = Collective("collective-permute", (), 10**6, "", pairs=np.array([[0, 2]]))
    assert links.seconds(near) == 0  # the other core of the chip
    assert links.seconds(far) == pytest.approx(1e6 / V3.link_bandwidth)


@pytest.mark.parametrize("said, kept", [(-3.0, None), (1e-9, None), (0.5, 0.5)])
def test_the_compilers_own_estimate_is_kept_if_it_can_be_true(said, kept):
    topology = slice_of(V3, 2, 2)
    found = step_time(topology, V3, 61.5e9, 450e6, 0.0, said)
    assert found.compute == pytest.approx(1e-3)
    assert found.hbm == pytest.approx(1e-3)
    assert found.roofline == pytest.approx(1e-3)
    assert found.compiler == kept
    assert any("lines" in sentence for sentence in found.assumptions)
