"""Upcycling: initializes a mixture of experts from a trained dense model."""

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
    token dropped, the mixture then computes the same as the dense layer, and training
    resumes from there; the router keeps its initial values. Weights of both keep their
    layouts.

    Args:
        dense: The trained model: a `FeedForward` or two `Dense` layers without bias,
            for a `MoELayer`; a `Transformer` without experts for one with. Built.
        sparse: The mixture to initialize. Built, of the same sizes.
        noise: Standard deviation of normal noise on the copies, as a share of that of
            the weight, so that experts differ from the start; 0.01 to 0.1. With 0 the
            router alone makes them differ.
        seed: Seed of the noise.

    Raises:
        ValueError: if the two do not match.
    """
    rng = np.random.default_rng(seed)
    if isinstance(sparse, Transformer) and isinstance(dense, Transformer):
        _upcycle_transformer(dense, sparse, noise, rng)
    elif isinstance(sparse, MoELayer) and isinstance(dense, FeedForward | list | tuple):
        _upcycle_layer(dense, sparse, noise, rng)
    else:
        raise ValueError(
            "The target must be a MoELayer for a dense layer, and a Transformer for a "
            f"dense Transformer. Received: {type(dense).__name__} and "
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
                "Dense layers must have use_bias=False: experts have no biases. "
                f"Received: use_bias={first.use_bias}, {second.use_bias}"
            )
        weights = {"wi": first.kernel, "wo": second.kernel}
    expected = {w.name: tuple(w.shape[1:]) for w in sparse.experts.trainable_weights}
    received = {name: tuple(weight.shape) for name, weight in weights.items()}
    if expected != received:
        raise ValueError(
            f"The dense weights must be those of one expert of {sparse.name!r}, "
            f"{expected}. Received: {received}"
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
    targets, sources = _sublayers(sparse), _sublayers(dense)
    if targets.keys() != sources.keys():
        raise ValueError(
            "The two models must have the same layers. Received: only in one of them "
            f"{sorted(targets.keys() ^ sources.keys())}"
        )
    pairs = [(name, sources[name], layer) for name, layer in targets.items()]
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
                f"{name} must have the same weights in both models. "
                f"Received: {shapes[0]} and {shapes[1]}"
            )
    for _, source, target in pairs:
        if isinstance(target, MoELayer):
            _upcycle_layer(source, target, noise, rng)
        else:
            target.set_weights(source.get_weights())


def _sublayers(model: Transformer) -> dict[str, keras.layers.Layer]:
    """Returns the layers of a model that have weights, those of blocks one by one."""
    names = ["source_embedding", "encoder_norm", "decoder_norm"]
    if not model.share_embeddings:
        names.append("target_embedding")
    if model.projection is not None:
        names.append("projection")
    layers = {name: getattr(model, name) for name in names}
    block_layers = ["attention_norm", "self_attention", "feed_forward_norm"]
    block_layers += ["feed_forward", "cross_attention", "cross_norm"]
    for side in ("encoder_blocks", "decoder_blocks"):
        for i, block in enumerate(getattr(model, side)):
            for name in block_layers:
                if hasattr(block, name):
                    layers[f"{side}[{i}].{name}"] = getattr(block, name)
    return layers
