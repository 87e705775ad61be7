"""The models of the multi-head mixture-of-experts papers, at the size at hand."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparsemix.data.shards import DataConfig
from sparsemix.layers.parity import parity
from sparsemix.reproduce.base import SCALES, Design, Scale
from sparsemix.settings import RunConfig
from sparsemix.sweep.arms import Arm, backbone, run_config

RECIPE = "mh-dense"
DENSE, SMOE, FINE = "Dense", "SMoE", "Fine-grained SMoE"
H2, H3 = "MH-MoE h=2", "MH-MoE h=3"
M2, M3 = "MH-MoE h=2, equal parameters", "MH-MoE h=3, equal parameters"
# The sparse layer that sets FLOPs and parameters: one of eight experts, each as wide as the dense layer.
EXPERTS = 8
# 1 to 4 and 6 heads must divide the width; the proportions are the paper's (d_ff = 8/3 d_model), so parity is exact.
WIDTHS = {
    "demo": ("model.d_model=36", "model.blocks.each.ffn.d_ff=96"),
    "laptop": ("model.d_model=72", "model.blocks.each.ffn.d_ff=192"),
}
# 100,000 steps of 524,288 tokens with the dense model.
PAPER_BUDGET = 4.64e19


class Base(NamedTuple):
    """The dense backbone at a scale: raw settings, and what of them sizes the layers."""

    scale: Scale
    size: str
    overrides: tuple[str, ...]
    raw: dict[str, Any]

    @property
    def d_model(self) -> int:
        return self.raw["model"]["d_model"]

    @property
    def d_ff(self) -> int:
        return self.raw["model"]["blocks"]["each"]["ffn"]["d_ff"]

    @property
    def budget(self) -> float:
        """Training FLOPs a run: the published ones at paper scale, unless others are asked for."""
        as_published = self.scale.name == "paper" and self.scale.budget == SCALES["paper"].budget
        return PAPER_BUDGET if as_published else self.scale.budget

    def design(self, arms: Sequence[Arm], sweep: bool = False) -> Design:
        """Every arm for the steps that SMoE takes at the budget: the papers train for equal steps, and leave the router
        out of the FLOPs that they hold equal."""
        arms = [arm._replace(changes=(*arm.changes, f"train.budget_flops={self.budget_of(arm)!r}")) for arm in arms]
        if self.scale.name == "paper" and not sweep:
            # The rate of the paper's code; a rule made on small models is none for this width.
            arms = [arm._replace(changes=(*arm.changes, f"train.lr={self.raw['train']['lr']}")) for arm in arms]
        return Design(RECIPE, arms, sweep=sweep, size=self.size, budget=self.budget, overrides=self.overrides)

    def config(self, arm: Arm, budget: float | None = None) -> RunConfig:
        """The run of an arm, for its cost."""
        return run_config(arm, self.raw, DataConfig(vocab_size=self.raw["model"]["vocab_size"]), budget or self.budget)

    def budget_of(self, arm: Arm) -> float:
        """Training FLOPs of `arm` for as many steps as SMoE takes."""
        steps = self.config(arm_of(SMOE, self.smoe())).steps
        # Half a step more than whole steps, so that rounding takes none away.
        return (steps + 0.5) * self.config(arm, 1e30).step_flops

    def moe(self, num_experts: int, top_k: int, d_ff: int, **more: Any) -> dict[str, Any]:
        return {"kind": "moe", "num_experts": num_experts, "top_k": top_k, "d_ff": d_ff, **more}

    def smoe(self) -> dict[str, Any]:
        return self.moe(EXPERTS, 1, self.d_ff)

    def fine(self) -> dict[str, Any]:
        """Experts half as wide, two at a time; the paper does not say how many, but only two spend the same."""
        return self.moe(2 * EXPERTS, 2, self.d_ff // 2)

    def heads(self, num_heads: int, top_k: int, multiple_of: int = 1) -> dict[str, Any]:
        """A multi-head layer at the FLOPs of `smoe`, its parameters as near as `multiple_of` lets it."""
        return parity(
            self.d_model, self.d_ff, EXPERTS, num_heads=num_heads, heads_top_k=top_k, multiple_of=multiple_of
        ).settings()


def base_of(scale: Scale) -> Base:
    """The backbone at a scale; a width that the user sets stays."""
    own = any(override.startswith("model.d_model=") for override in scale.overrides)
    overrides = () if own else WIDTHS.get(scale.name, ())
    raw = backbone(f"{RECIPE}:{scale.size}", (*scale.overrides, *overrides))
    return Base(scale, scale.size, overrides, raw)


def arm_of(name: str, layer: dict[str, Any] | None = None, changes: Sequence[str] = ()) -> Arm:
    """A model whose every second feed-forward is `layer`, as in the paper."""
    ffn = () if layer is None else (f"model.blocks.ffn={json.dumps({'at': 'every-2', **layer})}",)
    return Arm(name, changes=(*ffn, *changes))


def models(base: Base, changes: Sequence[str] = (), **more: Any) -> list[Arm]:
    """The sparse models of tables 1 to 3; `more` goes into every layer."""
    layers = {
        SMOE: base.smoe(),
        FINE: base.fine(),
        H2: base.heads(2, 2, 8),
        H3: base.heads(3, 3, 8),
    }
    return [arm_of(name, {**layer, **more}, changes) for name, layer in layers.items()]


def matched(base: Base) -> list[Arm]:
    """The paper's h=2 has 3.1 % fewer parameters in its layers than SMoE, its h=3 3.1 % more; these have as many."""
    return [arm_of(M2, base.heads(2, 3)), arm_of(M3, base.heads(3, 3))]
