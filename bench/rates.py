"""Learning rates by role, tried on validation text: `python -m bench.rates OUT.jsonl --text FILE ... --arm NAME ...`.

An arm is its kind and changes of the run's settings (`train.` and `model.` as in a recipe, `ffn.` for every
feed-forward): `--arm peer train.rates.keys=0.1 ffn.init_scale=0.1`. Every arm is trained once a seed at equal tokens; a
line of OUT is one run, and runs that are there are not made again. The test split is never read."""

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsemix.checkpoint import TrainState
from sparsemix.config import apply_overrides, parse
from sparsemix.data import DataConfig, Shards, prepare
from sparsemix.evaluate.perplexity import document_losses, reestimate
from sparsemix.layers import DenseConfig
from sparsemix.layers.sizing import sized_ffn
from sparsemix.machine import own_threads, use_threads
from sparsemix.optim import schedule
from sparsemix.settings import RunConfig
from sparsemix.train import reestimation_batches, train_step, training_batches

BLOCKS = 2
BATCH_TOKENS = 512
SEQ_LEN = 128


def product_keys(width: int, side: int) -> dict[str, int]:
    """Sizes of a look-up among side^2 rows for one width: within 10 % of the dense FLOPs at widths 64 and 128."""
    narrow = {"num_heads": width // 16, "top_k": 24, "d_key": 16}
    return narrow if width < 128 else {"num_heads": 8, "top_k": {64: 32, 128: 24, 256: 16}.get(side, 16), "d_key": 32}


def feed_forward(kind: str, width: int, side: int) -> dict[str, Any]:
    """Settings of the layer in every block."""
    dense = DenseConfig(d_ff=4 * round(width * 8 / 3 / 4))
    if kind == "dense":
        return dense.model_dump()
    if kind in ("peer", "pkm"):
        rows = {"peer": "num_experts", "pkm": "num_values"}[kind]
        return {"kind": kind, rows: side * side, **product_keys(width, side)}
    return sized_ffn(kind, dense, width, SEQ_LEN)


def run_config(arm: str, width: int, side: int, steps: int, seed: int) -> RunConfig:
    """The settings of one run."""
    kind, *changes = arm.split()
    ffn = feed_forward(kind, width, side)
    ffn = apply_overrides({"ffn": ffn}, [c for c in changes if c.startswith("ffn.")])["ffn"]
    block = {"kind": "block", "mixer": {"kind": "attention", "num_heads": width // 16}, "ffn": ffn}
    model = {"d_model": width, "vocab_size": 1024, "seq_len": SEQ_LEN, "blocks": {"count": BLOCKS, "each": block}}
    train = {"budget_flops": 1.0, "lr": 0.01, "batch_tokens": BATCH_TOKENS, "eval_tokens": 60_000, "threads": 1}
    raw = {"model": model, "train": train, "seed": seed, "data": {"vocab_size": 1024}}
    config = parse(RunConfig, apply_overrides(raw, [c for c in changes if not c.startswith("ffn.")]))
    return config.replace(train=config.train.replace(budget_flops=steps * config.step_flops * (1 + 1e-9)))


def trained(config: RunConfig, shards: Shards, steps: int) -> dict[str, float]:
    """Train, and what validation text says: nats a token, the share of experts that it uses, seconds of training."""
    model = config.model.build(config.seed).train()
    optimizer = config.train.build_optimizer(model)
    batches = training_batches(config, shards, TrainState(), torch.device("cpu"))
    began = time.process_time()
    for step in range(steps):
        rate = schedule(step, steps, round(config.train.warmup * steps))
        optimizer.set_lr(config.train.lr * rate)
        train_step(config, model, optimizer, [next(batches)])
        optimizer.step()
    spent = time.process_time() - began
    reestimate(model, reestimation_batches(config, shards))
    size, length = config.batch_size, config.model.seq_len
    losses = document_losses(model, shards.eval_batches("validation", size, length, config.train.eval_tokens))
    counts = [value for name, value in losses.stats.items() if name.endswith("counts")]
    used = sum(float((c > 0).mean()) for c in counts) / max(1, len(counts))
    return {"nats": losses.total / losses.tokens, "tokens": losses.tokens, "used": used, "cpu_s": spent}


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The runs that were made."""
    if path.is_file():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--shards", type=Path, required=True, help="where the prepared text lies")
    parser.add_argument("--arm", nargs="+", action="append", required=True)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    ask = parser.parse_args()
    shards = prepare(DataConfig(text=tuple(ask.text), vocab_size=1024), ask.shards)
    with own_threads():
        use_threads(1)
        for seed in ask.seeds:
            for arm in map(" ".join, ask.arm):
                key = {"arm": arm, "width": ask.width, "side": ask.side, "steps": ask.steps, "seed": seed}
                # Several processes may share a file.
                if any(line.items() >= key.items() for line in lines(ask.out)):
                    continue
                config = run_config(arm, ask.width, ask.side, ask.steps, seed)
                line = key | {"flops": config.step_flops, **trained(config, shards, ask.steps)}
                with ask.out.open("a", encoding="utf-8") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), file=sys.stderr)


if __name__ == "__main__":
    main()
