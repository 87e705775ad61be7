"""The rows of a comparison's result: each kind's losses, difference and verdict, and what its runs took."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sparsemix.evaluate.estimate import Units
from sparsemix.report.records import read_run
from sparsemix.report.stats import Difference, bits_per_byte, difference, holm, smallest_visible, verdict
from sparsemix.run import Run
from sparsemix.settings import RunConfig

Runs = dict[str, list[tuple[RunConfig, Path]]]
# The name of a run's folder -> why it has no loss.
Lost = Mapping[str, str]
BASELINE = {"verdict": "baseline", "p_value": None}
NOT_COMPARED = {"difference": None, "difference_ci": None, "difference_limit": None}
# What the runs of a kind that all diverged in training say nothing of.
MEASURED = ("perplexity", "eval_flops_per_token", "tokens", "tokens_per_s", "peak_memory_bytes", "wall_s")
NOTHING = dict.fromkeys((*MEASURED, "lookahead_bpb", "leak"))


def diverged(several: list[tuple[RunConfig, Path]]) -> dict[str, str]:
    """Which of a kind's runs have no loss, and why."""
    read = {folder.name: read_run(folder) for _, folder in several}
    # One without a record has been begun anew by another process since.
    why = {name: record.diverged if record else "its training diverged" for name, record in read.items()}
    return {name: said for name, said in why.items() if said}


def rows_of(
    runs: Runs, losses: Mapping[str, Units], lost: Mapping[str, Lost], untuned: bool
) -> tuple[list[dict[str, Any]], dict[str, Difference]]:
    """(a row a kind, its difference from dense where it has one). `losses` are of the runs that have some.

    A diverged run's loss is infinite, and so is the mean of its kind: it has none, no difference and no verdict, nor
    has any kind a difference from a dense that diverged. It still counts as one of the kinds that p-values are
    corrected for, so that a verdict does not get easier by a divergence."""
    whole = [kind for kind in runs if not lost[kind]]
    base = losses["dense"] if "dense" in whole else None
    differences = {
        kind: difference(losses[kind].nats, base.nats, base.bytes) for kind in whole if base and kind != "dense"
    }
    words = _verdicts(differences, len(runs) - 1, untuned)
    for kind, several in runs.items():
        if lost[kind]:
            words[kind] = {"verdict": _said(lost[kind], len(several), losses.get(kind)), "p_value": None}
        elif base is None:
            words[kind] = {"verdict": "not judged: dense diverged", "p_value": None}
    rows = [
        {**_measures(kind, losses.get(kind), bool(lost[kind])), **_compared(differences.get(kind))}
        | words.get(kind, BASELINE)
        | several[0][0].costs()
        | _spent(several, lost[kind])
        for kind, several in runs.items()
    ]
    return rows, differences


def _said(lost: Lost, seeds: int, others: Units | None) -> str:
    """The verdict on a kind of which runs diverged."""
    said = f"diverged: {len(lost)} of {seeds} seed{'s' * (seeds != 1)}"
    if others is None:
        return said
    return f"{said}; the mean of the other{'s' * (len(others.nats) != 1)}, {_mean(others):.4f}, flatters it"


def _mean(losses: Units) -> float:
    return float(losses.nats.sum(axis=1).mean() / np.log(2) / losses.bytes.sum())


def divergence_of(rows: list[dict[str, Any]], seeds: int) -> list[str]:
    """A warning for each kind of which runs diverged."""
    return [
        f"{row['kind']}: {len(lost)} of {seeds} runs diverged ("
        + "; ".join(f"seed {run['seed']}: {run['diverged']}" for run in lost)
        + "); a mean that leaves them out would flatter the kind, so it has no loss and no verdict"
        for row in rows
        if (lost := [run for run in row["runs"] if run["diverged"]])
    ]


def _verdicts(differences: Mapping[str, Difference], planned: int, untuned: bool) -> dict[str, dict[str, Any]]:
    """Verdict and Holm-adjusted p-value of every kind with a difference, of the `planned` ones."""
    values = [d.p_value for d in differences.values()]
    adjusted = holm([*values, *[1.0] * (planned - len(values))])
    return {
        kind: {"verdict": verdict(d, p, smallest_visible(d.interval, planned), untuned), "p_value": p}
        for (kind, d), p in zip(differences.items(), adjusted, strict=False)
    }


def _measures(kind: str, losses: Units | None, lost: bool) -> dict[str, Any]:
    if losses is None:
        return {"kind": kind, **dict.fromkeys(("bpb", "bpb_ci", "bpb_limit", "effective_documents")), "seeds": 0}
    own = bits_per_byte(losses.nats, losses.bytes)
    seen = {"seeds": len(losses.nats), "effective_documents": own.effective_docs, "by_part": losses.by_part}
    told = {"bpb": own.estimate, "bpb_ci": [own.low, own.high], "bpb_limit": own.limit}
    return {"kind": kind, **(dict.fromkeys(told) if lost else told), **seen}


def _compared(d: Difference | None) -> dict[str, Any]:
    if d is None:
        return NOT_COMPARED
    interval = d.interval
    return {
        "difference": interval.estimate,
        "difference_ci": [interval.low, interval.high],
        "difference_limit": interval.limit,
    }


def _spent(several: list[tuple[RunConfig, Path]], lost: Lost) -> dict[str, Any]:
    """What the runs of a kind took and did, averaged over seeds where that means something."""
    every = [(Run(folder).result, config, folder) for config, folder in several]
    results = [result for result, _, _ in every if result is not None]
    runs = {"runs": [_run_row(*one, lost.get(one[2].name)) for one in every]}
    if not results:
        return {**NOTHING, "lr": several[0][0].train.lr, "routing": {}, **runs}
    ahead = [r["lookahead_bpb"] for r in results if r["lookahead_bpb"] is not None]
    lookahead = fmean(ahead) if ahead and not lost else None
    return {
        "perplexity": None if lost else float(np.exp(fmean(np.log(r["perplexity"]) for r in results))),
        "eval_flops_per_token": fmean(r["eval_flops_per_token"] for r in results),
        "tokens": results[0]["tokens"],
        "tokens_per_s": fmean(r["tokens_per_s"] for r in results),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in results),
        "wall_s": fmean(r["wall_s"] for r in results),
        "lr": results[0]["lr"],
        "lookahead_bpb": lookahead,
        "leak": None if lookahead is None else lookahead - fmean(r["bpb"] for r in results),
        "routing": results[0]["routing"],
        **runs,
    }


def _run_row(result: dict[str, Any] | None, config: RunConfig, folder: Path, lost: str | None) -> dict[str, Any]:
    curve = [
        {"flops": m["flops"], "wall_s": m["wall_s"], "tokens": m["tokens"], "bpb": m["validation_bpb"]}
        for m in Run(folder).metrics()
        if np.isfinite(m.get("validation_bpb", np.nan))
    ]
    about = {"seed": config.seed, "lr": config.train.lr, "bpb": None if lost or result is None else result["bpb"]}
    return {**about, "folder": folder.name, "curve": curve, "diverged": lost}
