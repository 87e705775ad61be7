"""A running threshold per column of scores: the causal stand-in for choosing the best share of a batch."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsemix.layers.base import Layer, check_observed


class RunningThreshold(Layer):
    """take_ne = scores_ne > threshold_e, where threshold_e is a running average over training batches of the
    (1 - share) quantile of column e (an expert, or the one router of Mixture-of-Depths) over the batch's real tokens.

    Source: arXiv:2603.11535, which trains by this rule too; here training compares tokens, and only the causal rule
    uses thresholds. forward raises RuntimeError before any observation."""

    observes = ("quantile",)
    threshold: Tensor
    num_updates: Tensor

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(num_columns))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def forward(self, scores: Float[Tensor, "*B E"]) -> Bool[Tensor, "*B E"]:  # type: ignore[override]
        instead = "choose a routing that needs none"
        check_observed(self.num_updates, "the routing thresholds", self.training, instead)
        return scores > self.threshold

    def observe(
        self, scores: Float[Tensor, "*B E"], valid: Bool[Tensor, "*B"] | None, share: float
    ) -> dict[str, Tensor]:
        """The batch's quantiles, to `update` with; without a real token the threshold as it is."""
        if not scores[..., 0].numel():
            return {"quantile": self.threshold}
        valid = None if valid is None else valid.flatten()
        seen = quantile(scores.detach().flatten(0, -2), valid, 1 - share)
        return {"quantile": seen if valid is None else torch.where(valid.any(), seen, self.threshold)}

    @torch.no_grad()
    def update(self, stats: Mapping[str, Tensor]) -> None:
        if "quantile" not in stats:
            return
        self.num_updates += 1
        # A plain average at first, then a running one over about 100 steps.
        self.threshold.lerp_(stats["quantile"].to(self.threshold), max(0.01, 1.0 / int(self.num_updates)))

    def forget(self) -> None:
        self.num_updates.zero_()


def quantile(scores: Float[Tensor, "N E"], valid: Bool[Tensor, " N"] | None, q: float) -> Float[Tensor, " E"]:
    """The q quantile of every column over real tokens, interpolated as torch.quantile does, in a static shape."""
    N = scores.shape[0]
    if valid is None:
        valid = torch.ones(N, dtype=torch.bool, device=scores.device)
    # Padding sorts below every real score, so the real ones are the last.
    ordered = scores.masked_fill(~valid[:, None], -torch.inf).sort(dim=0).values
    count = valid.sum()
    place = (N - count + q * (count - 1).double()).clamp(0, N - 1)
    low, high = ordered.index_select(0, torch.stack([place.floor(), place.ceil()]).long())
    return torch.lerp(low, high, place.frac().to(low.dtype))
