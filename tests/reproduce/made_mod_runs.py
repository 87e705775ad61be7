"""Finished runs without training: real settings and costs, losses as a test plants them."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sparsemix.config import to_yaml
from sparsemix.report.records import Record, read_run
from sparsemix.settings import RunConfig
from sparsemix.sweep.arms import Arm
from sparsemix.sweep.study import Cell

DOCS, TOKENS, BYTES = 40, 2000, 7000
PREDICTOR = {
    "accuracy": 0.98, "precision": 0.93, "recall": 0.91, "f1": 0.92, "routed_rate": 0.122, "capacity": 0.125,
    "always_skip": 0.875,
}  # fmt: skip


def made_run(
    out: Path, arm: str, config: RunConfig, nats: float, role: str = "grid", ahead: float | None = None, steps: int = 20
) -> Record:
    """A run's folder with a test loss of `nats` per token, spread over documents as its seed has it; ahead: nats under
    the routing of training."""
    folder = out / "runs" / Cell(arm, config).run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    # The seeds of all arms share what is hard in a document, and differ a little.
    noise = 0.3 * np.random.default_rng(0).standard_normal(DOCS) + 0.01 * np.random.default_rng(
        [config.seed, int(config.step_flops)]
    ).standard_normal(DOCS)
    per_document = nats * TOKENS / DOCS * (1 + noise - noise.mean())
    num_bytes = np.full(DOCS, BYTES // DOCS)
    np.savez(folder / "documents.npz", ids=np.arange(DOCS), nats=per_document, bytes=num_bytes)
    per_bpb = TOKENS / num_bytes.sum() / math.log(2)
    predictor = {"blocks.1": PREDICTOR} if config.model.looks_ahead else {}
    result = {
        "seed": config.seed, "lr": config.train.lr, "steps": steps, "flops": steps * config.step_flops,
        "tokens": steps * config.batch_size * config.model.seq_len, "wall_s": 2.0, "tokens_per_s": 1000.0,
        "peak_memory_bytes": 10**8, "bpb": nats * per_bpb, "validation_bpb": nats * per_bpb + 0.01,
        "perplexity": math.exp(nats), "test_tokens": TOKENS, "cost": config.costs(), "convention": "FLOPs count made",
        "lookahead_bpb": None if ahead is None else ahead * per_bpb, "eval_flops_per_token": 1e5,
        "routing": {"passes": None, "experts": {}, "predictor": predictor},
        "threads": 1, "dtype": "float32", "compiled": False,
    }  # fmt: skip
    lines = [
        {"step": i + 1, "flops": 1.0, "wall_s": 1.0, "loss": nats + 1 / (i + 1), "grad_norm": 1.0} for i in range(steps)
    ]
    for i, line in enumerate(lines if predictor else ()):
        rate = {"accuracy": 0.9 + 0.08 * min(1, 5 * i / steps), "precision": 0.5, "recall": 0.4}
        line |= {f"blocks.{block}.{name}": value for block in (1, 3) for name, value in rate.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "model").mkdir(exist_ok=True)
    weights = {"embed.weight": np.full((2, 2), config.seed, np.float32)}
    own = {"blocks.1.predictor.up.weight": np.ones(3, np.float32)} if predictor else {}
    save_file(weights | own, folder / "model" / "model.safetensors")
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    record = read_run(folder, arm, role)
    assert record is not None
    return record


def made_seeds(
    out: Path, arm: Arm, config: Callable[[Arm], RunConfig], nats: float, seeds: int = 4, ahead: float | None = None
) -> list[Record]:
    """Runs of one size, a seed each, around a loss."""
    records = []
    for seed in range(seeds):
        jitter = 0.002 * np.random.default_rng([seed, 1]).standard_normal()
        one = config(arm).replace(seed=seed)
        records.append(made_run(out, arm.name, one, nats + jitter, ahead=None if ahead is None else ahead + jitter))
    return records


def made_grid(
    out: Path,
    arm: Arm,
    configs: Sequence[RunConfig],
    loss: Callable[[RunConfig], float],
    seeds: int = 4,
    ahead: float | None = None,
) -> list[Record]:
    """A curve: every size once, the one of the least loss with more seeds; ahead: nats that looking ahead gains."""
    best = min(configs, key=loss)
    cells = [(config, 0, "grid") for config in configs] + [(best, seed, "seed") for seed in range(1, seeds)]
    records = []
    for config, seed, role in cells:
        nats = loss(config) + 0.001 * float(np.random.default_rng([seed, 2]).standard_normal())
        gain = None if ahead is None else nats - ahead
        records.append(made_run(out, arm.name, config.replace(seed=seed), nats, role, gain))
    return records
