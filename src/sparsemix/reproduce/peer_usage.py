"""How many experts a trained PEER uses and how evenly, over enough tokens to tell (arXiv:2407.04153, section 3.3)."""

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from sparsemix.durable import write_atomic
from sparsemix.inputs import checked_json, read_mapping
from sparsemix.report.records import Record
from sparsemix.reproduce.peer import layer

# Visits that each expert would get if use were even.
VISITS = 10


class Usage(NamedTuple):
    """usage: share of experts with any gate mass; unevenness: KL(z || uniform) in nats, z the normalised gate mass.
    Over `tokens` evaluation tokens of the `needed`; with fewer, usage is a lower bound."""

    usage: float
    unevenness: float
    tokens: int
    needed: int

    @property
    def enough(self) -> bool:
        return self.tokens >= self.needed


def usage(record: Record, data: Path, say: Callable[[str], None]) -> Usage:
    """By the run's own test, where that had 10 N / (heads * top_k) tokens, else over as many of the test split and
    then the validation split as there are, kept in the run's folder. data: the prepared text. Raises ConfigError."""
    path, settings = layer(record)
    needed = ceil(VISITS * settings["num_experts"] / (settings["num_heads"] * settings["top_k"]))
    found = record.result["routing"]["experts"][path]
    if found["tokens"] < needed:
        found = _longer(record, path, data, needed, say)
    return Usage(found["usage"], found["unevenness"], found["tokens"], needed)


def _longer(record: Record, path: str, data: Path, needed: int, say: Callable[[str], None]) -> dict[str, Any]:
    kept = record.folder / "usage.json"
    held = read_mapping(kept, "delete it to have it measured again") if kept.is_file() else {}
    if held.get("asked") != needed:
        say(f"{record.arm}, seed {record.seed}: use of experts over {needed} tokens")
        held = {"asked": needed, **_measure(record, path, data, needed)}
        write_atomic(kept, checked_json(held))
    return held


def _measure(record: Record, path: str, data: Path, needed: int) -> dict[str, Any]:
    import numpy as np

    from sparsemix.data import Shards
    from sparsemix.data.windows import Stream
    from sparsemix.evaluate.perplexity import document_losses
    from sparsemix.evaluate.routing import unevenness
    from sparsemix.evaluate.routing import usage as share_used
    from sparsemix.trained import load

    model, shards = load(record.folder).model, Shards.open(data)
    seq_len = model.config.seq_len
    rows = max(1, min(4096, 2**25 // model.config.vocab_size) // seq_len)
    tokens, mass = 0, np.zeros(layer(record)[1]["num_experts"])
    for split in ("test", "validation"):
        if tokens < needed:
            stream = Stream(shards.tokens(split), shards.starts(split)).first(needed - tokens)
            losses = document_losses(model, stream.eval_batches(rows, seq_len))
            tokens, mass = tokens + losses.tokens, mass + losses.stats[f"{path}.gate_mass"]
    return {"usage": share_used(mass), "unevenness": unevenness(mass), "tokens": tokens}
