"""Checks that a run's folder is one that the given settings may go on with."""

from __future__ import annotations

import os
from pathlib import Path

from gshard_examples.translation.settings import Settings
from gshard_examples.translation.vocabulary import Vocabulary


def check_same_run(run: Path, settings: Settings, vocabulary: Vocabulary) -> None:
    """Checks that a folder is new, or holds a run that these settings resume.

    Raises:
        ValueError: It holds a run of other settings, or of an earlier version.
        FileExistsError: It holds no run, but a file that one would replace.
    """
    if not (run / "settings.json").is_file():
        # They are written first.
        names = "vocab.model layout.txt history.csv summary.json train.log"
        for name in names.split():
            if os.path.lexists(run / name):
                raise FileExistsError(
                    "The run's folder must be new, or one with a settings.json. This "
                    f"one has none, and its {name!r} would be replaced. Name another "
                    f"folder with --run. Received: {run}"
                )
        return
    check_format(run)
    earlier = Settings.read(run)
    may_differ = {"steps", "partitions", "mesh", "device", "validation_pairs"}
    if earlier.decays_to_zero and settings.steps != earlier.steps:
        raise ValueError(
            f"The run in {run} was begun with schedule={earlier.schedule!r}, whose "
            f"rate is 0 at the end, so steps={earlier.steps} must stay as it is. For "
            "another length, name another folder with --run. "
            f"Received: steps={settings.steps}"
        )
    for name, value in vars(earlier).items():
        received = getattr(settings, name)
        if received != value and name not in may_differ:
            raise ValueError(
                f"The run in {run} was begun with {name}={value!r}, which must stay as "
                "it is. For other settings, name another folder with --run. "
                f"Received: {name}={received!r}"
            )
    model = run / "vocab.model"
    if model.is_file() and Vocabulary(model).sha256 != vocabulary.sha256:
        raise ValueError(
            f"The run in {run} must keep the vocabulary that it was begun with. For "
            "another one, name another folder with --run. Received: a vocabulary of "
            f"{vocabulary.size} symbols, SHA-256 {vocabulary.sha256[:12]}..."
        )


def check_format(run: Path) -> None:
    """Raises `ValueError` where the checkpoints are those of `tf.train`."""
    if (run / "checkpoints" / "checkpoint").is_file():
        raise ValueError(
            "The run must have checkpoints of gshard_tf.CheckpointCallback. An earlier "
            "version wrote these, which this one cannot read; nothing in the folder "
            f"was changed. Name another folder with --run. Received: {run}"
        )
