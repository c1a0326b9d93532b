"""Slow, obvious NumPy versions of what the layers compute, written from the paper.

Nothing here is shared with the library: loops over tokens and experts in the order of
the paper's Algorithm 1 (GShard, arXiv 2006.16668, section 2.2), so that a mistake in
the vectorised code cannot hide in both.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Gating:
    """Outcome of Algorithm 1 for one group.

    Attributes:
        combine: `[S, E]`, the paper's G: weight of each expert for each token.
        position: `[S, E]`, place in the expert's buffer, -1 where not dispatched.
        aux_loss: the paper's l_aux of the group; 0 where it has no real token.
        first, second: `[S]` the two chosen experts.
        choices: `[(token, expert, slot, weight)]` of the dispatches made.
    """

    combine: np.ndarray
    position: np.ndarray
    aux_loss: float
    first: np.ndarray
    second: np.ndarray
    choices: list = field(default_factory=list)


def softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    e = np.exp(x)
    return e / e.sum(axis=-1, keepdims=True)


def algorithm1(
    gates: np.ndarray,
    capacity: int,
    *,
    uniforms: np.ndarray | None,
    real: np.ndarray | None = None,
    drop_frees_slot: bool = False,
) -> Gating:
    """Algorithm 1 for the tokens of one group, one token after the other.

    Args:
        gates: `[S, E]` softmax outputs.
        capacity: C.
        uniforms: `[S]` the rnd of line 17, or None to keep every second choice.
        real: `[S]` False for padding, which is skipped everywhere.
        drop_frees_slot: what a second choice that the random test drops does to the
            counter of its expert. False: line 22 as printed, it counts. True: it
            does not.
    """
    tokens, experts = gates.shape
    if real is None:
        real = np.ones(tokens, bool)
    size = int(real.sum())
    combine = np.zeros((tokens, experts), gates.dtype)
    position = np.full((tokens, experts), -1)
    first = np.zeros(tokens, int)
    second = np.zeros(tokens, int)
    choices = []
    count = [0] * experts  # line 1

    for s in range(tokens):
        # Line 5. `max` keeps the first of equals, hence the lowest index.
        first[s] = max(range(experts), key=lambda e: gates[s, e])
        rest = [e for e in range(experts) if e != first[s]]
        second[s] = max(rest, key=lambda e: gates[s, e])

    for s in range(tokens):  # line 4
        if not real[s]:
            continue
        e1, e2 = first[s], second[s]
        g1 = gates[s, e1] / (gates[s, e1] + gates[s, e2])  # line 6
        if count[e1] < capacity:  # line 8
            combine[s, e1] = g1
            position[s, e1] = count[e1]
            choices.append((s, e1, count[e1], g1))
        count[e1] += 1  # line 11

    aux_loss = 0.0
    if size:
        mean_gate = gates[real].sum(axis=0) / size  # line 3
        aux_loss = (
            sum(count[e] / size * mean_gate[e] for e in range(experts)) / experts
        )  # line 13

    for s in range(tokens):  # line 14
        if not real[s]:
            continue
        e1, e2 = first[s], second[s]
        g2 = gates[s, e2] / (gates[s, e1] + gates[s, e2])  # line 16
        wanted = True if uniforms is None else bool(2.0 * g2 > uniforms[s])
        if count[e2] < capacity and wanted:  # line 19
            combine[s, e2] = g2
            position[s, e2] = count[e2]
            choices.append((s, e2, count[e2], g2))
        if wanted or not drop_frees_slot:
            count[e2] += 1  # line 22

    return Gating(combine, position, float(aux_loss), first, second, choices)


def moe_layer(
    inputs: np.ndarray,
    combine: np.ndarray,
    wi: np.ndarray,
    wo: np.ndarray,
) -> np.ndarray:
    """`y_s = sum_e G[s, e] * wo_e . relu(wi_e . x_s)`, token by token.

    Args:
        inputs: `[S, M]`.
        combine: `[S, E]`.
        wi: `[E, M, H]`.
        wo: `[E, H, M]`.
    """
    outputs = np.zeros_like(inputs)
    for s in range(inputs.shape[0]):
        for e in range(wi.shape[0]):
            if combine[s, e] != 0:
                hidden = np.maximum(inputs[s] @ wi[e], 0.0)
                outputs[s] += combine[s, e] * (hidden @ wo[e])
    return outputs


def attention(
    query: np.ndarray,
    memory: np.ndarray,
    wq: np.ndarray,
    wk: np.ndarray,
    wv: np.ndarray,
    wo: np.ndarray,
    *,
    memory_mask: np.ndarray | None = None,
    causal: bool = False,
) -> np.ndarray:
    """Multi-head attention of one sequence, head by head and position by position.

    Args:
        query: `[T, M]`.
        memory: `[L, M]`.
        wq, wk, wv: `[M, N, D]`.
        wo: `[N, D, M]`.
        memory_mask: `[L]`, False for padding.
        causal: position t sees positions up to t.
    """
    outputs = np.zeros_like(query)
    heads, size = wq.shape[1:]
    for n in range(heads):
        for t in range(query.shape[0]):
            seen = [
                i
                for i in range(memory.shape[0])
                if (memory_mask is None or memory_mask[i]) and (not causal or i <= t)
            ]
            q = query[t] @ wq[:, n]
            scores = np.array([q @ (memory[i] @ wk[:, n]) for i in seen])
            weights = softmax(scores / np.sqrt(size))
            value = sum(
                w * (memory[i] @ wv[:, n]) for w, i in zip(weights, seen, strict=True)
            )
            outputs[t] += value @ wo[n]
    return outputs
