"""Weights of blocks of experts of Hugging Face transformers, for a `MoELayer`."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_layers.feed_forward import FeedForward
from keras_layers.moe.experts import Experts
from keras_layers.moe.layer import MoELayer

#: Names of an expert's matrices, where each expert has its own: Mixtral's checkpoints,
#: and all others.
_OF_AN_EXPERT = {
    "wi_gate": ("w1", "gate_proj"),
    "wi": ("w3", "up_proj"),
    "wo": ("w2", "down_proj"),
}


def assign_transformers_weights(layer: MoELayer, state: Mapping[str, Any]) -> None:
    """Assigns the weights of a block of Hugging Face transformers to a layer.

    Blocks of Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and V3, and others with the
    same names. The layer is one made by `MoELayer.as_in` for the model's sizes. It
    keeps its layouts on a mesh.

    Args:
        layer: The layer. Built.
        state: Arrays by name, such as `gate.weight`, without the block's own prefix:
            the block's `state_dict()`, or a part of a checkpoint. The experts' matrices
            are together (`experts.gate_up_proj`, `experts.down_proj`) or one by one
            (`experts.0.w1.weight`, `experts.0.gate_proj.weight`).

    Raises:
        ValueError: if the layer is not built or not gated, or if the names or shapes
            are not those of the layer. Nothing is assigned then.
    """
    if not layer.built or not layer.experts.gated:
        raise ValueError(
            "The layer must be built and gated, as MoELayer.as_in makes it. Received: "
            f"{layer.name!r}, built={layer.built}, gated={layer.experts.gated}"
        )
    given = {name: np.asarray(array) for name, array in state.items()}
    router, shared = layer.router, layer.shared_experts
    found = [(router.kernel, _matrix(_take(given, "gate.weight")))]
    if getattr(router, "bias", None) is not None:
        found.append((router.bias, _take(given, "gate.e_score_correction_bias")))
    found += _of_experts(layer.experts, given)
    if shared is not None:
        found += _of_shared(shared, given)
    if layer.shared_expert_gate:
        weight = _matrix(_take(given, "shared_expert_gate.weight"))
        found.append((layer.shared_gate, weight))
    if given:
        raise ValueError(
            f"The names must be of weights of {layer.name!r}. Received: "
            f"{sorted(given)}, which it does not have"
        )
    for variable, value in found:
        if tuple(variable.shape) != value.shape:
            raise ValueError(
                f"The value of {variable.path} must be of shape "
                f"{tuple(variable.shape)}. Received: {value.shape}"
            )
    for variable, value in found:
        variable.assign(value)


def _of_experts(
    experts: Experts, given: dict[str, np.ndarray]
) -> list[tuple[keras.Variable, np.ndarray]]:
    if "experts.gate_up_proj" in given:
        both = _matrix(given.pop("experts.gate_up_proj"))  # [E, M, 2 * H]
        down = _matrix(_take(given, "experts.down_proj"))
        gate, up = np.split(both, 2, axis=-1)
        return [(experts.wi_gate, gate), (experts.wi, up), (experts.wo, down)]
    pairs = []
    for ours, theirs in _OF_AN_EXPERT.items():
        name = next((n for n in theirs if f"experts.0.{n}.weight" in given), theirs[-1])
        matrices = [
            _matrix(_take(given, f"experts.{e}.{name}.weight"))
            for e in range(experts.num_experts)
        ]
        if len({matrix.shape for matrix in matrices}) > 1:
            raise ValueError(
                f"The experts' {name} must be of one shape. Received: "
                f"{[matrix.shape for matrix in matrices]}"
            )
        pairs.append((getattr(experts, ours), np.stack(matrices)))
    return pairs


def _of_shared(
    shared: FeedForward, given: dict[str, np.ndarray]
) -> list[tuple[keras.Variable, np.ndarray]]:
    is_one = "shared_expert.up_proj.weight" in given  # as Qwen names them
    prefix = "shared_expert" if is_one else "shared_experts"
    return [
        (getattr(shared, ours), _matrix(_take(given, f"{prefix}.{theirs}.weight")))
        for ours, (_, theirs) in _OF_AN_EXPERT.items()
    ]


def _take(given: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in given:
        raise ValueError(
            f"The state must have {name!r}. Received: {sorted(given)} besides those "
            "that were read"
        )
    return given.pop(name)


def _matrix(weight: np.ndarray) -> np.ndarray:
    """`[..., out, in]`, as torch has it -> `[..., in, out]`."""
    return np.swapaxes(weight, -1, -2) if weight.ndim > 1 else weight
