"""Starting a mixture of experts from a trained dense model."""

from collections.abc import Sequence

import keras
import numpy as np

from keras_layers.feed_forward import FeedForward
from keras_layers.moe.layer import MoELayer
from keras_layers.transformer import Transformer


def upcycle(
    dense: FeedForward | Sequence[keras.layers.Dense] | Transformer,
    sparse: MoELayer | Transformer,
    noise: float = 0.0,
    seed: int = 0,
) -> None:
    """Copies a dense layer's weights into every expert (arXiv 2212.05055).

    With weights that sum to 1 (`Top2Router`, `TopKRouter` with k of 2 and more) and no
    token dropped, the mixture then computes what the dense layer did, and training
    goes on from there; the router starts as it was made. Weights of both keep their
    layouts.

    Args:
        dense: What was trained: a `FeedForward` or two `Dense` layers without bias, for
            a `MoELayer`; a `Transformer` without experts for one with. Built.
        sparse: What is to start from it. Built, of the same sizes.
        noise: Standard deviation of normal noise on the copies, as a share of that of
            the weight, so that experts differ from the start; 0.01 to 0.1. With 0 the
            router alone makes them differ.
        seed: Of the noise.

    Raises:
        ValueError: if the two do not fit each other.
    """
    rng = np.random.default_rng(seed)
    if isinstance(sparse, Transformer) and isinstance(dense, Transformer):
        _upcycle_transformer(dense, sparse, noise, rng)
    elif isinstance(sparse, MoELayer) and isinstance(dense, FeedForward | list | tuple):
        _upcycle_layer(dense, sparse, noise, rng)
    else:
        raise ValueError(
            "A dense layer goes into a MoELayer, a dense Transformer into a "
            f"Transformer. Received: {type(dense).__name__} and "
            f"{type(sparse).__name__}"
        )


def _upcycle_layer(
    dense: FeedForward | Sequence[keras.layers.Dense],
    sparse: MoELayer,
    noise: float,
    rng: np.random.Generator,
) -> None:
    if isinstance(dense, FeedForward):
        names = ["wi", "wi_gate", "wo"] if dense.gated else ["wi", "wo"]
        weights = {name: getattr(dense, name) for name in names}
    else:
        first, second = dense
        if first.use_bias or second.use_bias:
            raise ValueError(
                "Experts have no biases: give Dense layers with use_bias=False. "
                f"Received: use_bias={first.use_bias}, {second.use_bias}"
            )
        weights = {"wi": first.kernel, "wo": second.kernel}
    wanted = {w.name: tuple(w.shape[1:]) for w in sparse.experts.trainable_weights}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if wanted != found:
        raise ValueError(
            f"The dense weights must be those of one expert of {sparse.name!r}, "
            f"{wanted}. Received: {found}"
        )
    for name, weight in weights.items():
        value = keras.ops.convert_to_numpy(weight).astype("float32")
        copies = np.broadcast_to(value, (sparse.num_experts, *value.shape))
        if noise:
            copies = copies + rng.normal(size=copies.shape) * noise * value.std()
        getattr(sparse.experts, name).assign(copies)


def _upcycle_transformer(
    dense: Transformer, sparse: Transformer, noise: float, rng: np.random.Generator
) -> None:
    ours, theirs = _parts(sparse), _parts(dense)
    if ours.keys() != theirs.keys():
        raise ValueError(
            "The two must have the same parts. Received: only in one of them "
            f"{sorted(ours.keys() ^ theirs.keys())}"
        )
    pairs = [(name, theirs[name], layer) for name, layer in ours.items()]
    for name, source, target in pairs:
        if isinstance(source, MoELayer):
            raise ValueError(
                f"The dense model must have no experts. Received: {name} is a MoELayer"
            )
        if isinstance(target, MoELayer):
            continue
        shapes = [[tuple(w.shape) for w in x.get_weights()] for x in (source, target)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} has other weights in the two models. Received: {shapes[0]} "
                f"and {shapes[1]}"
            )
    for _, source, target in pairs:
        if isinstance(target, MoELayer):
            _upcycle_layer(source, target, noise, rng)
        else:
            target.set_weights(source.get_weights())


def _parts(model: Transformer) -> dict[str, keras.layers.Layer]:
    """The layers of a model that have weights, blocks taken apart."""
    names = ["source_embedding", "encoder_norm", "decoder_norm"]
    if not model.share_embeddings:
        names.append("target_embedding")
    if model.projection is not None:
        names.append("projection")
    parts = {name: getattr(model, name) for name in names}
    block_parts = ["attention_norm", "self_attention", "feed_forward_norm"]
    block_parts += ["feed_forward", "cross_attention", "cross_norm"]
    for side in ("encoder_blocks", "decoder_blocks"):
        for i, block in enumerate(getattr(model, side)):
            for name in block_parts:
                if hasattr(block, name):
                    parts[f"{side}[{i}].{name}"] = getattr(block, name)
    return parts
