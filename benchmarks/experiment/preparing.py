"""Everything that training needs: programs, initial states, packed batches."""

import itertools
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.experiment import compact
from benchmarks.experiment.carrying import MIB, check_size
from benchmarks.experiment.design import (
    SIZES,
    Size,
    all_runs,
    chosen_languages,
    chosen_runs,
    settings_of,
)
from benchmarks.experiment.translating import (
    TESTS,
    save_program,
    tested_pairs,
    whole_batches,
)
from benchmarks.harness.command_line import say
from gshard_tf.export import write_data

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
    from gshard_examples.translation.tokens import tokenize_split
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
    if size.carried:
        _write_tokens(corpus, vocabulary, first, out)
        _write_sources(corpus, vocabulary, size, languages, out)
    else:
        for split in VALIDATION:
            if not is_packed(folder := out / f"data-{split}"):
                tokens = _validation(corpus, vocabulary, first, split)
                pack_validation(tokens, first, folder)
    for run in chosen:
        settings = settings_of(size, languages, run)
        if not size.carried and not is_packed(folder := out / run.data):
            tokens = tokenize_split(
                corpus, "train", vocabulary, settings.language_tags, out / "cache"
            )
            pack_training(tokens, settings, folder)
        folder = out / run.name
        if not (folder / "eval.gshard").exists():
            keras.backend.clear_session()
            say(f"saving {folder}")
            _save_programs(folder, settings, vocabulary, size.carried)
    about = {"size": size_name, "languages": languages}
    (out / "experiment.json").write_text(json.dumps(about, indent=1) + "\n")
    if size.carried:
        say(f"{out}: {check_size(out) / MIB:.1f} MiB")


def _validation(corpus: Any, vocabulary: Any, settings: Any, split: str) -> Any:
    from gshard_examples.translation.tokens import tokenize_pairs
    from gshard_examples.translation.train import sample_pairs

    pairs = sample_pairs(
        corpus, split, settings.validation_pairs, settings.language_tags
    )
    return tokenize_pairs(pairs, vocabulary)


def _write_tokens(
    corpus: Any, vocabulary: Any, settings: Any, out: pathlib.Path
) -> None:
    """The pairs to train on and to validate on, as small files."""
    from gshard_examples.translation.tokens import tokenize_split

    for split in ("train", *VALIDATION):
        path = out / f"tokens-{split}.npz.xz"
        if path.exists():
            continue
        say(f"tokenizing {path}")
        if split == "train":
            tokens = tokenize_split(corpus, split, vocabulary, settings.language_tags)
        else:
            tokens = _validation(corpus, vocabulary, settings, split)
        compact.write_tokens(path, tokens)


def _write_sources(
    corpus: Any,
    vocabulary: Any,
    size: Size,
    languages: Sequence[str],
    out: pathlib.Path,
) -> None:
    """The sources that are translated there."""
    from gshard_examples.translation.tokens import tokenize_pairs

    for name in TESTS:
        tokens = tokenize_pairs(tested_pairs(corpus, name, size, languages), vocabulary)
        write_data(out / f"data-{name}", {"x.source": whole_batches(tokens)})


def pack_training(tokens: Any, settings: Any, folder: pathlib.Path) -> None:
    """Writes the batches of all steps, one after the other."""
    from gshard_examples.translation.packed_batches import PackedBatches

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


def pack_validation(tokens: Any, settings: Any, folder: pathlib.Path) -> None:
    """Writes the batches of a pass over pairs that are held out."""
    from gshard_examples.translation.packed_batches import PackedBatches

    batches = PackedBatches(
        tokens,
        settings.chosen_row_lengths,
        settings.batch_tokens,
        training=False,
    )
    _write(folder, batches, batches.summary())


def is_packed(folder: pathlib.Path) -> bool:
    """Returns whether batches are there already, and says where they are not."""
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
    write_data(folder, arrays)
    tokens = sum(int((a != 0).sum()) for n, a in arrays.items() if "segment" in n)
    about = about | {"tokens": tokens}
    # Last: it says that the folder is complete.
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def _save_programs(
    folder: pathlib.Path, settings: Any, vocabulary: Any, carried: bool
) -> None:
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
    settings.write(folder)
    if carried:
        with tempfile.TemporaryDirectory() as temporary:
            start = pathlib.Path(temporary) / "start.npz"
            export.save_state(model, start)
            arrays, _ = export.read_state(start)
        compact.write_start(folder / "start-small.npz", arrays)
    else:
        export.save_state(model, folder / "start.npz")
    program.save(folder / "train.gshard", initial_state="start.npz")
    if carried:
        save_program(model, folder / "translate.gshard")
    # Last: it says that the folder is complete.
    export.step_program(model, "evaluate", batch).save(
        folder / "eval.gshard", initial_state="start.npz"
    )
