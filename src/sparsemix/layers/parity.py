"""Sizes of a multi-head mixture of experts that spends what an ordinary one spends."""

from dataclasses import dataclass
from typing import Any

from sparsemix.config import ConfigError


@dataclass(frozen=True)
class Parity:
    """Settings at equal FLOPs and nearest parameters, with what rounding left over.

    FLOPs are forward per token; router FLOPs lie outside the equation and are listed apart. `exact_*` are the values
    before rounding; `params` and `flops` (without the router) are for the rounded ones."""

    d_model: int
    num_heads: int
    top_k: int
    activation: str
    d_ff: int
    num_experts: int
    exact_d_ff: float
    exact_num_experts: float
    flops: float
    sparse_flops: float
    router_flops: float
    sparse_router_flops: float
    params: int
    sparse_params: int

    @property
    def flops_mismatch(self) -> float:
        """Relative: 0 when the inner width needed no rounding."""
        return self.flops / self.sparse_flops - 1

    @property
    def params_mismatch(self) -> float:
        return self.params / self.sparse_params - 1

    def settings(self) -> dict[str, Any]:
        """The layer, for `build_layer` or a recipe."""
        inner = {"kind": "moe", "num_experts": self.num_experts, "top_k": self.top_k, "d_ff": self.d_ff}
        return {"kind": "mh_moe", "num_heads": self.num_heads, "inner": inner | {"activation": self.activation}}


def inner_width(d_model: int, width: float, heads_top_k: int, m: int, num_experts: int = 0) -> float:
    """f_h = (w - (2 / m) d - E_h / m) / k_h at the FLOPs of w neurons of m matrices (eq. 8; head and merge take
    those of 2 / m widths). num_experts: E_h, where the router's FLOPs count too; the paper leaves them out."""
    return (m * width - 2 * d_model - num_experts) / (m * heads_top_k)


def num_experts_at_parity(d_model: int, width: int, num_heads: int, inner: int, m: int) -> float:
    """E_h = h (w - (2 / m) d) / f_h at the parameters of w neurons in all experts together (eq. 9)."""
    return num_heads * (m * width - 2 * d_model) / (m * inner)


def parity(
    d_model: int,
    d_ff: int,
    num_experts: int,
    top_k: int = 1,
    num_heads: int = 2,
    heads_top_k: int | None = None,
    gated: bool = True,
    multiple_of: int = 8,
) -> Parity:
    """Inner width f_h and expert count E_h of a multi-head layer at the cost of `num_experts` experts of width `d_ff`:

    k_h f_h = k f - (2 / m) d        (head and merge take the FLOPs of 2 / m widths)
    E_h = h (f E - (2 / m) d) / f_h  (head and merge take their parameters)

    with m matrices an expert (3 if gated, else 2). f_h is rounded to a whole number, E_h to a multiple of
    `multiple_of`, the paper's choice for gated experts (8; its 96 for 93). `heads_top_k` defaults to `num_heads`, as in
    its experiments. Source: arXiv:2411.16205, eqs. 8 and 9, which fix m = 2 and k_h = k. Raises ConfigError."""
    heads_top_k = num_heads if heads_top_k is None else heads_top_k
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_experts": num_experts, "top_k": top_k, "num_heads": num_heads}
    for name, value in (sizes | {"heads_top_k": heads_top_k, "multiple_of": multiple_of}).items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if top_k > num_experts:
        raise ConfigError(f"top_k={top_k} must lie in [1, num_experts={num_experts}]")
    if d_model % num_heads:
        raise ConfigError(f"num_heads={num_heads} must divide d_model={d_model}; choose a divisor")
    m, d_head = 3 if gated else 2, d_model // num_heads
    exact_d_ff = inner_width(d_model, top_k * d_ff, heads_top_k, m)
    if exact_d_ff < 1:
        raise ConfigError(
            f"top_k * d_ff={top_k * d_ff} leaves no width for experts: head and merge alone cost "
            f"{2 / m * d_model:g} of it; "
            "widen d_ff or lower heads_top_k"
        )
    inner = round(exact_d_ff)
    exact_experts = num_experts_at_parity(d_model, d_ff * num_experts, num_heads, inner, m)
    experts = max(multiple_of, round(exact_experts / multiple_of) * multiple_of)
    if heads_top_k > experts:
        raise ConfigError(f"heads_top_k={heads_top_k} must lie in [1, {experts}], the number of experts at parity")
    return Parity(
        d_model=d_model,
        num_heads=num_heads,
        top_k=heads_top_k,
        activation="swiglu" if gated else "relu",
        d_ff=inner,
        num_experts=experts,
        exact_d_ff=exact_d_ff,
        exact_num_experts=exact_experts,
        flops=2.0 * (2 * d_model**2 + heads_top_k * m * d_model * inner),
        sparse_flops=2.0 * top_k * m * d_model * d_ff,
        router_flops=2.0 * experts * d_model,
        sparse_router_flops=2.0 * num_experts * d_model,
        params=2 * d_model**2 + experts * m * d_head * inner,
        sparse_params=num_experts * m * d_model * d_ff,
    )
