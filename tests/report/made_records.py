"""Made-up studies: records whose losses follow a planted law, with the noise of seeds and of documents."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsemix.report.records import Record
from sparsemix.run import CONVENTION

TOKENS_PER_BYTE = 0.28
TEST_TOKENS, NUM_DOCS = 90_000, 120
SEQ_LEN, VOCAB = 256, 4096
TRAIN_TOKENS, FINGERPRINT = 60_000_000, "9f86d081884c7d65"


@dataclass(frozen=True)
class Law:
    """L = E + A / N^alpha + B / D^beta, N all parameters; a token's forward FLOPs are 2 N / sparsity."""

    E: float = 1.5
    A: float = 120.0
    B: float = 680.0
    alpha: float = 0.38
    beta: float = 0.42
    sparsity: float = 1.0
    speed: float = 2e9

    def loss(self, params, tokens):
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    def tokens(self, params, budget):
        return budget * self.sparsity / (6 * params)

    def best(self, budget) -> tuple[float, float]:
        """(parameters, nats) of the optimum at a budget."""
        per = self.alpha + self.beta
        n = (self.alpha * self.A / (self.beta * self.B)) ** (1 / per)
        n *= (budget * self.sparsity / 6) ** (self.beta / per)
        return n, self.loss(n, self.tokens(n, budget))


DENSE = Law()
MOE = Law(A=146.0, sparsity=2.2, speed=1.5e9)
PEER = Law(A=205.0, sparsity=6.0, speed=0.9e9)
MOD = Law(A=119.8, speed=2.1e9)
ARMS = {"dense": DENSE, "moe": MOE, "peer": PEER, "mod": MOD}


def blocks(arm: str, width: int, top_k: int = 2) -> list[dict[str, Any]]:
    dense = {"kind": "dense", "d_ff": 4 * width, "activation": "swiglu"}
    ffn = {
        "moe": {"kind": "moe", "num_experts": 16, "top_k": top_k, "d_ff": 4 * width // top_k},
        "peer": {"kind": "peer", "num_experts": 4096, "num_heads": 4, "top_k": top_k},
    }.get(arm, dense)
    mixer = {"kind": "attention", "num_heads": 4}
    block = {"kind": "block", "mixer": mixer, "ffn": ffn}
    return [{"kind": "block", "mixer": mixer, "ffn": dense}, {"kind": "mod", "inner": block} if arm == "mod" else block]


def routing(arm: str) -> dict[str, Any]:
    load = (np.arange(1, 17) ** -0.3 / 16).tolist()
    experts = {
        "blocks.1.ffn": {"num_experts": 16, "usage": 0.98, "unevenness": 0.11, "tokens": TEST_TOKENS, "load": load}
    }
    scores = {"accuracy": 0.93, "precision": 0.74, "recall": 0.69, "f1": 0.71, "routed_rate": 0.12, "capacity": 0.125}
    return {
        "passes": [7000, 2000] if arm == "mod" else None,
        "predictor": {"blocks.1": scores} if arm == "mod" else {},
        "experts": experts if arm in ("moe", "peer") else {},
    }


def made_record(
    arm: str, budget: float, params: float, seed: int, nats: float, law: Law, role: str = "grid", top_k: int = 2,
    folder: Path = Path("runs"), fingerprint: str = FINGERPRINT, docs: np.ndarray | None = None, lr: float = 3e-3,
) -> Record:  # fmt: skip
    """One run of the given loss; `docs`, how its documents differ from their mean, writes documents.npz."""
    params = round(params)
    width = max(8, 8 * round((params / (24 * law.sparsity)) ** 0.5 / 8))
    forward, tokens = 2 * params / law.sparsity, law.tokens(params, budget)
    bpb = float(nats * TEST_TOKENS / (document_bytes().sum() * np.log(2)))
    wall = forward * 3 * tokens / law.speed * (1 + 0.01 * seed)
    path = folder / f"{arm}-{budget:.0e}-{params}-{seed}-{lr:g}-{top_k}"
    share = np.linspace(0.1, 1, 10)
    curve = tuple((float(budget * s), float(wall * s), float(bpb + 0.01 + 0.3 * (s**-0.4 - 1))) for s in share)
    model = {"d_model": width, "vocab_size": VOCAB, "seq_len": SEQ_LEN, "tie_embeddings": True}
    settings = {
        "model": model | {"blocks": blocks(arm, width, top_k)},
        "data": {"text": ["made/*.txt"], "vocab_size": VOCAB, "fingerprint": fingerprint},
        "train": {"budget_flops": budget, "batch_tokens": 2048, "lr": lr, "test_tokens": TEST_TOKENS},
        "seed": seed,
    }
    active = round(params / law.sparsity)
    result = {
        "flops": budget, "seed": seed, "lr": lr, "tokens": int(tokens), "bpb": bpb, "validation_bpb": bpb + 0.01,
        "lookahead_bpb": bpb - 0.02 if arm == "mod" else None, "wall_s": wall, "tokens_per_s": tokens / wall,
        "peak_memory_bytes": 300_000_000 + 16 * params, "perplexity": float(np.exp(nats)), "steps": int(tokens / 2048),
        "test_tokens": TEST_TOKENS, "routing": routing(arm), "convention": CONVENTION,
        "cost": {"params": params, "active_params": active, "flops_per_token": forward},
    }  # fmt: skip
    if docs is not None:
        path.mkdir(parents=True, exist_ok=True)
        num_bytes = document_bytes()
        spread = nats * TEST_TOKENS / num_bytes.sum() * num_bytes * (1 + docs)
        np.savez(path / "documents.npz", nats=spread, bytes=num_bytes)
        (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    same = ("flops", "seed", "lr", "tokens", "bpb", "validation_bpb", "lookahead_bpb", "wall_s", "tokens_per_s")
    return Record(
        folder=path, arm=arm, role=role, budget=budget, params=params, active_params=active, forward_flops=forward,
        nats=nats, curve=curve, settings=settings, result=result, **{name: result[name] for name in same},
        peak_memory_bytes=result["peak_memory_bytes"],
    )  # fmt: skip


def document_bytes() -> np.ndarray:
    """Bytes of the test documents, (NUM_DOCS,): log-normal, TEST_TOKENS / TOKENS_PER_BYTE in all."""
    raw = np.random.default_rng(1).lognormal(0, 0.8, NUM_DOCS)
    return np.maximum(1, np.round(raw / raw.sum() * TEST_TOKENS / TOKENS_PER_BYTE)).astype(np.int64)


def made_study(
    arms: dict[str, Law] | None = None, budgets=(1e13, 3e13), num_sizes: int = 6, step: float = 1.6, num_seeds: int = 5,
    sd: float = 0.01, shared: float = 0.3, seed: int = 0, rates: bool = True, folder: Path | None = None,
    shift: float = 0.0,
) -> list[Record]:  # fmt: skip
    """A grid of sizes around each optimum with seed 0, and `num_seeds` seeds at the size nearest to it.

    sd: of a seed's loss in nats, of whose variance `shared` is common to every arm with that seed and budget; shift: by
    how many sizes the grid is off-centre; folder: where documents.npz are written, none without it."""
    rng = np.random.default_rng(seed)
    arms = arms or ARMS
    hardness = rng.normal(0, 0.15, NUM_DOCS)
    if folder is not None:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        manifest = {"fingerprint": FINGERPRINT, "tokens": {"train": TRAIN_TOKENS}}
        (folder / "data" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    records = []
    for budget in budgets:
        common = rng.normal(0, sd * shared**0.5, num_seeds)
        for arm, law in arms.items():
            offsets = np.arange(num_sizes) - (num_sizes - 1) / 2 + shift
            sizes = law.best(budget)[0] * step**offsets
            best = sizes[np.abs(offsets).argmin()]
            runs = [(size, 0, "grid", 1.0) for size in sizes] + [(best, s, "seed", 1.0) for s in range(1, num_seeds)]
            if rates and budget == min(budgets):
                runs += [(best, 0, "rate", 0.5), (best, 0, "rate", 2.0)]
            for size, s, role, rate in runs:
                nats = law.loss(size, law.tokens(size, budget)) + common[s] + rng.normal(0, sd * (1 - shared) ** 0.5)
                # A fourfold too high or low rate costs 0.2 nats.
                nats += 0.05 * np.log2(rate) ** 2
                docs = None if folder is None else centred(hardness + rng.normal(0, 0.01, NUM_DOCS))
                place = folder or Path("runs")
                records.append(
                    made_record(arm, budget, size, s, float(nats), law, role, folder=place, docs=docs, lr=3e-3 * rate)
                )
            if rates and budget == min(budgets):
                # The rate that was chosen is the grid's run, named once more.
                chosen = next(r for r in records if (r.arm, r.budget, r.params) == (arm, budget, round(best)))
                records.append(replace(chosen, role="rate"))
    return records


def centred(docs: np.ndarray) -> np.ndarray:
    """Less their mean over bytes, so that a run's mean loss stays what it is."""
    return docs - (docs * document_bytes()).sum() / document_bytes().sum()


def renamed(records: list[Record], arm: str, name: str) -> list[Record]:
    """The same records with one arm called otherwise."""
    return [replace(record, arm=name) if record.arm == arm else record for record in records]
