"""Training a translator with plain `model.fit`, in a folder that can be gone on with.

A run folder holds `settings.json`, `vocab.model`, `checkpoints/` and `logs/`. Keras's
epochs are stretches of `steps_per_epoch` steps; each ends with a validation and a
checkpoint. A run that was stopped anywhere goes on from its last checkpoint, with the
batches that would have come next.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_examples.translation.baselines import unigram_cross_entropy
from gshard_examples.translation.corpus import Corpus, Pair
from gshard_examples.translation.model import make_model, make_strategy, scope
from gshard_examples.translation.pipeline import Batches, tokenize_pairs, tokenize_split
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.vocabulary import Vocabulary
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path

log = logging.getLogger(__name__)


class RunState:
    """The checkpoints of a run: every variable of model, metrics and optimizer.

    TensorFlow's own format and manager: the list of checkpoints is replaced in one
    step after a checkpoint is whole, so a half-written one is never taken.
    """

    def __init__(self, folder: Path, model: keras.Model, keep: int = 2):
        self.step = tf.Variable(0, dtype=tf.int64, name="step")
        optimizer = model.optimizer
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        # By position, which the settings fix: names of Keras's are not unique.
        checkpoint = tf.train.Checkpoint(
            step=self.step,
            model=[v.value for v in model.variables],
            optimizer=[v.value for v in optimizer.variables],
        )
        self.manager = tf.train.CheckpointManager(
            checkpoint, str(folder / "checkpoints"), max_to_keep=keep
        )

    def restore(self) -> int:
        """Restores the last whole checkpoint, if any; returns the steps done."""
        latest = self.manager.latest_checkpoint
        if latest is not None:
            self.manager.checkpoint.restore(latest).assert_consumed()
        return int(self.step)

    def save(self, step: int) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: It could not be written; the one before it is still whole.
        """
        self.step.assign(step)
        try:
            self.manager.save(checkpoint_number=step)
        except tf.errors.OpError as error:
            raise OSError(
                f"The checkpoint of step {step} could not be written to "
                f"{self.manager.directory}: {error.message}. The one before it is "
                "whole: make room and give the same command again."
            ) from error


class _SaveEachEpoch(keras.callbacks.Callback):
    def __init__(self, state: RunState, steps_per_epoch: int):
        super().__init__()
        self.state = state
        self.steps_per_epoch = steps_per_epoch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.state.save((epoch + 1) * self.steps_per_epoch)


class _History(keras.callbacks.Callback):
    """One CSV row per epoch; rows after the last checkpoint are written anew."""

    def __init__(self, path: Path, done_epochs: int):
        super().__init__()
        self.path = path
        self.rows = read_history(path)[:done_epochs]

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        # Compilation and validation included.
        row = {"epoch": epoch + 1, "seconds": round(time.perf_counter() - self.begun)}
        row |= {k: float(v) for k, v in sorted(logs.items())}
        self.rows.append(row)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [",".join(columns)]
        lines += [",".join(str(r.get(c, "")) for c in columns) for r in self.rows]
        write_file(self.path, ("\n".join(lines) + "\n").encode())


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a run's `history.csv`; none if there is no such file yet."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def train(
    run: Path,
    settings: Settings,
    corpus: Corpus,
    vocabulary: Vocabulary,
    cache: Path | None = None,
    verbose: int = 1,
) -> dict[str, Any]:
    """Trains, or goes on with, the run in a folder.

    Args:
        run: The run's folder, on a local or mounted disk.
        settings: Its settings.
        corpus: What to train and validate on.
        vocabulary: The vocabulary, which is copied into the run.
        cache: Folder for the tokenized corpus.
        verbose: Keras's: 1 shows a progress bar, 2 a line per epoch.

    Returns:
        A summary: steps, validation figures, those of a unigram model.

    Raises:
        ValueError: when the folder holds a run of other settings, or is remote, `gs://`
            say.
        FileExistsError: when it holds no run, but a file that one would replace.
        OSError: when something cannot be written, as to a full disk.
    """
    run = local_path(run, "run")
    cache = None if cache is None else local_path(cache, "cache")
    check_same_run(run, settings, vocabulary)
    settings.write(run)
    write_file(run / "vocab.model", vocabulary.model_bytes)

    keras.utils.set_random_seed(settings.seed)
    tokens = tokenize_split(corpus, "train", vocabulary, settings.language_tags, cache)
    dev = tokenize_pairs(
        sample_pairs(corpus, "dev", settings.validation_pairs, settings.language_tags),
        vocabulary,
    )
    common = {
        "batch_tokens": settings.batch_tokens,
        "buckets": settings.bucket_lengths,
    }
    batches = Batches(
        tokens, temperature=settings.temperature, seed=settings.seed, **common
    )
    validation = Batches(dev, training=False, **common)
    log.info("training batches: %s", batches.summary())
    log.info("validation batches: %s", validation.summary())

    strategy = make_strategy(settings)
    with scope(strategy):
        model = make_model(settings, vocabulary)
        state = RunState(run, model)
    done = state.restore()
    unigram = unigram_cross_entropy(
        tokens.predicted_ids(), dev.predicted_ids(), vocabulary.size
    )
    log.info(
        "%s weights; steps done: %d of %d; a unigram model has %.3f nats per token",
        f"{model.count_params():,}",
        done,
        settings.steps,
        unigram,
    )
    if strategy is not None:
        write_file(run / "layout.txt", f"{strategy.describe(model)}\n".encode())
    epochs_done = done // settings.steps_per_epoch
    if done < settings.steps:
        model.fit(
            batches.dataset(start_step=done),
            epochs=settings.steps // settings.steps_per_epoch,
            initial_epoch=epochs_done,
            steps_per_epoch=settings.steps_per_epoch,
            validation_data=validation.dataset(),
            verbose=verbose,
            callbacks=[
                keras.callbacks.TensorBoard(str(run / "logs"), write_graph=False),
                _History(run / "history.csv", epochs_done),
                _SaveEachEpoch(state, settings.steps_per_epoch),
            ],
        )
    history = read_history(run / "history.csv")
    summary = {
        "steps": settings.steps,
        "minutes": round(sum(row.get("seconds", 0) for row in history) / 60, 1),
        "weights": model.count_params(),
        "unigram_nll": unigram,
        "val_nll": [row["val_nll"] for row in history],
        "val_token_accuracy": history[-1]["val_token_accuracy"],
    }
    write_file(run / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def check_same_run(run: Path, settings: Settings, vocabulary: Vocabulary) -> None:
    """Looks whether a folder is a new one, or holds a run to go on with.

    Raises:
        ValueError: It holds a run of other settings.
        FileExistsError: It holds no run, but a file that one would replace.
    """
    if not (run / "settings.json").is_file():
        # They are written first.
        for name in ("vocab.model", "layout.txt", "history.csv", "summary.json"):
            if os.path.lexists(run / name):
                raise FileExistsError(
                    f"{run} holds {name!r} and no settings.json, so it is no run's "
                    "folder, and the file would be replaced. Name another folder with "
                    "--run."
                )
        return
    found = Settings.read(run)
    may_differ = {"steps", "partitions", "device", "validation_pairs"}
    for name in vars(found):
        mine, theirs = getattr(settings, name), getattr(found, name)
        if mine != theirs and name not in may_differ:
            raise ValueError(
                f"The run in {run} was begun with {name}={theirs!r}. Go on with the "
                "same settings, or name another folder with --run. "
                f"Received: {name}={mine!r}"
            )
    model = run / "vocab.model"
    if model.is_file() and Vocabulary(model).sha256 != vocabulary.sha256:
        raise ValueError(
            f"The run in {run} was begun with another vocabulary. Give that one, or "
            "name another folder with --run."
        )


def load_model(run: Path) -> tuple[Settings, Vocabulary, keras.Model]:
    """The translator of a run at its last checkpoint, as a plain Keras model.

    Raises:
        ValueError: when `run` is remote, `gs://` say.
        FileNotFoundError: when there is no run or no checkpoint yet.
    """
    run = local_path(run, "run")
    settings = Settings.read(run)
    vocabulary = Vocabulary(run / "vocab.model")
    model = make_model(settings, vocabulary)
    if RunState(run, model).restore() == 0:
        raise FileNotFoundError(f"The run in {run} has no checkpoint yet.")
    return settings, vocabulary, model


def sample_pairs(
    corpus: Corpus,
    split: str,
    most: int,
    languages: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Pair]:
    """At most so many pairs of a split, drawn evenly: always the same ones."""
    wanted = None if languages is None else set(languages)
    pairs = [p for p in corpus.read(split) if wanted is None or p.lang in wanted]
    if len(pairs) <= most:
        return pairs
    chosen = np.random.default_rng(seed).choice(len(pairs), most, replace=False)
    return [pairs[i] for i in sorted(chosen)]
