"""Finished runs as reports see them: read from their folders alone, without torch."""

import json
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite, log, prod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sparsemix.config import ConfigError
from sparsemix.evaluate.estimate import Units, units
from sparsemix.inputs import trusted
from sparsemix.report.arm import arm_of
from sparsemix.run import CONVENTION, Run, by_document, read_plan


@dataclass(frozen=True)
class Record:
    """One finished run. Losses are causal; `nats` is the mean over test tokens, sizes count all parameters.

    arm: what tables call it; budget: the training FLOPs it was given, and flops those it spent; forward_flops: of a
    token; curve: (FLOPs spent, seconds of training, validation bits per byte) as it went. role: why a study has it,
    `rate` (a learning rate that was tried), `grid` (a size) or `seed` (another seed at an optimum).

    The losses of a run that diverged are infinite; one that diverged in training has no result either, and counts 0."""

    folder: Path
    arm: str
    role: str
    budget: float
    flops: float
    seed: int
    lr: float
    params: int
    active_params: int | None
    forward_flops: float
    tokens: int
    nats: float
    bpb: float
    validation_bpb: float
    lookahead_bpb: float | None
    wall_s: float
    tokens_per_s: float
    peak_memory_bytes: int
    curve: tuple[tuple[float, float, float], ...]
    settings: dict[str, Any]
    result: dict[str, Any]

    def documents(self) -> tuple[Float[np.ndarray, "D"], Int[np.ndarray, "D"]]:
        """(nats, bytes) of every test document, or of every part where there are few."""
        found = document_units([self.folder])
        return found.nats[0], found.bytes

    @property
    def diverged(self) -> str | None:
        """Why it has no loss; None of all runs but those that diverged."""
        if isfinite(self.nats + self.bpb + self.validation_bpb + (self.lookahead_bpb or 0.0)):
            return None
        return self.result.get("diverged", "its test loss is not finite")

    @property
    def corpus(self) -> str:
        """What was read, so that runs on other texts are not compared."""
        data = self.settings["data"]
        return data.get("fingerprint") or json.dumps(data, sort_keys=True)

    @property
    def convention(self) -> str:
        """How its FLOPs were counted."""
        return self.result.get("convention", CONVENTION)


def document_units(folders: Sequence[Path]) -> Units:
    """The test losses of runs on the same text, a row a run."""
    held = [by_document(folder / "documents.npz") for folder in folders]
    # Runs from before parts were scored hold one loss a document.
    return units(np.stack([file["nats"] for file in held]), held[0]["bytes"], held[0].get("groups"))


def read_run(folder: Path, arm: str | None = None, role: str = "grid") -> Record | None:
    """The run in a folder, called `arm` or by what its settings are; None if it is unfinished, unless it
    diverged. Raises ConfigError."""
    run = Run(folder)
    result = run.result
    if result is None and (why := run.diverged) is not None:
        result = NO_RESULT | {"seed": run.settings.get("seed"), "diverged": why}
    if result is None:
        return None
    run.check()
    with trusted(folder):
        record = _record(folder, run, result, arm, role)
        _checked(record)
    return record


# What is known of a run that diverged in training.
NO_RESULT: dict[str, Any] = {
    **dict.fromkeys(("bpb", "validation_bpb", "perplexity"), inf),
    **dict.fromkeys(("flops", "lr", "wall_s", "tokens_per_s", "tokens", "peak_memory_bytes"), 0),
    "lookahead_bpb": None,
    "cost": {"params": 0, "flops_per_token": 0.0},
}


def _loss(value: float) -> float:
    """A loss that is no number is as bad as any can be."""
    return value if isfinite(value) else inf


def _record(folder: Path, run: Run, result: dict[str, Any], arm: str | None, role: str) -> Record:
    settings = run.settings
    cost = result.get("cost") or _cost_of_old(folder, result)
    points = ((m["flops"], m["wall_s"], m["validation_bpb"]) for m in run.metrics() if "validation_bpb" in m)
    # A loss on the way that was not finite has no place in a picture; what it came to is told by the test.
    curve = tuple(point for point in points if isfinite(point[2]))
    return Record(
        folder=folder,
        arm=arm or arm_of(settings),
        role=role,
        budget=float(settings["train"]["budget_flops"]),
        params=cost["params"],
        active_params=cost.get("active_params"),
        forward_flops=cost["flops_per_token"],
        nats=_loss(log(result["perplexity"])),
        curve=curve,
        settings=settings,
        result=result,
        lookahead_bpb=None if (looked := result["lookahead_bpb"]) is None else _loss(float(looked)),
        **{name: _loss(float(result[name])) for name in ("bpb", "validation_bpb")},
        **{name: float(result[name]) for name in ("flops", "lr", "wall_s", "tokens_per_s")},
        **{name: int(result[name]) for name in ("seed", "tokens", "peak_memory_bytes")},
    )


def read_runs(folders: Sequence[Path], say: Callable[[str], None] = warnings.warn) -> list[Record]:
    """Every finished run of the folders, and those that diverged: a study's (its plan.yaml says whose each run is), a
    comparison's or any other folder of runs, or a run's own. A damaged one is said and left out. Raises ConfigError
    where there is none."""
    named: list[tuple[Path, str | None, str]] = []
    for folder in folders:
        if (cells := read_plan(folder).get("cells")) is not None:
            named += [(folder / "runs" / cell["run"], cell["arm"], cell["role"]) for cell in cells]
        elif (folder / "config.yaml").exists():
            named.append((folder, None, "grid"))
        elif folder.is_dir():
            named += [(path.parent, None, "grid") for path in sorted(folder.glob("*/config.yaml"))]
    records, lost = [], {}
    for folder, arm, role in named:
        try:
            record = read_run(folder, arm, role) if (folder / "config.yaml").exists() else None
        except ConfigError as error:
            lost[folder] = str(error)
            continue
        if record is not None:
            records.append(record)
    for told in lost.values():
        say(f"left out: {told}")
    if not records:
        rest = f"; {len(lost)} damaged" if lost else ""
        holds = "holds" if len(folders) == 1 else "hold"
        raise ConfigError(
            f"{', '.join(map(str, folders))} {holds} no finished run{rest}; name a study's or a run's folder"
        )
    return records


LOSSES = ("nats", "bpb", "validation_bpb", "lookahead_bpb")


def _checked(record: Record) -> None:
    """Raises ValueError where something that reports calculate with is no finite number, or documents are missing."""
    named = {field.name: getattr(record, field.name) for field in fields(record)}
    for name, value in named.items():
        if isinstance(value, (str, dict, tuple, Path)) or (
            value is None and name in ("lookahead_bpb", "active_params")
        ):
            continue
        lost = record.diverged and name in LOSSES
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (lost or isfinite(value)):
            raise ValueError(f"{name}={str(value)[:40]} is no number")
    if not all(isfinite(value) for point in record.curve for value in point):
        raise ValueError("the learning curve holds what is no number")
    model, data = record.settings["model"], record.settings["data"]
    if not all(isinstance(model[name], int) for name in ("d_model", "vocab_size", "seq_len")) or not isinstance(
        data, dict
    ):
        raise TypeError("config.yaml holds other types of settings")
    for name, kind in (("routing", dict), ("versions", dict), ("hardware", str), ("convention", str), ("steps", int)):
        if not isinstance(record.result.get(name), (kind, type(None))):
            raise TypeError(f"{name} is a {type(record.result[name]).__name__}")
    # Runs of the first version hold no losses by document.
    if (record.folder / "documents.npz").exists() and not record.diverged:
        record.documents()


def same_terms(records: list[Record]) -> None:
    """Raises ConfigError unless the runs share corpus, vocabulary, sequence length and FLOP convention."""
    terms = {
        "corpus": lambda r: r.corpus[:16],
        "model.vocab_size": lambda r: r.settings["model"]["vocab_size"],
        "model.seq_len": lambda r: r.settings["model"]["seq_len"],
        "FLOP convention": lambda r: r.convention,
    }
    for name, term in terms.items():
        groups: dict[Any, Record] = {}
        for record in records:
            groups.setdefault(term(record), record)
        if len(groups) > 1:
            (a, first), (b, second) = list(groups.items())[:2]
            raise ConfigError(
                f"these runs cannot be compared: {name} is {a} in {first.folder} and {b} in {second.folder}; name "
                "folders of one study"
            )


def _cost_of_old(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Cost of a run from before results held it: what training spent, and the parameters in its saved weights."""
    weights = folder / "model" / "model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"{folder}: an old run without its weights says no size; keep model/model.safetensors")
    with weights.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    sizes = [prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"]
    return {"params": sum(sizes), "flops_per_token": result["flops"] / result["tokens"] / 3}
