"""The mixtures of experts, token by token."""

import math

import torch

from loops.tokens import assemble, dense, expert, real_of, real_tokens


def softmax(logits):
    return logits.exp() / logits.exp().sum()


def largest(scores, k):
    return sorted(range(len(scores)), key=lambda e: -float(scores[e].detach()))[:k]


def seated(chosen, x, share, E):
    """The picks (b, t, e) that find a seat: row by row, first choices by position, then second ones, and so on."""
    kept = set()
    for b in range(x.shape[0]):
        mine = [t for (row, t) in chosen if row == b]
        seats = [math.ceil(round(share * len(mine), 6))] * E
        for k in range(max((len(chosen[b, t]) for t in mine), default=0)):
            for t in sorted(mine):
                e = chosen[b, t][k]
                if seats[e]:
                    seats[e] -= 1
                    kept.add((b, t, e))
    return kept


def moe(layer, x, ctx):
    c, E = layer.config, layer.config.num_experts
    logits = {at: layer.router.weight @ x[at] for at in real_tokens(x, ctx)}
    probs = {at: softmax(z) for at, z in logits.items()}
    bias = torch.zeros(E) if layer.bias is None else layer.bias
    chosen = {at: largest(p + bias, c.top_k) for at, p in probs.items()}
    served = {(*at, e) for at in chosen for e in chosen[at]}
    if c.capacity_factor is not None and not ctx.causal:
        served = seated(chosen, x, c.capacity_factor * c.top_k / E, E)
    rows = {}
    for at, p in probs.items():
        scale = sum(p[e] for e in chosen[at]) if c.normalize_gates else 1
        outs = [p[e] / scale * expert(layer.experts, e, x[at]) for e in chosen[at] if (*at, e) in served]
        rows[at] = sum(outs, 0 * x[at])
    y, N = assemble(x, rows), len(rows)
    if c.shared_d_ff:
        y = y + dense(layer.shared, x, ctx)[0]
    losses = {}
    if c.balance_weight:
        counted = [e for ids in chosen.values() for e in (ids if c.balance_picks == "all" else ids[:1])]
        f = [counted.count(e) / len(counted) for e in range(E)]
        losses["balance"] = c.balance_weight * E * sum(f[e] * sum(p[e] for p in probs.values()) / N for e in range(E))
    if c.z_weight:
        losses["router_z"] = c.z_weight * sum(z.exp().sum().log() ** 2 for z in logits.values()) / N
    return y, losses


def takers(affinity, groups, share, threshold, causal):
    """{(b, t): experts that take it}: the best of each group, or all above a threshold."""
    taken = {at: [] for at in affinity}
    for e in range(len(next(iter(affinity.values())))):
        if causal and threshold is not None:
            best = [at for at in affinity if affinity[at][e] > threshold.threshold[e]]
        else:
            best = []
            for group in groups:
                quota = min(len(group), math.ceil(round(share * len(group), 6)))
                best += sorted(group, key=lambda at: (-float(affinity[at][e].detach()), at))[:quota]
        for at in best:
            taken[at].append(e)
    return taken


def rows_of(x, ctx):
    real = real_of(x, ctx)
    return [[(b, t) for t in range(x.shape[1]) if real[b, t]] for b in range(x.shape[0])]


def served_by_choice(layer, x, affinity, taken):
    each = {at: [affinity[at][e] * expert(layer.experts, e, x[at]) for e in taken[at]] for at in taken}
    return assemble(x, {at: sum(outs, 0 * x[at]) for at, outs in each.items()})


def expert_choice(layer, x, ctx):
    c = layer.config
    affinity = {at: softmax(layer.router.weight @ x[at]) for at in real_tokens(x, ctx)}
    groups = [list(affinity)] if c.group == "batch" else rows_of(x, ctx)
    taken = takers(affinity, groups, c.capacity_factor / c.num_experts, layer.threshold, ctx.causal)
    y = served_by_choice(layer, x, affinity, taken)
    if c.shared_d_ff:
        y = y + dense(layer.shared, x, ctx)[0]
    return y, {}


def mode(layer, x, ctx):
    c, E, M = layer.config, layer.config.num_experts, layer.config.num_noop
    logits = {at: layer.router.weight @ x[at] for at in real_tokens(x, ctx)}
    probs = {at: softmax(z) for at, z in logits.items()}
    N, losses = len(probs), {}
    if c.routing == "expert_choice":
        affinity = {at: p[:E] for at, p in probs.items()}
        taken = takers(affinity, rows_of(x, ctx), c.top_k / (E + M), layer.threshold, ctx.causal)
        y = served_by_choice(layer, x, affinity, taken)
    else:
        chosen = {at: largest(p, c.top_k) for at, p in probs.items()}
        rows = {}
        for at, p in probs.items():
            scale = sum(p[e] for e in chosen[at]) if c.normalize_gates else 1
            outs = [p[e] / scale * expert(layer.experts, e, x[at]) for e in chosen[at] if e < E]
            rows[at] = sum(outs, 0 * x[at])
        y = assemble(x, rows)
        weight = 0.01 if c.balance_weight is None else c.balance_weight
        if weight:
            picks = [e for ids in chosen.values() for e in ids]
            f = [picks.count(e) / len(picks) for e in range(E + M)]
            P = [sum(p[e] for p in probs.values()) / N for e in range(E + M)]
            f_real, P_real, f_noop, P_noop = sum(f[:E]), sum(P[:E]), sum(f[E:]), sum(P[E:])
            within = E * sum(f[e] / f_real * P[e] / P_real for e in range(E)) if f_real else 0.0
            between = f_real * P_real / (E / (E + M)) + f_noop * P_noop / (M / (E + M))
            losses["balance"] = weight * (within + between)
    if c.z_weight:
        losses["router_z"] = c.z_weight * sum(z.exp().sum().log() ** 2 for z in logits.values()) / N
    return y, losses
