"""Slow routers, one token after the other, from the papers named in `keras_layers`.

One group each. `choices` are `(token, expert, slot, weight)` of the dispatches made.
"""

import numpy as np


def top2(
    gates, capacity, *, real, uniforms, policy, threshold, legacy, drop_frees_slot
):
    """Algorithm 1 with the options of lingvo's Top2GatingOnLogits.

    `uniforms` `[S]` are for "random"; None keeps all second choices.
    """
    tokens, experts = gates.shape
    count = [0] * experts
    granted = {}  # (token, rank) -> (expert, slot, gate)
    picks = []
    for s in range(tokens):
        first = max(range(experts), key=lambda e: gates[s, e])
        second = max(
            (e for e in range(experts) if e != first), key=lambda e: gates[s, e]
        )
        raw = np.array([gates[s, first], gates[s, second]], np.float32)
        gate = raw / raw.sum() if legacy else raw
        picks.append(((first, second), gate))
    for rank in (0, 1):
        for s in range(tokens):
            if not real[s]:
                continue
            chosen, gate = picks[s]
            wanted = True
            if rank == 1:
                if policy == "random" and uniforms is not None:
                    wanted = gate[1] > np.float32(uniforms[s]) * np.float32(threshold)
                elif policy == "threshold":
                    wanted = gate[1] > threshold
            expert = chosen[rank]
            if wanted and count[expert] < capacity:
                granted[s, rank] = (expert, count[expert], gate[rank])
            if wanted or not drop_frees_slot:
                count[expert] += 1
    choices = []
    for (s, rank), (expert, slot, gate) in granted.items():
        if not legacy:
            other = granted.get((s, 1 - rank))
            gate = gate / (gate + (other[2] if other else 0.0))
        choices.append((s, expert, slot, float(gate)))
    return choices


def within_groups(ranked, groups, allowed, best):
    """`ranked` `[S, E]` of the `allowed` groups whose `best` experts sum to the most.

    -inf in the other groups.
    """
    limited = np.full_like(ranked, -np.inf)
    members = np.split(np.arange(ranked.shape[1]), groups)
    for row, result in zip(ranked, limited, strict=True):
        scores = [sum(sorted(row[m])[::-1][:best]) for m in members]
        for d in sorted(range(groups), key=lambda d: -scores[d])[:allowed]:
            result[members[d]] = row[members[d]]
    return limited


def top_k(scores, ranked, k, capacity, *, real, normalize, prioritized):
    """k largest of `ranked`, weighted by `scores`; capacity in rounds of one choice."""
    tokens, experts = scores.shape
    order = list(range(tokens))
    if prioritized:
        order.sort(key=lambda s: -scores[s].max())  # stable
    picks = [
        sorted(range(experts), key=lambda e: -ranked[s, e])[:k] for s in range(tokens)
    ]
    count = [0] * experts
    choices = []
    for rank in range(k):
        for s in order:
            if not real[s]:
                continue
            expert = picks[s][rank]
            weight = scores[s, expert]
            if normalize:
                weight = weight / sum(scores[s, e] for e in picks[s])
            if count[expert] < capacity:
                choices.append((s, expert, count[expert], float(weight)))
            count[expert] += 1
    return choices


def expert_choice(gates, capacity, *, real):
    """Each expert's best tokens."""
    tokens, experts = gates.shape
    choices = []
    for expert in range(experts):
        order = sorted(
            (s for s in range(tokens) if real[s]), key=lambda s: -gates[s, expert]
        )
        for slot, s in enumerate(order[:capacity]):
            choices.append((s, expert, slot, float(gates[s, expert])))
    return choices


def mixture(x, choices, feed_forward):
    """`sum of weight * FFN_expert(x)` for each token of `x` `[S, M]`."""
    y = np.zeros_like(x)
    for s, expert, _, weight in choices:
        y[s] += weight * feed_forward(expert, x[s])
    return y
