"""What `sparsemix parity` prints: two layers of equal cost side by side, and, if asked for, their time."""

import time
from statistics import median
from typing import Any

import torch
import yaml
from rich.console import Group
from rich.table import Table

from sparsemix.layers import LayerConfig
from sparsemix.layers.parity import Parity

ROUNDS = 7
TOKENS = 256


def sparse_settings(num_experts: int, top_k: int, d_ff: int, activation: str) -> dict[str, Any]:
    """The mixture of experts that sets the cost."""
    return {"kind": "moe", "num_experts": num_experts, "top_k": top_k, "d_ff": d_ff, "activation": activation}


def parity_tables(found: Parity, sparse: dict[str, Any], seconds: dict[str, float] | None) -> Group:
    """Sizes, FLOPs and parameters of both, the exact values before rounding, and the new layer as YAML."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("moe", "mh_moe", "exact", "mismatch"):
        table.add_column(name, justify="right")
    table.add_row("inner width", str(sparse["d_ff"]), str(found.d_ff), f"{found.exact_d_ff:.3f}", "")
    table.add_row("experts", str(sparse["num_experts"]), str(found.num_experts), f"{found.exact_num_experts:.3f}", "")
    table.add_row("experts a row", str(sparse["top_k"]), str(found.top_k), "", "")
    table.add_row("expert rows a token", str(sparse["top_k"]), str(found.num_heads * found.top_k), "", "")
    mega = (found.sparse_flops / 1e6, found.flops / 1e6)
    table.add_row("MFLOPs a token, without the gate", *(f"{m:.6g}" for m in mega), "", f"{found.flops_mismatch:+.3%}")
    gates = (found.sparse_router_flops, found.router_flops)
    table.add_row("MFLOPs of the gate", *(f"{gate / 1e6:.3g}" for gate in gates))
    params = (found.sparse_params, found.params)
    table.add_row("parameters, without the gate", *(f"{n:,}" for n in params), "", f"{found.params_mismatch:+.3%}")
    if seconds is not None:
        ratio = f"{seconds['mh_moe'] / seconds['moe']:.2f} x"
        table.add_row("time a token, forward and backward", "1.00 x", ratio, "", "")
    text = yaml.safe_dump(found.settings(), sort_keys=False, default_flow_style=True, width=1000).strip()
    return Group(table, "", text)


def seconds_per_token(layers: dict[str, dict[str, Any]], d_model: int) -> dict[str, float]:
    """Median seconds of forward and backward per token, in interleaved rounds on `TOKENS` tokens."""
    built = {name: LayerConfig.model_validate(raw).build(d_model) for name, raw in layers.items()}
    x = torch.randn(1, TOKENS, d_model)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(ROUNDS):
        for name, layer in built.items():
            layer.zero_grad()
            began = time.perf_counter()
            y, aux = layer(x)
            (y.sum() + sum(aux.losses.values())).backward()
            seconds[name].append((time.perf_counter() - began) / TOKENS)
    return {name: median(several[1:]) for name, several in seconds.items()}
