"""Finished runs with planted losses, from the settings of a plan: what an outcome is tested on without training."""

import json
from pathlib import Path

import numpy as np

from sparsemix.config import config_hash
from sparsemix.report.records import Record
from sparsemix.run import CONVENTION

NUM_DOCS = 40


def made_run(folder: Path, arm, config, nats, role="grid", routing=None, lookahead=0.0) -> Record:
    """The run that these settings name, with a causal loss of `nats` per token and `lookahead` more of it where it
    looks ahead; documents differ by what depends on the seed alone."""
    path = folder / "runs" / config_hash(config)
    path.mkdir(parents=True, exist_ok=True)
    num_bytes = np.random.default_rng(0).integers(200, 2000, NUM_DOCS)
    tokens = num_bytes / 4
    docs = np.random.default_rng(config.seed).normal(0, 0.02, NUM_DOCS)
    docs -= (docs * tokens).sum() / tokens.sum()
    np.savez(path / "documents.npz", nats=tokens * nats * (1 + docs), bytes=num_bytes)
    cost = config.costs()
    bpb = nats / np.log(2) / 4
    ahead = bpb * (1 + lookahead) if config.model.looks_ahead else None
    result = {
        "routing": {"passes": None, "predictor": {}, "experts": routing or {}},
        "perplexity": float(np.exp(nats)),
        "convention": CONVENTION,
        "cost": cost,
        "test_tokens": int(tokens.sum()),
        "steps": config.steps,
    }
    (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    done = config.steps * config.batch_size * config.model.seq_len
    return Record(
        folder=path,
        arm=arm,
        role=role,
        budget=config.train.budget_flops,
        flops=config.train.budget_flops,
        seed=config.seed,
        lr=config.train.lr,
        params=cost["params"],
        active_params=cost["active_params"],
        forward_flops=cost["flops_per_token"],
        tokens=done,
        nats=nats,
        bpb=bpb,
        validation_bpb=bpb,
        lookahead_bpb=ahead,
        wall_s=1.0 + done / 1e5,
        tokens_per_s=1e5,
        peak_memory_bytes=10**8,
        curve=((config.train.budget_flops, 1.0, bpb),),
        settings=config.model_dump(mode="json"),
        result=result,
    )
