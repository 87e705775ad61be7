"""`./run bench`: the ops against their readable references, and a training step of every kind against dense.

Every pair runs interleaved in one process; outputs and gradients are compared first, and a pair that disagrees gets no
ratio. Prints a table and writes bench/results/<date>.json with hardware and versions."""

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsemix.config import parse
from sparsemix.data import DataConfig
from sparsemix.model import ModelConfig, token_nats
from sparsemix.ops import grouped_mm, product_key_topk, row_dot, row_mix
from sparsemix.ops.grouped_mm import reference as grouped_mm_reference
from sparsemix.ops.product_key_topk import reference as product_key_topk_reference
from sparsemix.ops.row_dot import reference as row_dot_reference
from sparsemix.ops.row_mix import reference as row_mix_reference
from sparsemix.optim import build_optimizer
from sparsemix.recipes import settings_of
from sparsemix.run import hardware, versions
from sparsemix.sweep.compare import CompareConfig, kind_config

ROUNDS = 5


def with_gradients(op: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of op(*inputs) towards a fixed direction."""
    out = op(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, wanted, direction)]


def interleave(works: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Minimum and median seconds of each work, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return {name: {"min_s": min(s), "median_s": median(s)} for name, s in seconds.items()}


def op_cases() -> dict[str, tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]]:
    """Name -> (our op, its reference), both with gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, coef, table = draw(1024, 128), draw(1024, 128), draw(65536, 128)
    ids = torch.randint(65536, (1024, 128), generator=generator)
    rows, weight = draw(4096, 128), draw(16, 256, 128)
    counts = torch.full((16,), 256)
    narrow_rows, narrow_weight, narrow_counts = draw(2048, 32), draw(41, 24, 32), torch.full((41,), 49)
    query, keys = draw(32, 8, 2, 16), draw(2, 128, 16)  # the reference forms all n * n sums

    def picked(op: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        return with_gradients(lambda q, c: torch.stack(op(q, c, 16)[:2]), query, keys)

    return {
        "row_dot": (
            lambda: with_gradients(lambda a, t: row_dot.row_dot(a, ids, t), x, table),
            lambda: with_gradients(lambda a, t: row_dot_reference.row_dot(a, ids, t), x, table),
        ),
        "row_mix": (
            lambda: with_gradients(lambda c, t: row_mix.row_mix(c, ids, t), coef, table),
            lambda: with_gradients(lambda c, t: row_mix_reference.row_mix(c, ids, t), coef, table),
        ),
        "grouped_mm": (
            lambda: with_gradients(lambda r, w: grouped_mm.grouped_mm(r, w, counts), rows, weight),
            lambda: with_gradients(lambda r, w: grouped_mm_reference.grouped_mm(r, w, counts), rows, weight),
        ),
        "grouped_mm, 41 experts of 24 x 32": (
            lambda: with_gradients(lambda r, w: grouped_mm.grouped_mm(r, w, narrow_counts), narrow_rows, narrow_weight),
            lambda: with_gradients(
                lambda r, w: grouped_mm_reference.grouped_mm(r, w, narrow_counts), narrow_rows, narrow_weight
            ),
        ),
        "product_key_topk": (
            lambda: picked(product_key_topk.product_key_topk),
            lambda: picked(product_key_topk_reference.product_key_topk),
        ),
    }


def bench_ops() -> list[dict[str, Any]]:
    results = []
    for name, (ours, reference) in op_cases().items():
        agree = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours(), reference(), strict=True))
        times = interleave({"ours": ours, "reference": reference}) if agree else {}
        ratio = times["reference"]["min_s"] / times["ours"]["min_s"] if agree else None
        results.append({"name": name, "agree": agree, **times, "times_faster": ratio})
    return results


def training_step(config: ModelConfig, batch_size: int, lr: float) -> Callable[[], None]:
    model = config.build(0)
    optimizer = build_optimizer(model, lr)
    tokens = torch.randint(config.vocab_size, (batch_size, config.seq_len + 1))

    def step() -> None:
        optimizer.zero_grad()
        output = model(tokens[:, :-1])
        (token_nats(output.logits, tokens[:, 1:]).mean() + sum(output.aux.losses.values())).backward()
        optimizer.step()

    step()
    return step


def bench_kinds(recipe: str) -> list[dict[str, Any]]:
    """Seconds of a training step and its rate beside dense's, at equal FLOPs per token."""
    settings = parse(CompareConfig, {"recipe": recipe})
    data = DataConfig(vocab_size=settings_of(recipe)["model"]["vocab_size"])
    configs = {kind: kind_config(settings, kind, data, 1e30) for kind in settings.kinds}
    steps = {k: training_step(c.model, c.batch_size, c.train.lr) for k, c in configs.items()}
    times = interleave(steps)
    rates = {kind: config.step_flops / times[kind]["min_s"] for kind, config in configs.items()}
    return [
        {"name": kind, **times[kind], "flops_per_s": rates[kind], "share_of_dense_rate": rates[kind] / rates["dense"]}
        for kind in configs
    ]


def main() -> None:
    torch.set_num_threads(1)
    ops, kinds = bench_ops(), bench_kinds(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    table = Table("op, forward and backward", "times faster than the reference (minima)")
    for row in ops:
        table.add_row(row["name"], f"{row['times_faster']:.1f}" if row["agree"] else "disagrees: no ratio")
    steps = Table("kind, training step", "FLOP rate, share of dense")
    for row in kinds:
        steps.add_row(row["name"], f"{row['share_of_dense_rate']:.2f}")
    console = Console()
    console.print(table)
    console.print(steps)
    now = datetime.now(UTC)
    path = Path(__file__).parent / "results" / f"{now:%Y-%m-%d-%H%M}.json"
    path.parent.mkdir(exist_ok=True)
    about = {"created": now.isoformat(timespec="minutes"), "hardware": hardware(), "threads": 1, "versions": versions()}
    path.write_text(json.dumps({**about, "ops": ops, "training_steps": kinds}, indent=1), encoding="utf-8")
    console.print(f"written: {path}")
    if not all(row["agree"] for row in ops):
        sys.exit(1)


if __name__ == "__main__":
    main()
