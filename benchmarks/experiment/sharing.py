"""A picture of the languages that share experts, from the routing of the encoder."""

import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Languages of the picture, those of the most training pairs.
SHOWN = 60


def expert_use(
    model: Any, vocabulary: Any, pairs: Sequence[Any]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns how the encoder's layers send each language's tokens.

    Args:
        model: A `Transformer` with experts.
        vocabulary: Its vocabulary.
        pairs: Sentences of several languages.

    Returns:
        Name of the layer -> language -> `[E]`, the shares of its choices, of sum 1.
    """
    import tensorflow as tf

    from gshard_examples.translation.tokens import tokenize_pairs
    from keras_layers import record_routing

    by_language = defaultdict(list)
    for pair in pairs:
        by_language[pair.lang].append(pair)
    use: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for language, some in by_language.items():
        tokens = tokenize_pairs(some, vocabulary)
        ids = np.zeros([len(tokens), 64], np.int32)
        for row, start in enumerate(tokens.source_starts[:-1]):
            length = min(int(tokens.source_lengths[row]), 64)
            ids[row, :length] = tokens.source[start : start + length]
        with record_routing() as routings:
            # Nothing is dropped, so that a choice is a choice.
            _, mask = model.encode(tf.constant(ids), training=False, decoding=True)
        for name, (routing,) in routings.items():
            # [G, S, K], and the tokens [B, L] that they are of.
            experts = routing.expert_index.numpy().reshape(mask.shape[0], -1)
            chosen = experts.reshape(*mask.shape, -1)[mask.numpy()]
            sent = routing.dispatched.numpy().reshape(*mask.shape, -1)[mask.numpy()]
            counts = np.bincount(chosen[sent], minlength=routing.num_experts)
            use[name][language] = counts / counts.sum()
    return dict(use)


def similarity(shares: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Returns languages, and for each two the part of their choices that is shared."""
    languages = list(shares)
    table = np.stack([shares[language] for language in languages])  # [languages, E]
    common = np.minimum(table[:, None], table[None, :]).sum(axis=-1)
    return languages, common


def plot_sharing(
    use: Mapping[str, Mapping[str, np.ndarray]],
    counts: Mapping[str, int],
    path: pathlib.Path,
) -> None:
    """Draws a square for each layer: languages by family, brighter where they share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gshard_examples.translation.languages import family_of

    figure = Figure(figsize=(9 * len(use), 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(ncols=len(use), squeeze=False)[0]
    for axes, (name, shares) in zip(panels, use.items(), strict=True):
        largest = sorted(shares, key=lambda tag: -counts.get(tag, 0))[:SHOWN]
        order = sorted(largest, key=lambda tag: (family_of(tag), tag))
        languages, common = similarity({tag: shares[tag] for tag in order})
        image = axes.imshow(common, vmin=0, vmax=1, cmap="viridis")
        labels = [f"{family_of(tag)}: {tag}" for tag in languages]
        axes.set_yticks(range(len(languages)), labels, fontsize=6)
        axes.set_xticks(range(len(languages)), languages, fontsize=6, rotation=90)
        axes.set_title(f"{name}: shared choices of experts")
        figure.colorbar(image, ax=axes, shrink=0.6)
    figure.savefig(path, dpi=100)
