"""The runs of the experiment, and their sizes: see docs/experiment.md."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is compared.

    Attributes:
        experts: E of every other feed-forward layer; 0: none.
        width: H over that of equal FLOPs per token.
    """

    experts: int
    width: int = 1


MODELS = {
    "dense": Model(0),
    "e4": Model(4),
    "e16": Model(16),
    "e64": Model(64),
    "e128": Model(128),
    # More computation: it gains only where weights limit the dense model.
    "wide": Model(0, width=2),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A model, trained from a seed, on all languages or on one of them.

    Attributes:
        model: Its name in `MODELS`.
        seed: Of weights, dropout, random routing and the order of batches.
        language: The only language of a bilingual baseline; "": all.
    """

    model: str
    seed: int
    language: str = ""

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"only-{self.language}" if self.language else f"{self.model}-{self.seed}"

    @property
    def data(self) -> str:
        """The folder of its batches."""
        return f"data-{self.language or self.seed}"


#: In the order of training: whoever stops early has the comparison that counts.
RUNS = (
    Run("dense", 0),
    Run("e64", 0),
    Run("dense", 1),
    Run("e64", 1),
    Run("e16", 0),
    Run("wide", 0),
    Run("e4", 0),
    Run("e128", 0),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the experiment.

    Attributes:
        settings: Settings of the translation example, besides experts and seed.
        save_every: Steps between validations.
        per_language: Pairs of each language and test that are translated.
        least: Training pairs that a language must have to take part.
        every: Which of these take part: every how many, by number of pairs.
        bilingual: The number of bilingual baselines.
        bilingual_steps: Their steps.
        runs: The runs on all languages, in the order of training; none: `RUNS`.
        carried: `prepare` writes little, which `unpack` completes elsewhere.
    """

    settings: Mapping[str, Any]
    save_every: int
    per_language: int
    least: int = 0
    every: int = 1
    bilingual: int = 0
    bilingual_steps: int = 0
    runs: tuple[Run, ...] = ()
    carried: bool = False


#: One of each model: what 15 minutes are enough for.
ONCE = (Run("dense", 0), Run("e64", 0), Run("e16", 0), Run("e4", 0))

_QUICK = {
    "vocab_size": 600,
    "batch_tokens": 64,
    "row_lengths": "32,32",
    "encoder_layers": 2,
    "decoder_layers": 2,
    "model_dim": 8,
    "hidden_dim": 16,
    "heads": 2,
    "group_size": 64,
    "steps": 4,
    "warmup": 2,
    "learning_rate": 2e-3,
    "schedule": "linear",
    "validation_pairs": 8,
}

SIZES = {
    # On a GPU: an hour or two a run.
    "gpu": Size(
        {
            "vocab_size": 32768,
            "batch_tokens": 16384,
            "row_lengths": "128,80",
            "encoder_layers": 6,
            "decoder_layers": 6,
            "model_dim": 512,
            "hidden_dim": 2048,
            "heads": 8,
            "group_size": 2048,
            "steps": 30000,
            "warmup": 2000,
            "learning_rate": 2e-3,
            "schedule": "linear",
            "precision": "mixed_bfloat16",
            "validation_pairs": 4000,
        },
        save_every=1000,
        per_language=100,
        least=200,
        bilingual=12,
        bilingual_steps=6000,
    ),
    # On a GPU that is lent for 15 minutes: two minutes a run.
    "gpu15": Size(
        {
            "vocab_size": 16384,
            "batch_tokens": 16384,
            "row_lengths": "128,80",
            "encoder_layers": 4,
            "decoder_layers": 4,
            "model_dim": 128,
            "hidden_dim": 512,
            "heads": 4,
            "group_size": 2048,
            "steps": 4500,
            "warmup": 450,
            "learning_rate": 4e-3,
            "schedule": "linear-to-zero",
            "precision": "mixed_bfloat16",
            "validation_pairs": 4000,
        },
        save_every=1500,
        per_language=10,
        least=200,
        runs=ONCE,
        carried=True,
    ),
    # Half an hour a run on one core.
    "cpu": Size(
        {
            "vocab_size": 4096,
            "batch_tokens": 2048,
            "row_lengths": "64,40",
            "encoder_layers": 2,
            "decoder_layers": 2,
            "model_dim": 64,
            "hidden_dim": 256,
            "heads": 4,
            "group_size": 512,
            "steps": 5000,
            "warmup": 500,
            "learning_rate": 6e-3,
            "schedule": "linear-to-zero",
            "validation_pairs": 1000,
        },
        save_every=1000,
        per_language=20,
        least=200,
        every=4,
        bilingual=12,
        bilingual_steps=500,
    ),
    # For the test of this script: it learns nothing.
    "quick": Size(
        _QUICK,
        save_every=2,
        per_language=1,
        bilingual=1,
        bilingual_steps=2,
    ),
    # The same of "gpu15".
    "quick15": Size(
        {**_QUICK, "precision": "mixed_bfloat16"},
        save_every=2,
        per_language=1,
        runs=ONCE[:2],
        carried=True,
    ),
}


def _pilot(**settings: int) -> Size:
    """A short run of `dense` and of `wide`: do weights limit, or steps?"""
    cpu = SIZES["cpu"]
    steps = {"steps": 600, "warmup": 60}
    return dataclasses.replace(
        cpu,
        settings={**cpu.settings, **steps, **settings},
        save_every=600,
        bilingual=0,
        runs=(Run("dense", 0), Run("wide", 0)),
    )


SIZES |= {
    "pilot": _pilot(),
    "pilot-narrow": _pilot(model_dim=32, hidden_dim=128, heads=2),
    "pilot-broad": _pilot(model_dim=128, hidden_dim=512, heads=8),
    "pilot-deep": _pilot(encoder_layers=4, decoder_layers=4),
}


def chosen_languages(counts: Mapping[str, int], size: Size) -> list[str]:
    """Returns the languages that take part, those of the most training pairs first."""
    enough = [tag for tag, count in counts.items() if count >= size.least]
    return sorted(enough, key=lambda tag: (-counts[tag], tag))[:: size.every]


def all_runs(size: Size, languages: Sequence[str]) -> list[Run]:
    """Returns all runs in the order of training.

    Args:
        size: The experiment's.
        languages: As `chosen_languages` returns them. The bilingual baselines are
            spread over their ranking.
    """
    count = min(size.bilingual, len(languages))
    spread = [languages[i * len(languages) // count] for i in range(count)]
    return [*(size.runs or RUNS), *(Run("dense", 0, language) for language in spread)]


def chosen_runs(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """Returns the runs of some names, or all if there are none, in their order.

    Raises:
        ValueError: for a name that no run has.
    """
    if unknown := set(only) - {run.name for run in runs}:
        raise ValueError(
            f"--only must name runs: {', '.join(run.name for run in runs)}. Received: "
            f"{', '.join(sorted(unknown))}"
        )
    return [run for run in runs if not only or run.name in only]


def settings_of(size: Size, languages: Sequence[str], run: Run) -> Any:
    """Returns the settings of a run, at equal FLOPs per token (but for "wide")."""
    from gshard_examples.translation.settings import Settings

    model, chosen = MODELS[run.model], dict(size.settings)
    if not model.experts:
        # Every other layer has two experts' width for a token: three halves on average.
        chosen["hidden_dim"] = chosen["hidden_dim"] * 3 // 2
    chosen["hidden_dim"] *= model.width
    if run.language:
        languages, chosen["steps"] = [run.language], size.bilingual_steps
        chosen["warmup"] = min(chosen["warmup"], chosen["steps"] // 5 or 1)
    return Settings(
        **chosen,
        languages=",".join(sorted(languages)),
        experts=model.experts,
        seed=run.seed,
        steps_per_epoch=chosen["steps"],
        partitions=1,
    )
