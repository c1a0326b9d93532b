"""A run that is stopped and goes on is the run that was never stopped."""

import checkpoint_runs as runs
import numpy as np
import pytest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is never stopped."""
    return runs.run(tmp_path_factory.mktemp("whole"), save_every=2)


@pytest.mark.parametrize(
    "stop", [3, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 5, 8))]
)
def test_going_on_is_exact(whole, tmp_path, stop):
    runs.run(tmp_path, save_every=2, stop_after=stop)
    made, losses, saver = runs.run(tmp_path, save_every=2)
    # The last step of an epoch is saved when it ends: a stop in between loses it.
    done = {1: 0, 3: 2, 5: 4, 8: 8}[stop]
    assert saver.step == runs.STEPS * runs.EPOCHS
    assert losses.seen == whole[1].seen[done:]
    assert losses.epochs == whole[1].epochs[done // runs.STEPS :]
    runs.assert_same_bits(made, whole[0])


def test_a_run_that_is_done_does_nothing(tmp_path):
    first, losses, _ = runs.run(tmp_path)
    again, nothing, _ = runs.run(tmp_path)
    assert len(losses.seen) == 10 and nothing.seen == []
    runs.assert_same_bits(again, first)
    # It can be made longer.
    _, more, _ = runs.run(tmp_path, epochs=3)
    assert len(more.seen) == 5


@pytest.mark.slow  # test_restore.py goes on elsewhere, too
@pytest.mark.parametrize("mesh", [{"data": 4, "model": 2}, None])
def test_going_on_elsewhere_agrees(whole, tmp_path, mesh):
    runs.run(tmp_path, save_every=2, stop_after=7)
    _, losses, _ = runs.run(tmp_path, mesh=mesh)
    np.testing.assert_allclose(losses.seen, whole[1].seen[6:], rtol=1e-4)


def test_another_length_of_epochs(tmp_path, monkeypatch):
    runs.run(tmp_path, mesh=2, save_every=2, stop_after=3)
    monkeypatch.setattr(runs, "STEPS", 2)
    with pytest.raises(ValueError, match="Received: steps_per_epoch=2"):
        runs.run(tmp_path, mesh=2)
