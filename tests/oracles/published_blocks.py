"""Blocks of experts of published models, one token after the other.

Weights have the names and shapes of Hugging Face transformers. From the papers: Mixtral
(arXiv 2401.04088, 2.1), Qwen's reports (its shared expert is gated), DeepSeek-V2 (arXiv
2405.04434, equations 20 to 22) and V3 (arXiv 2412.19437, equations 12 to 16).
"""

import numpy as np


def block(
    x,
    weights,
    *,
    k,
    sigmoid=False,
    normalize=True,
    scale=1.0,
    groups=1,
    groups_per_token=1,
    best_of_group=1,
):
    """Outputs for tokens `x` `[T, M]`.

    `best_of_group` experts of a group make its score.
    """
    x = np.asarray(x, np.float64)
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        logits = weights["gate.weight"] @ token
        scores = 1 / (1 + np.exp(-logits)) if sigmoid else _softmax(logits)
        ranked = scores + weights.get("gate.e_score_correction_bias", 0.0)
        members = np.split(np.arange(len(ranked)), groups)
        best = sorted(
            members, key=lambda m: -np.sort(ranked[m])[-best_of_group:].sum()
        )[:groups_per_token]
        chosen = sorted(np.concatenate(best), key=lambda e: -ranked[e])[:k]
        total = scores[chosen].sum() if normalize else 1.0
        for expert in chosen:
            gate, up = np.split(weights["experts.gate_up_proj"][expert], 2)
            down = weights["experts.down_proj"][expert]
            weight = scale * scores[expert] / total
            y[t] += weight * _gated(token, gate, up, down)
        y[t] += _shared(token, weights)
    return y


def _shared(token, weights):
    for name in ("shared_expert", "shared_experts"):
        if f"{name}.up_proj.weight" in weights:
            projections = ("gate_proj", "up_proj", "down_proj")
            output = _gated(
                token, *(weights[f"{name}.{p}.weight"] for p in projections)
            )
            if "shared_expert_gate.weight" in weights:
                logit = weights["shared_expert_gate.weight"] @ token
                output = output / (1 + np.exp(-logit))
            return output
    return 0.0


def _gated(token, gate, up, down):
    hidden = gate @ token
    return down @ (hidden / (1 + np.exp(-hidden)) * (up @ token))


def _softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
