"""How a step's time grows with tokens, experts, heads * k and batch, beside its formula."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsemix.bench.timing import interleave
from sparsemix.bench.training import Training, our_optimizer, twin_input
from sparsemix.bench.work import Work, free_gib, number_row
from sparsemix.bench.works.depth import loss_of, stepping
from sparsemix.config import parse
from sparsemix.layers import LayerConfig
from sparsemix.model import ModelConfig

D = 256


@dataclass(frozen=True)
class Curve:
    """Seconds of `step(x)` over growing x beside `formula(x)`, in FLOPs."""

    name: str
    sizes: Sequence[int]
    step: Callable[[int], Callable[[], object]]
    formula: Callable[[int], float]
    label: Callable[[int], str] = str
    gib: Callable[[int], float] = lambda x: 0.0

    def measure(self, quick: bool) -> dict[str, Any]:
        seconds: dict[int, float] = {}
        rows: dict[str, dict[str, Any]] = {}
        for x in self.sizes:
            if free_gib() < self.gib(x):
                rows[self.label(x)] = {"said": f"not available: needs {self.gib(x):.0f} GiB of free memory"}
                continue
            timing = interleave({self.label(x): self.step(x)}, 0.2 if quick else 2.0)[self.label(x)]
            gc.collect()
            seconds[x] = timing.min_s
            rows[self.label(x)] = {"said": "ok", **timing._asdict(), "size": x, "formula": self.formula(x)}
        grown, wanted = slope(seconds), slope({x: self.formula(x) for x in seconds})
        excess = (max(seconds) / min(seconds)) ** (grown - wanted) if len(seconds) > 1 else None
        what = f"growth over the formula's: exponent {grown:.2f}, the formula's {wanted:.2f}"
        number = number_row(f"scaling/{self.name}", what, excess, None if excess else "fewer than two sizes ran")
        return {"name": self.name, "settings": {}, "amounts": {}, "contenders": rows, "numbers": [number]}


def slope(points: dict[int, float]) -> float:
    """Least-squares slope of log y over log x."""
    if len(points) < 2:
        return math.nan
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


def peer_settings(num_experts: int, num_heads: int = 8, top_k: int = 16) -> dict[str, Any]:
    sizes = {"num_experts": num_experts, "num_heads": num_heads, "top_k": top_k}
    return {"kind": "peer", **sizes, "query_norm": "layer", "share_keys": False}


def layer_step(settings: dict[str, Any], num_tokens: int) -> Callable[[], object]:
    """A training step of one layer."""
    torch.manual_seed(0)
    layer: nn.Module = parse(LayerConfig, settings).build(D).train()
    return Training(layer, twin_input(num_tokens, D), our_optimizer(layer)).step


def layer_flops(settings: dict[str, Any], num_tokens: int) -> float:
    return 3 * parse(LayerConfig, settings).cost(D, num_tokens).flops


def model_of(seq_len: int, num_experts: int) -> ModelConfig:
    mixer = {"kind": "attention", "num_heads": 4}
    block = {"kind": "block", "mixer": mixer, "ffn": peer_settings(num_experts)}
    return parse(ModelConfig, {"d_model": D, "vocab_size": 1024, "seq_len": seq_len, "blocks": [block]})


def model_step(seq_len: int, batch: int, num_experts: int) -> Callable[[], object]:
    """A training step of a model of one block."""
    model = model_of(seq_len, num_experts).build(0).train()
    tokens = torch.randint(1024, (batch, seq_len + 1))
    return stepping(loss_of(model, tokens), our_optimizer(model))


def cases(quick: bool) -> Iterator[Curve]:
    """Tokens and batch of a model with a PEER block; experts and heads * k of the layer alone, 512 tokens."""
    side, few = (64, 64) if quick else (256, 512)
    tokens = (64, 128) if quick else (256, 512, 1024, 2048)
    yield Curve(
        "tokens",
        tokens,
        lambda T: model_step(T, 1, side**2),
        lambda T: 3 * model_of(T, side**2).cost().flops,
    )
    yield Curve(
        "experts",
        [n * n for n in ((32, 64) if quick else (128, 256, 512, 1024))],
        lambda N: layer_step(peer_settings(N), few),
        lambda N: layer_flops(peer_settings(N), few),
        lambda N: f"{math.isqrt(N)}^2",
        lambda N: 10 * N * D * 4 / 2**30,
    )
    yield Curve(
        "heads * k",
        [32, 64] if quick else [32, 64, 128, 256],
        lambda hk: layer_step(peer_settings(side**2, hk // 16), few),
        lambda hk: layer_flops(peer_settings(side**2, hk // 16), few),
    )
    yield Curve(
        "batch",
        (1, 2) if quick else (1, 2, 4, 8),
        lambda B: model_step(256 if not quick else 64, B, side**2),
        lambda B: 3 * B * model_of(256, side**2).cost().flops,
    )


WORKS = (
    Work(
        "scaling",
        "growth of a PEER step with its sizes",
        cases,
        tuple(f"scaling/{axis}" for axis in ("tokens", "experts", "heads * k", "batch")),
    ),
)
