"""The best checkpoint, by the metrics in the manifests."""

import types

import pytest

from gshard_tf.checkpoints.errors import CorruptCheckpointError
from gshard_tf.checkpoints.retention import best_step


def logs(**values):
    return types.SimpleNamespace(logs=values)


MANIFESTS = {
    1: logs(loss=2.0),
    2: logs(loss=1.0),
    3: CorruptCheckpointError("the disk does not answer"),
    4: logs(loss=float("nan")),
    5: logs(loss=1.0),
    6: logs(other=0.0),
    7: logs(loss=3.0),
}


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [
        ("loss", "min", 2),  # of equals the older
        ("loss", "max", 7),
        ("missing", "min", None),
        (None, "min", None),
    ],
)
def test_the_best_is_sound_a_number_and_the_oldest(monitor, mode, expected):
    assert best_step(MANIFESTS, monitor, mode) == expected
