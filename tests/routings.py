"""Choices of a routing, against a list of those it should have made."""

import numpy as np

from keras_layers import ExpertChoiceRouting


def logits_of(seed, groups, tokens, experts, ties=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(groups, tokens, experts)) * 2
    return (np.round(logits) if ties else logits).astype(np.float32)


def choices_of(routing, g):
    """The dispatches of group g: `{(token, expert, slot): weight}`."""
    found = {}
    if isinstance(routing, ExpertChoiceRouting):
        index, weight = routing.token_index.numpy()[g], routing.weight.numpy()[g]
        for e, c in zip(*np.nonzero(index >= 0), strict=True):
            found[int(index[e, c]), int(e), int(c)] = weight[e, c]
        chosen = {(s, e) for s, e, _ in found}
        assert chosen == set(zip(*np.nonzero(routing.chosen.numpy()[g]), strict=True))
        return found
    expert, slot, weight, dispatched = (x.numpy()[g] for x in routing[:4])
    for s, k in zip(*np.nonzero(dispatched), strict=True):
        found[int(s), int(expert[s, k]), int(slot[s, k])] = weight[s, k]
    assert len(found) == dispatched.sum()
    return found


def check(routing, expected):
    for g, choices in enumerate(expected):
        found = choices_of(routing, g)
        wanted = {(s, e, c): w for s, e, c, w in choices}
        assert found.keys() == wanted.keys()
        for key, weight in wanted.items():
            np.testing.assert_allclose(found[key], weight, atol=1e-6)
