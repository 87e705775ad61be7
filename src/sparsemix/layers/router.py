"""Token-choice routing: scores, gates, picks, and the losses that keep experts in use."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sparsemix.layers.base import valid_mean
from sparsemix.ops.precision import at_least_fp32


class Route(NamedTuple):
    """K experts for each of N tokens."""

    logits: Float[Tensor, "N E"]
    probs: Float[Tensor, "N E"]
    gates: Float[Tensor, "N K"]
    expert_ids: Int[Tensor, "N K"]


class Router(nn.Module):
    """logits = x W^T in at least fp32, whatever autocast says. W ~ N(0, 0.02^2): scores start near a tie, so early
    routing is even."""

    roles = {"weight": "router"}  # noqa: RUF012

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(at_least_fp32(x), at_least_fp32(self.weight))


def route(logits: Float[Tensor, "N E"], top_k: int, normalize: bool, bias: Float[Tensor, " E"] | None = None) -> Route:
    """Gates: softmax over all E, then the K largest; they sum to one only if `normalize`. A `bias` is added to the
    probabilities while the K are chosen and ordered, and is in no gate (arXiv:2408.15664, eq. 3).

    Source: arXiv:2101.03961, eq. 2, for K = 1; arXiv:2411.16205 keeps the same raw gates for K > 1."""
    probs = logits.softmax(dim=-1)
    scores = probs.detach() if bias is None else probs.detach() + bias
    expert_ids = scores.topk(top_k, dim=-1).indices
    gates = probs.gather(-1, expert_ids)
    if normalize:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return Route(logits, probs, gates, expert_ids)


def load_of(expert_ids: Int[Tensor, "N K"], num_experts: int, valid: Bool[Tensor, " N"] | None) -> Float[Tensor, " E"]:
    """Picks per expert among real tokens."""
    weights = None if valid is None else valid.double()[:, None].expand_as(expert_ids).reshape(-1)
    return torch.bincount(expert_ids.reshape(-1), weights, minlength=num_experts).double()


def balance_loss(
    r: Route,
    valid: Bool[Tensor, " N"] | None,
    picks: Literal["all", "first"] = "all",
    counts: Float[Tensor, " E"] | None = None,
) -> Float[Tensor, ""]:
    """E sum_e f_e P_e: f_e the share of picks, P_e the mean probability; 1 when even. Gradients flow through P only.

    f counts the picks of all K choices, or each token's `first` (arXiv:2006.16668 and the code of
    arXiv:2404.15045; the paper is silent for K > 1). Who has counted all of them hands over `counts`.
    Source: arXiv:2101.03961, eq. 4."""
    E = r.probs.shape[1]
    if counts is None or picks == "first":
        counts = load_of(r.expert_ids if picks == "all" else r.expert_ids[:, :1], E, valid)
    share = (counts / counts.sum().clamp_min(1)).to(r.probs.dtype)
    probs = r.probs if valid is None else torch.where(valid[:, None], r.probs, 0.0)
    tokens = max(1, probs.shape[0]) if valid is None else valid.sum().clamp_min(1)
    return E * (share * probs.sum(0) / tokens).sum()


def z_loss(r: Route, valid: Bool[Tensor, " N"] | None) -> Float[Tensor, ""]:
    """Mean squared log-sum-exp of the logits. Source: arXiv:2202.08906, eq. 5."""
    return valid_mean(r.logits.logsumexp(dim=-1).square(), valid)


GATE_BINS = 20

# Stands for no expert where the number of picks differs from row to row.
NOBODY = -1


def picks_of(chosen: Bool[Tensor, "*B E"], gates: Float[Tensor, "*B E"]) -> dict[str, Tensor]:
    """Statistics `expert_ids` (N, E), NOBODY where an expert did not take the row, and `gates` (N, E)."""
    E = chosen.shape[-1]
    expert_ids = torch.where(chosen, torch.arange(E, dtype=torch.long, device=chosen.device), NOBODY)
    return {"expert_ids": expert_ids.view(-1, E), "gates": gates.detach().reshape(-1, E)}


def usage_stats(
    expert_ids: Int[Tensor, "N R"],
    gates: Float[Tensor, "N R"],
    num_experts: int,
    valid: Bool[Tensor, " N"] | None,
) -> dict[str, Tensor]:
    """Per expert, over real tokens: `counts` (picks) and `gate_mass` (summed gates), both (E,) fp64.
    `gate_histogram` (20,) fp64: picks by gate in equal bins of [0, 1], others in the end bins.
    `top_gate` (N,): the largest gate of every row, 0 in padding."""
    gates = gates.detach() if valid is None else torch.where(valid[:, None], gates.detach(), 0.0)
    gate_mass = torch.bincount(expert_ids.reshape(-1), gates.double().reshape(-1), minlength=num_experts)
    bins = (gates.double() * GATE_BINS).long().clamp(0, GATE_BINS - 1)
    return {
        "counts": load_of(expert_ids, num_experts, valid),
        "gate_mass": gate_mass,
        "gate_histogram": load_of(bins, GATE_BINS, valid),
        "top_gate": gates.amax(dim=1),
    }
