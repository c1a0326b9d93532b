"""Settings of a run; each field is a command-line flag.

The defaults are for two CPU cores; README.md says how long they take. What a run used
is in its `settings.json`, where later commands (resuming, translating) read it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path

#: Schedules whose rate is 0 when the run ends.
TO_ZERO = ("cosine", "linear-to-zero")
#: Names that the axes of a mesh may have.
MESH_AXES = ("data", "expert", "model")


def _flag(default: Any, text: str, choices: tuple | None = None) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": text, "choices": choices}
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a training run."""

    # -- data
    languages: str = _flag(
        "", "comma-separated language tags to train on; empty: all of the corpus"
    )
    vocab_size: int = _flag(8192, "symbols of the shared vocabulary")
    character_coverage: float = _flag(
        0.995, "share of the text whose characters get a symbol; the rest is bytes"
    )
    vocab_model: str = _flag("bpe", "kind of vocabulary", ("bpe", "unigram"))
    batch_tokens: int = _flag(2048, "source positions per step, padding included")
    row_lengths: str = _flag(
        "auto",
        "positions of a row of sources and of targets, as 64,40; a row holds several "
        "sentences. auto: such that both sides fill alike",
    )
    temperature: float = _flag(
        5.0, "of sampling languages: 1 as they are, larger evens them out"
    )

    # -- model, by the letters of the paper
    encoder_layers: int = _flag(2, "encoder blocks")
    decoder_layers: int = _flag(2, "decoder blocks")
    model_dim: int = _flag(128, "M, width of the model")
    hidden_dim: int = _flag(512, "H, width of feed-forward layers and experts")
    heads: int = _flag(4, "N, attention heads")
    key_dim: int = _flag(0, "D, width of a head; 0: M / N")
    experts: int = _flag(
        8, "E, experts of every other feed-forward layer; 0: a dense model"
    )
    capacity_factor: float = _flag(2.0, "expert slots per token, over both choices")
    group_size: int = _flag(
        0, "S, tokens that are routed together; 0: each row is a group"
    )
    aux_loss_coef: float = _flag(
        0.01, "weight in the loss of the routers' balancing; 0: none"
    )
    dropout: float = _flag(
        0.1, "dropout rate of embeddings, attention, dense layers and residuals"
    )
    expert_dropout: float = _flag(
        0.0, "dropout rate of the experts' hidden layer; higher to tune on few pairs"
    )
    word_dropout: float = _flag(
        0.0, "share of source and target ids that the model is not shown in training"
    )
    remat: str = _flag(
        "none",
        "activations that are computed again for the gradient, to save memory",
        ("none", "attention", "all"),
    )
    stacked: bool = _flag(
        False, "loop over stacked blocks: compiles in the same time at any depth"
    )

    # -- training
    steps: int = _flag(1500, "optimizer steps in all")
    steps_per_epoch: int = _flag(
        100, "steps between validations and checkpoints; an 'epoch' to Keras"
    )
    optimizer: str = _flag("adam", "optimizer", ("adam", "adamw", "adafactor"))
    beta_2: float = _flag(0.98, "decay of the second moment of adam and adamw")
    weight_decay: float = _flag(
        0.004, "of adamw: share of each weight that a step takes off, times its rate"
    )
    clip_norm: float = _flag(
        0.0, "greatest norm of all gradients together; 0: they are not clipped"
    )
    learning_rate: float = _flag(
        6e-3, "peak rate (for adafactor: relative to each weight's size)"
    )
    warmup: int = _flag(
        200,
        "steps at or up to the peak rate, before it decays; at most half of --steps "
        "where the rate ends at 0",
    )
    schedule: str = _flag(
        "linear-to-zero",
        "cosine, linear-to-zero: a linear warm-up, then down to 0 at --steps, for a "
        "run that is not to be extended; linear: a linear warm-up, then 1 / sqrt(step),"
        " so that more --steps can follow; flat: the peak from the start, then "
        "1 / sqrt(step), as in the paper",
        ("linear", "flat", *TO_ZERO),
    )
    label_smoothing: float = _flag(
        0.0, "share of each target that is spread over the vocabulary; often 0.1"
    )
    z_loss: float = _flag(
        0.0, "coefficient of log(Z)^2, which keeps logits small; PaLM's: 1e-4"
    )
    validation_pairs: int = _flag(1000, "pairs of the dev split to validate on")
    seed: int = _flag(0, "of everything random")

    # -- mesh
    partitions: int = _flag(
        2,
        "devices to partition over; 0: plain Keras. Those of a CPU are virtual: more "
        "than it has cores are slower",
    )
    mesh: str = _flag(
        "",
        "axes and their sizes instead of partitions, such as data=2,expert=4: tokens "
        "are split over data, experts over expert, widths over model; "
        "empty: expert=PARTITIONS",
    )
    device: str = _flag("CPU", "kind of device", ("CPU", "GPU"))
    precision: str = _flag(
        "float32", "Keras dtype policy", ("float32", "mixed_bfloat16")
    )

    def __post_init__(self) -> None:
        positive = (
            "vocab_size batch_tokens encoder_layers decoder_layers model_dim "
            "hidden_dim heads steps steps_per_epoch warmup validation_pairs"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1. Received: {getattr(self, name)}"
                )
        not_negative = (
            "experts partitions group_size seed key_dim aux_loss_coef weight_decay "
            "clip_norm z_loss"
        )
        for name in not_negative.split():
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must be at least 0. Received: {getattr(self, name)}"
                )
        for name in (
            "dropout",
            "expert_dropout",
            "word_dropout",
            "beta_2",
            "label_smoothing",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1. Received: "
                    f"{getattr(self, name)}"
                )
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices and getattr(self, field.name) not in choices:
                raise ValueError(
                    f"{field.name} must be one of {', '.join(choices)}. "
                    f"Received: {getattr(self, field.name)!r}"
                )
        if self.steps % self.steps_per_epoch:
            raise ValueError(
                "steps must be a multiple of steps_per_epoch. Received: "
                f"steps={self.steps}, steps_per_epoch={self.steps_per_epoch}"
            )
        self.chosen_row_lengths  # noqa: B018 (raises if it is not two lengths)
        self.mesh_axes  # noqa: B018 (raises if it is not a mesh)

    @property
    def chosen_row_lengths(self) -> tuple[int, int] | None:
        """The row lengths of source and target, or None for "auto"."""
        if self.row_lengths == "auto":
            return None
        try:
            source, target = (int(part) for part in self.row_lengths.split(","))
        except ValueError:
            source = target = 0
        if min(source, target) < 3:
            raise ValueError(
                "row_lengths must be auto, or those of source and target, 3 or more, "
                f"with a comma between, such as 64,40. Received: {self.row_lengths!r}"
            )
        return source, target

    @property
    def decays_to_zero(self) -> bool:
        """True if the learning rate is 0 at the end, so that no step can follow."""
        return self.schedule in TO_ZERO

    @property
    def mesh_axes(self) -> dict[str, int]:
        """Names and sizes of the mesh's axes; none for plain Keras."""
        if not self.mesh:
            return {"expert": self.partitions} if self.partitions else {}
        axes: dict[str, int] = {}
        for part in self.mesh.split(","):
            name, _, size = (text.strip() for text in part.partition("="))
            if name not in MESH_AXES or name in axes or not size.isdecimal():
                axes = {}
                break
            axes[name] = int(size)
        if not all(axes.values()) or not axes:
            raise ValueError(
                f"mesh must be sizes of some of the axes {', '.join(MESH_AXES)}, such "
                f"as data=2,expert=4. Received: {self.mesh!r}"
            )
        return axes

    @property
    def language_tags(self) -> list[str] | None:
        tags = [tag.strip() for tag in self.languages.split(",") if tag.strip()]
        return tags or None

    def write(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        write_file(folder / "settings.json", text.encode())

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """The settings of a run.

        Raises:
            FileNotFoundError: when there is no run in `folder`.
            ValueError: when an earlier version wrote its settings.
        """
        path = local_path(folder, "run") / "settings.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no run in {folder} (no settings.json). Train one first."
            )
        values = json.loads(path.read_text("utf-8"))
        unknown = sorted(
            set(values) - {field.name for field in dataclasses.fields(cls)}
        )
        if unknown:
            raise ValueError(
                f"The run in {folder} must have been made by this version. An earlier "
                "version had other settings; name another folder with --run. "
                f"Received: {unknown}"
            )
        return cls(**values)
