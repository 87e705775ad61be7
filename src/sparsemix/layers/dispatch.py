"""Running experts on the tokens that routing gave them: dropless, at a fixed capacity, or by any list of picks.

`experts` maps (rows sorted by expert, counts) to rows: a bank of layers/linear.py, or its packed form."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparsemix.layers.base import Cost
from sparsemix.layers.linear import Experts, num_matrices
from sparsemix.layers.ternary import FLOAT, PrecisionConfig
from sparsemix.layers.token_selection import quota, row_quota


class Seats(NamedTuple):
    """C seats of each expert in each group of T tokens: `picks` says who sits there, `real` False marks a free seat."""

    picks: Int[Tensor, "B E C"]
    real: Bool[Tensor, "B E C"]


def experts_cost(
    activation: str,
    d_model: int,
    d_ff: int,
    num_experts: int,
    rows: float,
    active: float,
    precision: PrecisionConfig = FLOAT,
) -> Cost:
    """An expert bank that runs `rows` rows a sequence, of which one token alone would need `active`."""
    expert, norm = num_matrices(activation) * d_model * d_ff, d_ff if precision.normed else 0
    matrices = Cost.of("experts", 2.0 * rows * expert, num_experts * expert, active * expert, precision.weight_bytes)
    return matrices + Cost.of("experts", 0.0, num_experts * norm, active * norm)


def dispatch(
    tokens: Float[Tensor, "N D"],
    expert_ids: Int[Tensor, "N K"],
    gates: Float[Tensor, "N K"],
    experts: nn.Module,
    num_experts: int,
) -> Float[Tensor, "N D"]:
    """y_n = sum_k gates_nk expert[expert_ids_nk](tokens_n), every expert run once over its sorted rows.

    The id num_experts stands for no expert: such a pick costs nothing and adds 0."""
    N, K = expert_ids.shape
    order = expert_ids.reshape(-1).argsort(stable=True)  # (N K,) picks, sorted by expert
    counts = torch.bincount(expert_ids.reshape(-1), minlength=num_experts + 1)[:num_experts]
    if isinstance(experts, Experts) and experts.plain:
        return experts.mix(tokens, order // K, gates.reshape(-1)[order], counts).to(tokens.dtype)
    rows = experts(tokens.index_select(0, order // K), counts)  # (N K, D)
    rows = rows * gates.reshape(-1)[order, None].to(rows.dtype)
    # A permutation and a sum over K: the same order of additions every time, unlike a scattered add.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, dtype=torch.long, device=order.device))
    return rows.index_select(0, back).view(N, K, -1).sum(dim=1).to(tokens.dtype)


def run_picks(
    tokens: Float[Tensor, "N D"],
    token_ids: Int[Tensor, " R"],
    gates: Float[Tensor, " R"],
    counts: Int[Tensor, " E"],
    experts: nn.Module,
) -> Float[Tensor, "N D"]:
    """y_n = sum over the picks r with token_ids_r = n of gates_r expert_r(tokens_n); picks are sorted by expert."""
    if isinstance(experts, Experts) and experts.plain:
        return experts.mix(tokens, token_ids, gates, counts).to(tokens.dtype)
    rows = experts(tokens.index_select(0, token_ids), counts)
    rows = rows * gates[:, None].to(rows.dtype)
    return torch.zeros_like(tokens).index_add(0, token_ids, rows.to(tokens.dtype))


def run_seats(
    x: Float[Tensor, "B T D"], token_ids: Int[Tensor, "B E C"], gates: Float[Tensor, "B E C"], experts: nn.Module
) -> Float[Tensor, "B T D"]:
    """Every expert on its C seats of every group, whoever sits there: B * E * C rows, a static shape. A free seat
    has gate 0 and any token."""
    B, E, C = token_ids.shape
    shift = torch.arange(B, dtype=torch.long, device=x.device)[:, None, None] * x.shape[1]
    sorted_ids = (token_ids + shift).transpose(0, 1).reshape(-1)  # (E B C,)
    counts = torch.full((E,), B * C, dtype=torch.long, device=x.device)
    tokens = x.flatten(0, 1)
    return run_picks(tokens, sorted_ids, gates.transpose(0, 1).reshape(-1), counts, experts).view_as(x)


def num_seats(share: float, seq_len: int) -> int:
    """Seats of one expert among seq_len tokens: ceil(share * seq_len), at most one a token."""
    return quota(min(1.0, share), seq_len)


def row_seats(share: float, valid: Bool[Tensor, "B T"]) -> Int[Tensor, "B 1"]:
    """Seats that each group may fill: as `num_seats`, of its real tokens."""
    return row_quota(min(1.0, share), valid.sum(dim=1, keepdim=True)).long()


def first_come(
    expert_ids: Int[Tensor, "B T K"], valid: Bool[Tensor, "B T"] | None, num_experts: int, share: float
) -> Seats:
    """Seats in the order of asking: all first choices by position, then all second choices, and so on; what comes
    after the last seat is dropped. Padding asks for none. A pick is numbered k * T + t.

    Source for the order: arXiv:2006.16668, algorithm 1, with a group of one row."""
    T, K = expert_ids.shape[1:]
    C = num_seats(share, T)
    asked = expert_ids.transpose(1, 2)  # (B, K, T)
    if valid is not None:
        asked = torch.where(valid[:, None], asked, num_experts)
    asked, order = asked.flatten(1).sort(dim=1, stable=True)  # (B, K T)
    edges = torch.arange(num_experts + 1, dtype=torch.long, device=asked.device).repeat(asked.shape[0], 1)
    starts = torch.searchsorted(asked, edges)  # (B, E + 1)
    taken = starts.diff(dim=1)  # (B, E)
    if valid is not None:
        taken = taken.minimum(row_seats(share, valid))
    seat = torch.arange(C, dtype=torch.long, device=asked.device)
    at = (starts[:, :-1, None] + seat).clamp(max=K * T - 1)  # (B, E, C)
    return Seats(order.gather(1, at.flatten(1)).view_as(at), seat < taken[..., None])


def best_tokens(scores: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"] | None, share: float) -> Seats:
    """Each expert's real tokens of the highest score in every group, ties to the earlier. A pick is a position."""
    C = num_seats(share, scores.shape[1])
    ranked = scores.detach().transpose(1, 2)  # (B, E, T)
    if valid is not None:
        ranked = ranked.masked_fill(~valid[:, None], -torch.inf)
    picks = ranked.argsort(dim=2, descending=True, stable=True)[..., :C]
    real = torch.ones_like(picks, dtype=torch.bool)
    if valid is not None:
        real = torch.arange(C, dtype=torch.long, device=picks.device) < row_seats(share, valid)[..., None].expand_as(
            picks
        )
    return Seats(picks, real)
