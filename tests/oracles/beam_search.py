"""Beam search over one source, with lists and a full pass for every prefix."""


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


def beam_search(
    log_probs_after, limit, eos, pad, beam_size, alpha, num_results, early_stop
):
    """The best `(ids, score, log_prob)` of one source, best first.

    Args:
        log_probs_after: prefix (a list of ids without BOS) -> log-probabilities [V].
    """
    growing = [([], 0.0)]
    ended = []
    length = 0
    while length < limit:
        length += 1
        candidates = []
        for parent, (prefix, so_far) in enumerate(growing):
            for token, log_prob in enumerate(log_probs_after(prefix)):
                if token != pad:
                    candidates.append(
                        (-(so_far + log_prob), parent, token, [*prefix, token])
                    )
        candidates.sort(key=lambda c: c[:3])  # ties: the parent, then the token
        candidates = candidates[: 2 * beam_size]
        for rank, (minus, _, token, ids) in enumerate(candidates):
            if token == eos and (rank < beam_size or not early_stop):
                ended.append((ids, -minus / penalty(length, alpha), -minus))
        ended.sort(key=lambda found: -found[1])  # stable: what ended first stays first
        ended = ended[:beam_size]
        growing = [
            (ids, -minus) for minus, _, token, ids in candidates if token != eos
        ][:beam_size]
        if early_stop:
            if len(ended) == beam_size:
                break
        elif len(ended) >= num_results:
            best_possible = growing[0][1] / penalty(limit, alpha)
            if ended[num_results - 1][1] > best_possible:
                break
    rest = [(ids, total / penalty(length, alpha), total) for ids, total in growing]
    return (ended + rest)[:num_results]
