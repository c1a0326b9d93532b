"""Cores of a slice in the order of a mesh; what a chip's coordinates say, by a fake."""

import dataclasses
import itertools

import pytest

from gshard_tf.runtime.core_order import order_cores


@dataclasses.dataclass(frozen=True)
class Core:
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0


def slice_of(x, y, z=1, cores=1, host=None):
    """The cores of a slice; `host` is the box of chips of a process."""
    host = host or (x, y, z)

    def process(coords):
        i, j, k = (c // h for c, h in zip(coords, host, strict=True))
        return i + (x // host[0]) * (j + (y // host[1]) * k)

    made = [
        Core((i, j, k), core, process((i, j, k)))
        for k, j, i, core in itertools.product(*map(range, (z, y, x, cores)))
    ]
    # As jax has them: process after process.
    return sorted(made, key=lambda core: core.process_index)


def hops(cores):
    pairs = zip(cores, cores[1:] + cores[:1], strict=True)
    return [
        sum(abs(a - b) for a, b in zip(one.coords, two.coords, strict=True))
        for one, two in pairs
    ]


@pytest.mark.parametrize(
    "shape",
    [(2, 4), (4, 2), (4, 4), (3, 4), (2, 2, 2), (4, 4, 4), (3, 3, 2), (2, 2, 1)],
)
def test_one_axis_goes_round_a_ring(shape):
    cores = slice_of(*shape)
    ordered = order_cores(cores, [len(cores)])
    assert sorted(ordered, key=repr) == sorted(cores, key=repr)
    assert set(hops(ordered)) == {1}


def test_the_cores_of_a_chip_follow_each_other():
    ordered = order_cores(slice_of(2, 2, cores=2), [8])
    assert hops(ordered) == [0, 1] * 4


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (3, 3)])
def test_without_a_ring_a_line(shape):
    ordered = order_cores(slice_of(*shape), [shape[0] * shape[1]])
    assert set(hops(ordered)[:-1]) <= {1}


def test_each_axis_has_directions_of_its_own():
    ordered = order_cores(slice_of(2, 4), [4, 2])
    rows = [ordered[i : i + 2] for i in range(0, 8, 2)]
    assert all(hops(row) == [1, 1] for row in rows)
    columns = list(zip(*rows, strict=True))
    assert all(hops(list(column))[:-1] == [1, 1, 1] for column in columns)


@pytest.mark.parametrize("host", [(2, 2, 1), (2, 4, 1), (4, 2, 1)])
def test_the_cores_of_a_process_stay_together(host):
    """In one ring where it can be, and else as given."""
    cores = slice_of(4, 4, host=host)
    ordered = order_cores(cores, [16])
    processes = [core.process_index for core in ordered]
    assert processes == sorted(processes)


def test_a_ring_through_two_hosts():
    for shape in ((2, 4, 1), (2, 2, 2)):
        ordered = order_cores(slice_of(*shape, host=(2, 2, 1)), [8])
        assert set(hops(ordered)) == {1}
        assert [core.process_index for core in ordered] == [0] * 4 + [1] * 4


def test_what_has_no_coordinates_and_parts_of_a_slice_are_as_given():
    assert order_cores(["a", "b"], [2]) == ["a", "b"]
    part = slice_of(4, 4)[:6]
    assert order_cores(part, [6]) == part
