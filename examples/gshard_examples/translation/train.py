"""Training a translator with plain `model.fit`, in a run folder that can be resumed.

A run folder holds `settings.json`, `vocab.model`, `checkpoints/`, `history.csv`,
`train.log` and `logs/`. A Keras epoch is `steps_per_epoch` steps; each ends with a
validation and a checkpoint. A run that was stopped anywhere resumes from its last
checkpoint, with the batches that would have come next.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console

from gshard_examples.translation.baselines import unigram_cross_entropy
from gshard_examples.translation.corpus import Corpus, Pair
from gshard_examples.translation.lengths import check_lengths
from gshard_examples.translation.model import make_model, make_strategy, scope
from gshard_examples.translation.packed_batches import PackedBatches, choose_row_lengths
from gshard_examples.translation.progress import (
    TrainingProgress,
    log_file,
    make_console,
    print_samples,
)
from gshard_examples.translation.resuming import check_format, check_same_run
from gshard_examples.translation.samples import Samples, is_due, sample_sentences
from gshard_examples.translation.sampling import draw_pairs
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.tokens import tokenize_pairs, tokenize_split
from gshard_examples.translation.vocabulary import Vocabulary
from gshard_tf import (
    CheckpointCallback,
    CheckpointManager,
    NonFiniteGuard,
    ResumableDataset,
    training_state,
)
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path

log = logging.getLogger(__name__)


class _EpochSeconds(keras.callbacks.Callback):
    """Adds the duration of each epoch to its logs: compilation and validation too."""

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict) -> None:
        # Keras gives all callbacks the same dict.
        logs["seconds"] = round(time.perf_counter() - self.start, 1)


def read_history(run: Path) -> list[dict[str, float]]:
    """Returns a run's `history.csv`, a row per epoch; none before the first epoch.

    A run that was killed between an epoch's row and its checkpoint trains that epoch
    again, to the same figures: the last row of an epoch counts.
    """
    path = run / "history.csv"
    if not path.is_file():
        return []
    rows = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if None in row or None in row.values():
                continue  # a full disk cut it short
            rows[row["epoch"]] = {key: float(value) for key, value in row.items()}
    return list(rows.values())


def train(
    run: Path,
    settings: Settings,
    corpus: Corpus,
    vocabulary: Vocabulary,
    cache: Path | None = None,
    verbose: int = 1,
    samples: int = 0,
) -> dict[str, Any]:
    """Trains, or resumes, the run in a folder.

    Args:
        run: The run's folder, on a local or mounted disk.
        settings: Its settings.
        corpus: What to train and validate on.
        vocabulary: The vocabulary, which is copied into the run.
        cache: Folder for the tokenized corpus.
        verbose: 1 prints the progress (see `progress`), 0 nothing.
        samples: Dev sentences, each in another language, whose translations are
            printed after some of the validations. On a mesh they take a second copy
            of the weights, on the host.

    Returns:
        A summary: steps, validation figures, those of a unigram model.

    Raises:
        ValueError: when the folder holds a run of other settings or of an earlier
            version, or is remote, `gs://` say; or when half of the pairs or more are
            too long (`lengths.check_lengths`).
        FileExistsError: when it holds no run, but a file that one would replace.
        OSError: when something cannot be written, as to a full disk.
    """
    run = local_path(run, "run")
    cache = None if cache is None else local_path(cache, "cache")
    check_same_run(run, settings, vocabulary)
    keras.utils.set_random_seed(settings.seed)
    tokens = tokenize_split(corpus, "train", vocabulary, settings.language_tags, cache)
    dev_pairs = sample_pairs(
        corpus, "dev", settings.validation_pairs, settings.language_tags
    )
    dev = tokenize_pairs(dev_pairs, vocabulary)
    row_lengths = settings.chosen_row_lengths
    if row_lengths is None:
        row_lengths = choose_row_lengths(tokens, settings.temperature)
    check_lengths(tokens, row_lengths, "--row-lengths")
    sizes = (row_lengths, settings.batch_tokens)
    batches = PackedBatches(
        tokens,
        *sizes,
        temperature=settings.temperature,
        seed=settings.seed,
        word_dropout=settings.word_dropout,
    )
    validation = PackedBatches(dev, *sizes, training=False)
    # Not before the data are found usable: what is written must stay as it is.
    settings.write(run)
    write_file(run / "vocab.model", vocabulary.model_bytes)
    with log_file(run / "train.log"):
        return _train(
            run, settings, vocabulary, batches, validation, dev_pairs, verbose, samples
        )


def _train(
    run: Path,
    settings: Settings,
    vocabulary: Vocabulary,
    batches: PackedBatches,
    validation: PackedBatches,
    dev_pairs: Sequence[Pair],
    verbose: int,
    samples: int,
) -> dict[str, Any]:
    log.info("training batches: %s", batches.summary())
    log.info("validation batches: %s", validation.summary())

    strategy = make_strategy(settings)
    with scope(strategy):
        model = make_model(settings, vocabulary)
        # The layout report lists its slots.
        model.optimizer.build(model.trainable_variables)
    checkpoints = CheckpointManager(run / "checkpoints", max_to_keep=2)
    done = last_step(run)
    unigram = unigram_cross_entropy(
        batches.tokens.predicted_ids(),
        validation.tokens.predicted_ids(),
        vocabulary.size,
    )
    console = make_console()
    about = (
        f"{model.count_params():,} weights; {_devices(settings)}",
        f"step {done:,} of {settings.steps:,}; loss of a unigram model: {unigram:.3f}",
    )
    log.info("%s; %s", *about)
    if verbose:
        console.print(*about, sep="\n", soft_wrap=True)
    if strategy is not None:
        write_file(run / "layout.txt", f"{strategy.describe(model)}\n".encode())
    if done < settings.steps:
        # TensorFlow cannot save the position in a Python generator.
        dataset = ResumableDataset(batches.dataset(), position="count")
        callbacks = [
            CheckpointCallback(checkpoints, dataset=dataset),
            _EpochSeconds(),
            keras.callbacks.CSVLogger(run / "history.csv", append=True),
            keras.callbacks.TensorBoard(str(run / "logs"), write_graph=False),
        ]
        if strategy is not None:
            callbacks.append(NonFiniteGuard())
        shown: contextlib.AbstractContextManager = contextlib.nullcontext()
        if verbose:
            after = None
            if samples:
                after = _show_samples(
                    console, model, settings, vocabulary, dev_pairs, samples
                )
            shown = TrainingProgress(
                console,
                settings.steps,
                settings.steps_per_epoch,
                _tokens_per_step(batches),
                after,
            )
            callbacks.append(shown)
        with shown:
            model.fit(
                dataset.dataset,
                epochs=settings.steps // settings.steps_per_epoch,
                steps_per_epoch=settings.steps_per_epoch,
                validation_data=validation.dataset(),
                shuffle=False,  # the batches are shuffled
                verbose=0,
                callbacks=callbacks,
            )
    history = read_history(run)
    summary = {
        "steps": settings.steps,
        "minutes": round(sum(row["seconds"] for row in history) / 60, 1),
        "weights": model.count_params(),
        "unigram_nll": unigram,
        "val_nll": [row["val_nll"] for row in history],
        "val_token_accuracy": history[-1]["val_token_accuracy"],
    }
    write_file(run / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _devices(settings: Settings) -> str:
    axes = settings.mesh_axes
    if not axes:
        return "no mesh"
    sizes = " x ".join(f"{size} ({name})" for name, size in axes.items())
    return f"mesh of {sizes} {settings.device} devices"


def _tokens_per_step(batches: PackedBatches) -> float:
    """Source and target tokens of a batch, on average; padding is none."""
    tokens = batches.tokens
    lengths = tokens.source_lengths + tokens.target_lengths
    return float(lengths[batches.plan().examples].sum()) / batches.steps()


def _show_samples(
    console: Console,
    model: keras.Model,
    settings: Settings,
    vocabulary: Vocabulary,
    pairs: Sequence[Pair],
    count: int,
) -> Callable[[int], None]:
    """Returns a function that prints a few translations when they are due."""
    plain = None
    if settings.mesh_axes:
        plain = functools.partial(make_model, settings, vocabulary)
    sentences = Samples(
        model, plain, vocabulary, sample_sentences(pairs, count, settings.seed)
    )

    def after(step: int) -> None:
        if is_due(step, settings.steps, settings.steps_per_epoch):
            print_samples(console, sentences.translate())

    return after


def last_step(run: Path) -> int:
    """Returns the step of a run's last checkpoint, 0 without one."""
    return max(CheckpointManager(run / "checkpoints").steps(), default=0)


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
    restore_weights(run, model)
    return settings, vocabulary, model


def restore_weights(run: Path, model: keras.Model) -> None:
    """Restores the weights of a run's last checkpoint, but not the optimizer.

    Raises:
        ValueError: The run was made by an earlier version.
        FileNotFoundError: There is no checkpoint yet.
    """
    check_format(run)
    state = {n: v for n, v in training_state(model).items() if n.startswith("model/")}
    checkpoints = CheckpointManager(run / "checkpoints")
    if checkpoints.restore(state, extra=["optimizer/.*"]) is None:
        raise FileNotFoundError(f"The run in {run} has no checkpoint yet.")


def sample_pairs(
    corpus: Corpus,
    split: str,
    most: int,
    languages: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Pair]:
    """Returns at most `most` pairs of a split, drawn evenly: always the same ones."""
    selected = None if languages is None else set(languages)
    pairs = [p for p in corpus.read(split) if selected is None or p.lang in selected]
    return draw_pairs(pairs, most, np.random.default_rng(seed))
