"""Every mechanism spelled token by token, straight from its equation, over a built layer's own parameters.

`loop(layer, x, ctx)` is (y, losses), comparable with the layer at the tokens that are real."""

import math

import torch
from torch.nn import functional as F

from loops.experts import expert_choice, mode, moe
from loops.tokens import ACTIVATION, assemble, dense, gain, linear, norm_of, normed, real_of, real_tokens
from sparsemix.layers.attention import Attention
from sparsemix.layers.beside import Beside
from sparsemix.layers.block import Block
from sparsemix.layers.dense import Dense
from sparsemix.layers.expert_choice import ExpertChoice
from sparsemix.layers.mh_moe import MHMoE
from sparsemix.layers.mod import MoD
from sparsemix.layers.mode import MoDE
from sparsemix.layers.moe import MoE
from sparsemix.layers.peer import PEER
from sparsemix.layers.pkm import PKM
from sparsemix.layers.query_norm import QueryBatchNorm, QueryLayerNorm


def loop(layer, x, ctx):
    return LOOPS[type(layer)](layer, x, ctx)


def positions_of(x, ctx):
    return torch.arange(x.shape[1]).expand(x.shape[:2]) if ctx.positions is None else ctx.positions


def pair_speed(i, d, theta, scaling):
    """Radians per position of channel pair i."""
    speed = theta ** (-2 * i / d)
    if scaling is None:
        return speed
    if scaling.kind == "linear":
        return speed / scaling.factor
    turns, low, high = (
        scaling.original_seq_len * speed / (2 * math.pi),
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    if turns <= low:
        return speed / scaling.factor
    if turns >= high:
        return speed
    kept = (turns - low) / (high - low)
    return kept * speed + (1 - kept) * speed / scaling.factor


def turn(head, position, layer):
    """Channel pairs (i, i + d/2) as complex numbers, multiplied by exp(i position speed)."""
    if layer.rope_theta is None:
        return head
    d = len(head)
    speeds = [pair_speed(i, d, layer.rope_theta, layer.rope_scaling) for i in range(d // 2)]
    angle = position * torch.tensor(speeds, dtype=head.dtype)
    turned = torch.complex(head[: d // 2], head[d // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def one_head(projection, norm, token, at):
    """Channels `at` of a projected token, normed over the head or over all channels where there is a norm."""
    whole = linear(projection, token)
    if norm is None:
        return whole[at]
    return norm_of(norm, whole)[at] if len(norm.weight) == len(whole) else norm_of(norm, whole[at])


def attention(layer, x, ctx):
    positions, real = positions_of(x, ctx), real_of(x, ctx)
    group, rows = layer.num_heads // layer.num_kv_heads, {}
    d = layer.q.weight.shape[0] // layer.num_heads
    for b, t in real_tokens(x, ctx):
        seen = [
            s for s in range(t + 1) if real[b, s] and (ctx.doc_ids is None or ctx.doc_ids[b, s] == ctx.doc_ids[b, t])
        ]
        if layer.window is not None:
            seen = [s for s in seen if positions[b, t] - positions[b, s] < layer.window]
        heads = []
        for h in range(layer.num_heads):
            mine, theirs = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
            q = turn(one_head(layer.q, layer.q_norm, x[b, t], mine), positions[b, t], layer)
            keys = [turn(one_head(layer.k, layer.k_norm, x[b, s], theirs), positions[b, s], layer) for s in seen]
            weights = torch.stack([q @ k / math.sqrt(d) for k in keys]).exp()
            values = [linear(layer.v, x[b, s])[theirs] for s in seen]
            heads.append(sum(w * v for w, v in zip(weights, values, strict=True)) / weights.sum())
        rows[b, t] = linear(layer.o, normed(gain(layer.sub_norm), torch.cat(heads)))
    return assemble(x, rows), {}


def normal_queries(norm, queries, causal):
    """`queries` {(b, t): (H, C)} normalised as the layer says."""
    if isinstance(norm, QueryBatchNorm):
        if norm.training and not causal:
            mean = sum(queries.values()) / len(queries)
            variance = sum((q - mean) ** 2 for q in queries.values()) / len(queries)
        else:
            mean, variance = norm.mean, norm.square - norm.mean**2
        return {at: (q - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias for at, q in queries.items()}
    if isinstance(norm, QueryLayerNorm):

        def one(q):
            mean = q.mean(-1, keepdim=True)
            variance = ((q - mean) ** 2).mean(-1, keepdim=True)
            return (q - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias

        return {at: one(q) for at, q in queries.items()}
    return queries


PEER_GATES = {
    "softmax": lambda s: s.exp() / s.exp().sum(),
    "sigmoid": lambda s: 1 / (1 + torch.exp(-s)),
    "relu": lambda s: s.clamp(min=0),
}


def best_rows(layer, x, ctx):
    """(b, t), scores and rows of what every head of every real token picks, by scoring all n * n keys."""
    c, half = layer.config, layer.config.d_key // 2
    queries = {
        (b, t): (layer.query.weight @ x[b, t] + layer.query.bias).view(c.num_heads, c.d_key)
        for b, t in real_tokens(x, ctx)
    }
    for at, query in normal_queries(layer.query_norm, queries, ctx.causal).items():
        for h in range(c.num_heads):
            keys = layer.sub_keys if c.share_keys else layer.sub_keys[h]
            scores = torch.stack(
                [query[h, :half] @ keys[0, i] + query[h, half:] @ keys[1, j] for i in range(c.n) for j in range(c.n)]
            )
            best = scores.detach().argsort(descending=True)[: c.top_k]
            yield at, scores[best], best.tolist()


def pkm(layer, x, ctx):
    rows = {}
    for at, scores, best in best_rows(layer, x, ctx):
        for g, e in zip(scores.exp() / scores.exp().sum(), best, strict=True):
            rows[at] = rows.get(at, 0) + g * layer.value_vectors[e]
    return assemble(x, rows), {}


def peer(layer, x, ctx):
    c, rows = layer.config, {}
    for at, scores, best in best_rows(layer, x, ctx):
        for g, e in zip(PEER_GATES[c.gate](scores), best, strict=True):
            rows[at] = rows.get(at, 0) + g * ACTIVATION[c.activation](layer.w_in[e] @ x[at]) * layer.w_out[e]
    return assemble(x, rows), {}


def mh_moe(layer, x, ctx):
    h = layer.config.num_heads
    whole = {at: x[at] if layer.head is None else linear(layer.head, x[at]) for at in real_tokens(x, ctx)}
    heads = {at: token.chunk(h) for at, token in whole.items()}
    blank = x.new_zeros(x.shape[0], x.shape[1] * h, x.shape[2] // h)
    parts = assemble(blank, {(b, t * h + j): heads[b, t][j] for b, t in heads for j in range(h)})

    def each(field):
        return None if field is None else torch.stack([field] * h, dim=2).flatten(1)

    inner_ctx = ctx._replace(positions=each(ctx.positions), doc_ids=each(ctx.doc_ids), valid=each(ctx.valid))
    mixed, losses = loop(layer.inner, parts, inner_ctx)
    if layer.config.inner_residual:
        mixed = mixed + parts
    merged = {(b, t): torch.cat([mixed[b, t * h + j] for j in range(h)]) for b, t in heads}
    if layer.merge is not None:
        merged = {at: linear(layer.merge, normed(gain(layer.merge_norm), token)) for at, token in merged.items()}
    y = assemble(x, merged)
    if layer.config.shared_d_ff:
        y = y + dense(layer.shared, x, ctx)[0]
    return y, {f"inner.{name}": value for name, value in losses.items()}


MOD_GATES = {
    "sigmoid": lambda r: 1 / (1 + torch.exp(-r)),
    "raw": lambda r: r,
    "two_sigmoid": lambda r: 2 / (1 + torch.exp(-r)),
    "one": lambda r: torch.ones_like(r),
}


def passing(c, n, slack):
    """How many of n tokens pass."""
    base = min(int(c), n) if c > 1 else math.ceil(round(c * n, 6))
    return base + math.ceil(slack * (n - base))


def closes_a_stretch(position, c):
    """Is this the last token of another 1 / c of them?"""
    return math.floor(c * (position + 1) + 1e-6) > math.floor(c * position + 1e-6)


def hashed(position, salt):
    """A position as a number in [0, 1): the 32-bit integer hash of two rounds."""
    h = (position + salt) % 2**32
    for multiplier, shift in ((0x7FEB352D, 16), (0x846CA68B, 15)):
        h = (h ^ (h >> shift)) * multiplier % 2**32
    return (h ^ (h >> 16)) / 2**32


def selected(layer, x, ctx, scores):
    """The tokens that the selector of training takes, and those that wanted to pass."""
    c, real, positions = layer.config, real_of(x, ctx), positions_of(x, ctx)
    noise = torch.randn_like(x[..., 0]) if c.selector == "random" else None
    top, wants = torch.zeros_like(real), torch.zeros_like(real)
    for b in range(x.shape[0]):
        mine = [t for t in range(x.shape[1]) if real[b, t]]
        if c.selector in ("token_choice", "strided"):
            order = [
                t
                for t in mine
                if (
                    float(scores[b, t].detach()) > 0
                    if c.selector == "token_choice"
                    else closes_a_stretch(int(positions[b, t]), c.capacity)
                )
            ]
        else:
            rank = noise if noise is not None else {(b, t): scores[b, t].detach() for t in mine}
            order = sorted(mine, key=lambda t, rank=rank, b=b: (-float(rank[b, t]), t))
        for t in order:
            wants[b, t] = True
        for t in order[: passing(c.capacity, len(mine), layer.slack)]:
            top[b, t] = True
    return top, wants


def mod(layer, x, ctx):
    """At full size: the wrapped layer sees all T tokens, of which only the routed ones are real."""
    c, real, positions = layer.config, real_of(x, ctx), positions_of(x, ctx)
    scores = {at: (layer.router.weight[0] @ x[at]) for at in real_tokens(x, ctx)}
    top, wants = selected(layer, x, ctx, scores)
    losses, guess = {}, {}
    if c.selector == "expert_choice" and c.sampling == "predictor":
        for at in scores:
            hidden = ACTIVATION["silu"](linear(layer.predictor.up, x[at].detach()))
            guess[at] = linear(layer.predictor.down, hidden)[0]
        wrong = [F.softplus(-guess[at] if top[at] else guess[at]) for at in guess]
        losses["predictor"] = sum(wrong) / len(wrong)
    if c.selector == "expert_choice" and c.sampling == "router_bce":
        wrong = [F.softplus(-scores[at] if top[at] else scores[at]) for at in scores]
        losses["router_bce"] = c.router_loss_weight * sum(wrong) / len(wrong)
    if c.selector == "token_choice":
        f = sum(bool(wants[at]) for at in scores) / len(scores)
        P = sum(1 / (1 + torch.exp(-r)) for r in scores.values()) / len(scores)
        balance = f * P / c.capacity + (1 - f) * (1 - P) / (1 - c.capacity)
        losses["balance"] = c.router_loss_weight * balance
    routed = top
    if ctx.causal:
        rule = {
            "predictor": lambda at: guess[at] > 0,
            "router_bce": lambda at: scores[at] > 0,
            "threshold": lambda at: scores[at] > layer.threshold.threshold[0],
            "token_choice": lambda at: scores[at] > 0,
            "strided": lambda at: closes_a_stretch(int(positions[at]), c.capacity),
            "random": lambda at: hashed(int(positions[at]), int(layer.salt)) < c.capacity,
        }[c.sampling if c.selector == "expert_choice" else c.selector]
        routed = torch.zeros_like(real)
        for at in scores:
            routed[at] = rule(at)
    inner_ctx = ctx._replace(positions=positions, valid=routed)
    if not routed.any():
        return torch.zeros_like(x), losses
    out, inner = loop(layer.inner, x, inner_ctx)
    gates = {at: MOD_GATES[c.gate](scores[at]) for at in scores if routed[at]}
    full = c.block_output == "full"
    rows = {at: gate * (x[at] + out[at] if full else out[at]) for at, gate in gates.items()}
    return assemble(x, rows), losses | {f"inner.{name}": value for name, value in inner.items()}


def block(layer, x, ctx):
    tokens = real_tokens(x, ctx)
    mixed, mixer_losses = loop(layer.mixer, assemble(x, {at: norm_of(layer.mixer_norm, x[at]) for at in tokens}), ctx)
    middle = x + mixed
    fed, ffn_losses = loop(layer.ffn, assemble(x, {at: norm_of(layer.ffn_norm, middle[at]) for at in tokens}), ctx)
    losses = {f"mixer.{name}": value for name, value in mixer_losses.items()}
    return mixed + fed, losses | {f"ffn.{name}": value for name, value in ffn_losses.items()}


def beside(layer, x, ctx):
    (kept, kept_losses), (added, added_losses) = loop(layer.kept, x, ctx), loop(layer.added, x, ctx)
    losses = {f"kept.{name}": value for name, value in kept_losses.items()}
    return kept + added, losses | {f"added.{name}": value for name, value in added_losses.items()}


LOOPS = {
    Attention: attention,
    Dense: dense,
    MoE: moe,
    ExpertChoice: expert_choice,
    MoDE: mode,
    PKM: pkm,
    PEER: peer,
    MHMoE: mh_moe,
    MoD: mod,
    Block: block,
    Beside: beside,
}
