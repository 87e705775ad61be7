"""Bytes of trained models, float and packed, and how fast they write, measured in turns and kept in one file."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from sparsemix import saved
from sparsemix.durable import write_atomic
from sparsemix.generation import Sampling, generate
from sparsemix.inputs import checked_json, read_mapping, trusted
from sparsemix.layers.packed import TernaryWeight, pack_ternary
from sparsemix.model import LM
from sparsemix.provenance import hardware
from sparsemix.report.records import Record
from sparsemix.trained import load

FLOAT_FORMS = ("fp32", "bf16")
TERNARY_FORMS = ("two bits, rest fp32", "two bits, rest bf16")
ROUNDS, NEW_TOKENS, PROMPT = 15, 32, 8


class Decoding(NamedTuple):
    """Of every arm the run that was measured, and of each of its forms `disk_bytes`, `memory_bytes`, `ternary_bytes`
    and `tokens_per_s`, one value a round."""

    runs: dict[str, str]
    forms: dict[str, dict[str, dict[str, Any]]]
    hardware: str

    def rounds(self, arm: str, form: str) -> list[float]:
        return self.forms[arm][form]["tokens_per_s"]

    def median(self, arm: str, form: str) -> float:
        return median(self.rounds(arm, form))

    def quartiles(self, arm: str, form: str) -> tuple[float, float]:
        low, _, high = quantiles(self.rounds(arm, form), n=4)
        return low, high


def decoding(
    kept: Path,
    records: Mapping[str, Record],
    say: Callable[[str], None],
    rounds: int = ROUNDS,
    new_tokens: int = NEW_TOKENS,
) -> Decoding:
    """The measurements of one run of every arm; what `kept` holds of the same runs is not measured again."""
    runs = {arm: record.folder.name for arm, record in records.items()}
    if kept.is_file():
        with trusted(kept):
            found = Decoding(**read_mapping(kept, "delete it to have it measured again"))
        if found.runs == runs:
            return found
    say(f"measuring bytes and speed of {', '.join(runs)}")
    models = {arm: forms_of(load(record.folder).model) for arm, record in records.items()}
    forms: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, made in models.items():
        places = {form: records[arm].folder / "forms" / form.replace(", ", "-").replace(" ", "-") for form in made}
        forms[arm] = {form: sizes(model, places[form]) for form, model in made.items()}
    turns = {(arm, form): model for arm, made in models.items() for form, model in made.items()}
    for (arm, form), speeds in speed(turns, rounds, new_tokens).items():
        forms[arm][form]["tokens_per_s"] = speeds
    found = Decoding(runs, forms, f"{hardware()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, checked_json(found._asdict()))
    return found


def forms_of(model: LM) -> dict[str, LM]:
    """The model as it would be used: packed if it is ternary, and with what is not packed in either number type."""
    ternary = '"ternary"' in model.config.model_dump_json()
    whole = pack_ternary(copy.deepcopy(model)) if ternary else model
    assert isinstance(whole, LM)
    return dict(zip(TERNARY_FORMS if ternary else FLOAT_FORMS, (whole, copy.deepcopy(whole).bfloat16()), strict=True))


def sizes(model: LM, folder: Path) -> dict[str, Any]:
    """Bytes of the weights, saved in `folder` and in memory, and those of the latter that are ternary."""
    saved.write(model, folder)
    packed = {id(b) for m in model.modules() if isinstance(m, TernaryWeight) for b in m.buffers()}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return {
        "disk_bytes": (folder / saved.WEIGHTS).stat().st_size,
        "memory_bytes": sum(t.nbytes for t in tensors.values()),
        "ternary_bytes": sum(t.nbytes for i, t in tensors.items() if i in packed),
    }


def speed(models: Mapping[Any, LM], rounds: int, new_tokens: int) -> dict[Any, list[float]]:
    """Tokens a second of greedy generation of one sequence, in every round each model once, in an order that turns. A
    first generation of each warms up and counts for nothing."""
    names: Sequence[Any] = list(models)
    found: dict[Any, list[float]] = {name: [] for name in names}
    for name in names:
        _write(models[name], new_tokens)
    for done in range(rounds):
        for i in range(len(names)):
            name = names[(i + done) % len(names)]
            began = time.perf_counter()
            _write(models[name], new_tokens)
            found[name].append(new_tokens / (time.perf_counter() - began))
    return found


def _write(model: LM, new_tokens: int) -> None:
    device = model.embed.weight.device
    prompt = torch.arange(PROMPT, device=device)[None] % model.config.vocab_size
    for step in generate(model, prompt, new_tokens, Sampling(temperature=0.0)):
        # A GPU's work is over only when its result is here.
        step.token_ids.cpu()
