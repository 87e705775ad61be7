"""A corpus, models and runs small enough to train in a second: structured text, d_model 16, two blocks."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jaxtyping
import torch

from sparsemix import train
from sparsemix.config import parse
from sparsemix.data import DataConfig, Shards, prepare
from sparsemix.settings import RunConfig

D, T, V = 16, 16, 300
ATTENTION = {"kind": "attention", "num_heads": 2}
DENSE = {"kind": "dense", "d_ff": 40}
MOE = {"kind": "moe", "num_experts": 4, "top_k": 2, "d_ff": 20}
BIASED = MOE | {"bias_rate": 0.01, "capacity_factor": 0.75}
EXPERT_CHOICE = {"kind": "expert_choice", "num_experts": 4, "capacity_factor": 2.0, "d_ff": 20}
MODE = {"kind": "mode", "num_experts": 4, "num_noop": 2, "top_k": 2, "d_ff": 20}
PEER = {"kind": "peer", "num_experts": 64, "num_heads": 2, "top_k": 4, "d_key": 8}
PKM = {"kind": "pkm", "num_values": 64, "num_heads": 2, "top_k": 4, "d_key": 8}
MH_MOE = {"kind": "mh_moe", "num_heads": 2, "inner": MOE}


@contextmanager
def unchecked_shapes(unchecked: bool = True) -> Iterator[None]:
    """Whole runs without the checks of every call's shapes, which take half their time; layers have their own tests."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", unchecked)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def block(ffn):
    return {"kind": "block", "mixer": ATTENTION, "ffn": ffn}


def mod(inner, **settings):
    return {"kind": "mod", "capacity": 0.25, "predictor_width": 8, "inner": inner} | settings


BLOCKS = {
    "dense": [block(DENSE), block(DENSE)],
    "moe": [block(DENSE), block(MOE)],
    "peer": [block(DENSE), block(PEER)],
    "pkm": [block(DENSE), block(PKM)],
    "mh_moe": [block(DENSE), block(MH_MOE)],
    "mod": [block(DENSE), mod(block(DENSE))],
    "threshold": [block(DENSE), mod(block(DENSE), sampling="threshold")],
    "random": [block(DENSE), mod(block(DENSE), selector="random")],
    "expert_choice": [block(DENSE), block(EXPERT_CHOICE)],
    "mode": [block(MODE | {"routing": "expert_choice"}), block(MODE)],
    # Every kind of running state and of extra loss at once.
    "nested": [block(BIASED), mod(block(PEER)), block(EXPERT_CHOICE)],
    "nested_threshold": [block(BIASED), mod(block(PEER), sampling="threshold"), block(EXPERT_CHOICE)],
}
KINDS = ("dense", "moe", "expert_choice", "mode", "pkm", "peer", "mh_moe", "mod")


def sentence(rng):
    """An order of words that the word before, but not the word's frequency, gives away."""
    who, what = rng.choice(["cat", "dog", "hen", "fox"]), rng.choice(["sees", "hears", "finds"])
    return f"the {who} {what} one {rng.choice(['red', 'big', 'old'])} {rng.choice(['hat', 'box', 'egg'])}. "


def write_corpus(folder: Path, documents: int = 80, seed: int = 0) -> DataConfig:
    """Settings of a corpus that is written to `folder`."""
    rng = random.Random(seed)
    texts = ["".join(sentence(rng) for _ in range(rng.randrange(1, 12))) for _ in range(documents)]
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return DataConfig(text=(str(path),), vocab_size=V, validation_fraction=0.15, test_fraction=0.15)


def prepared(folder: Path) -> tuple[DataConfig, Shards]:
    """The corpus as shards in `folder`, and their settings."""
    data = write_corpus(folder)
    return data, prepare(data, folder / "shards")


def run_config(data: DataConfig, blocks="dense", steps: int = 4, seed: int = 0, **train) -> RunConfig:
    """A run of `steps` steps of 4 sequences; `blocks` is a name in BLOCKS or a list of blocks."""
    model = {
        "d_model": D,
        "vocab_size": V,
        "seq_len": T,
        "blocks": BLOCKS.get(blocks) if isinstance(blocks, str) else blocks,
    }
    defaults = {
        "budget_flops": 1.0,
        "batch_tokens": 4 * T,
        "dtype": "float32",
        "evals": 1,
        "eval_tokens": 100,
        "test_tokens": 150,
    }
    config = parse(RunConfig, {"model": model, "data": data.model_dump(), "train": defaults | train, "seed": seed})
    # Half a step more than whole steps: the budget buys `steps` of them.
    return config.replace(train=config.train.replace(budget_flops=(steps + 0.5) * config.step_flops))


def result_of(config, folder, shards):
    """What a run that is trained to its end says of itself."""
    result = train.train(config, folder, shards).result
    assert result is not None
    return result


def changed(left, right):
    """Names of the tensors that differ in any bit."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]
