"""A made-up result.json of five kinds and three seeds, with the shapes and sizes of a real one."""

import math

import numpy as np
import pytest

KINDS = {"dense": 1.4712, "moe": 1.4405, "peer": 1.4467, "mh_moe": 1.4698, "mod": 1.4821}
COST = {
    "dense": {"linear": 9.4e6, "attention": 1.57e6, "logits": 2.1e6},
    "moe": {"linear": 3.1e6, "attention": 1.57e6, "router": 8.2e3, "experts": 6.3e6, "logits": 2.1e6},
    "peer": {"linear": 4.7e6, "attention": 1.57e6, "experts": 4.7e6, "logits": 2.1e6},
    "mh_moe": {"linear": 4.2e6, "attention": 1.57e6, "router": 16.4e3, "experts": 5.2e6, "logits": 2.1e6},
    "mod": {"linear": 5.3e6, "attention": 0.85e6, "router": 1.0e3, "predictor": 131e3, "logits": 2.1e6},
}
BUDGET = 1.2e15


def experts(layers, num_experts, skew):
    shares = np.arange(1, num_experts + 1) ** -skew
    load = (shares / shares.sum())[:: max(1, num_experts // 200)][:200]
    seen = {"num_experts": num_experts, "usage": 0.97, "unevenness": skew**2, "tokens": 262144, "load": load.tolist()}
    return {f"blocks.{i}.ffn": seen | {"load": (load ** (1 + i / 20)).tolist()} for i in layers}


def routing(kind):
    if kind == "mod":
        scores = {"accuracy": 0.931, "precision": 0.74, "recall": 0.69, "f1": 0.714, "routed_rate": 0.118}
        predictor = {f"blocks.{i}": scores | {"capacity": 0.125} for i in (1, 3, 5)}
        return {"passes": [178211, 61200, 17901, 4832], "predictor": predictor, "experts": {}}
    sizes = {"moe": (8, 0.3), "peer": (65536, 0.45), "mh_moe": (16, 0.2)}
    return {"passes": None, "predictor": {}, "experts": experts((1, 3, 5), *sizes[kind]) if kind in sizes else {}}


def run(kind, seed, number):
    rng = np.random.default_rng(100 * number + seed)
    speed = 1 + 0.25 * number + 0.02 * seed
    share = np.linspace(1 / 25, 1, 25)
    losses = KINDS[kind] + 0.55 * (share**-0.45 - 1) + rng.normal(0, 0.004, 25)
    curve = [
        {"flops": BUDGET * s, "wall_s": 812 * speed * s, "tokens": int(3e7 * s), "bpb": float(b)}
        for s, b in zip(share, losses, strict=True)
    ]
    return {"seed": seed, "folder": f"{kind}-{seed}-ab12cd34ef", "lr": 1e-3, "bpb": float(losses[-1]), "curve": curve}


def row(kind, number):
    bpb, flops = KINDS[kind], sum(COST[kind].values())
    gap = bpb - KINDS["dense"]
    verdict = "better" if gap < -0.01 else "worse" if gap > 0.01 else "not resolved: below 0.0087"
    dense = kind == "dense"
    return {
        "kind": kind, "bpb": bpb, "bpb_ci": [bpb - 0.006, bpb + 0.006], "perplexity": 2 ** (bpb * 4.1),
        "difference": None if dense else gap, "difference_ci": None if dense else [gap - 0.007, gap + 0.007],
        "p_value": None if dense else 0.0004 if abs(gap) > 0.01 else 0.71, "verdict": "baseline" if dense else verdict,
        "flops_per_token": flops, "train_flops_per_token": 3 * flops, "eval_flops_per_token": flops * 1.01,
        "flops_per_token_causal_half": flops - 0.8e6, "flops_per_token_no_logits": flops - 2.1e6,
        "params": 5_400_000 * (1 + number), "active_params": 5.4e6, "bytes_per_token": 2.16e7, "outside_share": 0.41,
        "cost_items": COST[kind], "tokens": int(BUDGET / (3 * flops)), "tokens_per_s": 37200 / (1 + number / 4),
        "peak_memory_bytes": 1_910_000_000 + number * 10**8, "wall_s": 812 * (1 + number / 4), "lr": 1e-3,
        "lookahead_bpb": bpb - 0.0313 if kind == "mod" else None, "leak": -0.0313 if kind == "mod" else None,
        "routing": routing(kind), "runs": [run(kind, seed, number) for seed in range(3)],
    }  # fmt: skip


@pytest.fixture
def result():
    sweep = [{"lr": lr, "validation_bpb": 1.5 + 0.08 * math.log10(lr / 1e-3) ** 2} for lr in (3e-4, 1e-3, 3e-3, 1e-2)]
    return {
        "command": "sparsemix compare --kinds dense,moe,peer,mh_moe,mod --budget 1.2e15 --seeds 3",
        "created": "2025-11-02 14:03 UTC",
        "settings": {"d_model": 256, "num_blocks": 6, "seq_len": 256, "batch_tokens": 16384, "warmup": 0.02},
        "budget_flops": BUDGET,
        "convention": "Matrix multiplies, 2 FLOPs per multiply-add; attention over the full square; training is "
        "3 times the forward pass; look-ups of rows count as zero, the arithmetic on them counts.",
        "scope": "This verdict is about models of 5 M active parameters trained on 30 M tokens; it says nothing about "
        "larger ones.",
        "warnings": ["dense is still above a bigram model of bytes: a larger budget is needed"],
        "tuned": True,
        "rows": [row(kind, number) for number, kind in enumerate(KINDS)],
        "baselines": {"uniform_bpb": 8.0, "unigram_bpb": 4.4721, "bigram_bpb": 3.4810, "fivegram_bpb": 2.0412},
        "lr_sweep": {
            kind: [{**at, "validation_bpb": at["validation_bpb"] + 0.02 * i} for at in sweep]
            for i, kind in enumerate(KINDS)
        },
        "corpus": {
            "sources": ["data/*.txt", "hub:roneneldan/TinyStories"], "bytes": 241_331_201, "documents": 271_020,
            "fingerprint": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "duplicates_dropped": 312, "vocab_size": 4096, "tokenizer": "byte-level BPE, trained on the training split",
            "splits": {
                "train": {"bytes": 236_000_000, "documents": 265_000, "tokens": 60_000_000},
                "validation": {"bytes": 2_600_000, "documents": 3_010, "tokens": 650_000},
                "test": {"bytes": 2_700_000, "documents": 3_010, "tokens": 660_000},
            },
            "evaluated": {"documents": 400, "bytes": 358_112, "tokens": 90_211},
        },
        "versions": {"sparsemix": "0.1.0", "torch": "2.11.0", "numpy": "2.2.1", "python": "3.11.7"},
        "hardware": "2 CPU cores, 8 GiB",
        "epochs": 0.51,
    }  # fmt: skip
