"""Everything that training needs: programs, initial states, packed batches."""

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.experiment.design import (
    SIZES,
    all_runs,
    chosen_languages,
    chosen_runs,
    settings_of,
)
from benchmarks.harness.command_line import say

#: Splits that the losses of a run are of, beside its training: new messages (while it
#: trains, too) and new pairs.
VALIDATION = ("dev", "dev_pairs")


def prepare(
    data: pathlib.Path, out: pathlib.Path, size_name: str, only: Sequence[str] = ()
) -> None:
    """Writes everything that training needs, and nothing that is there already.

    Args:
        data: The corpus.
        out: The folder, made if need be.
        size_name: One of `SIZES`.
        only: Names of runs; none: all.

    Raises:
        ValueError: for a name that no run has.
    """
    import keras

    from gshard_examples.translation.corpus import load_corpus
    from gshard_examples.translation.vocabulary import Vocabulary
    from gshard_examples.translation.vocabulary_training import train_vocabulary

    size = SIZES[size_name]
    corpus = load_corpus(data)
    languages = chosen_languages(corpus.languages("train"), size)
    runs = all_runs(size, languages)
    chosen = chosen_runs(runs, only)
    out.mkdir(parents=True, exist_ok=True)
    first = settings_of(size, languages, runs[0])
    path = out / "vocab.model"
    if not path.exists():
        say("training the vocabulary")
        train_vocabulary(
            corpus,
            path,
            first.vocab_size,
            first.vocab_model,
            character_coverage=first.character_coverage,
            languages=sorted(languages),
        )
    vocabulary = Vocabulary(path)
    for split in VALIDATION:
        _pack_validation(corpus, vocabulary, first, split, out / f"data-{split}")
    for run in chosen:
        settings = settings_of(size, languages, run)
        _pack_training(corpus, vocabulary, settings, out, out / run.data)
        folder = out / run.name
        if not (folder / "eval.gshard").exists():
            keras.backend.clear_session()
            say(f"saving {folder}")
            _save_programs(folder, settings, vocabulary)
    about = {"size": size_name, "languages": languages}
    (out / "experiment.json").write_text(json.dumps(about, indent=1) + "\n")


def _pack_training(
    corpus: Any, vocabulary: Any, settings: Any, out: pathlib.Path, folder: pathlib.Path
) -> None:
    """The batches of all steps, one after the other."""
    from gshard_examples.translation.packed_batches import PackedBatches
    from gshard_examples.translation.tokens import tokenize_split

    if _is_complete(folder):
        return
    tokens = tokenize_split(
        corpus, "train", vocabulary, settings.language_tags, out / "cache"
    )
    batches = PackedBatches(
        tokens,
        settings.chosen_row_lengths,
        settings.batch_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    _write(
        folder,
        itertools.islice(batches, settings.steps),
        # Within the first epoch every batch is new to the model.
        batches.summary() | {"epochs": settings.steps / batches.steps()},
    )


def _pack_validation(
    corpus: Any, vocabulary: Any, settings: Any, split: str, folder: pathlib.Path
) -> None:
    from gshard_examples.translation.packed_batches import PackedBatches
    from gshard_examples.translation.tokens import tokenize_pairs
    from gshard_examples.translation.train import sample_pairs

    if _is_complete(folder):
        return
    pairs = sample_pairs(
        corpus, split, settings.validation_pairs, settings.language_tags
    )
    batches = PackedBatches(
        tokenize_pairs(pairs, vocabulary),
        settings.chosen_row_lengths,
        settings.batch_tokens,
        training=False,
    )
    _write(folder, batches, batches.summary())


def _is_complete(folder: pathlib.Path) -> bool:
    if (folder / "about.json").exists():
        return True
    say(f"packing {folder}")
    return False


def _write(folder: pathlib.Path, batches: Any, about: dict[str, Any]) -> None:
    from gshard_tf import export

    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, array in export.batch_arrays(batch).items():
            small = np.uint8 if array.dtype == np.float32 else np.uint16
            parts.setdefault(name, []).append(array.astype(small))
    arrays = {name: np.concatenate(some) for name, some in parts.items()}
    export.write_data(folder, arrays)
    tokens = sum(int((a != 0).sum()) for n, a in arrays.items() if "segment" in n)
    about = about | {"tokens": tokens}
    # Last: it says that the folder is complete.
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def _save_programs(folder: pathlib.Path, settings: Any, vocabulary: Any) -> None:
    import keras

    from gshard_examples.translation.model import make_model, make_strategy
    from gshard_examples.translation.packed_batches import batch_spec
    from gshard_tf import export

    keras.utils.set_random_seed(settings.seed)
    strategy = make_strategy(settings)
    with strategy.scope():
        model = make_model(settings, vocabulary)
    batch = batch_spec(settings.chosen_row_lengths, settings.batch_tokens)
    program = export.step_program(model, "train", batch)
    export.save_state(model, folder / "start.npz")
    settings.write(folder)
    program.save(folder / "train.gshard", initial_state="start.npz")
    # Last: it says that the folder is complete.
    export.step_program(model, "evaluate", batch).save(
        folder / "eval.gshard", initial_state="start.npz"
    )
