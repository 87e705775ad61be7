"""An isoFLOP study in numbers: curves, optima, laws, the quantities people quote, verdicts, and what to doubt.

The dictionary that `analyse` gives is what the page, the console and the tables are made from; null means that the
runs cannot tell. Methods and sources: docs/fits.md."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from sparsemix.config import ConfigError
from sparsemix.errors import DamagedError
from sparsemix.inputs import read_mapping
from sparsemix.report.fits.caveats import NO_VERDICT, divergence_of, does_not_show, epochs_of, tuned_arms, warnings_of
from sparsemix.report.fits.curves import curves_of
from sparsemix.report.fits.equal_loss import exponent, line_of, steps_per_s
from sparsemix.report.fits.gaps import BOTH
from sparsemix.report.fits.granularity import granularity_laws, granularity_warnings
from sparsemix.report.fits.laws import budget_by_law, laws_of
from sparsemix.report.fits.quantities import Terms, draw_optima, quantities_of
from sparsemix.report.optimum import FITTED
from sparsemix.report.records import Record, same_terms
from sparsemix.report.stats import RESAMPLES


def analyse(
    records: Sequence[Record],
    *,
    baseline: str = "dense",
    allow_repeats: bool = False,
    command: str = "",
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Everything a report says about the runs, as JSON-able data; `runs` are those of `ended`, in their order.

    A run that diverged is a result: it is in `diverged`, a warning names it, and its arm has no verdict at that budget,
    for a mean over the seeds that did not diverge flatters it. Raises ConfigError."""
    same_terms(list(records))
    lost = [r for r in records if r.diverged and r.role in FITTED]
    used = [r for r in records if r.role in FITTED and not r.diverged]
    if not used:
        why = f"; {len(lost)} diverged" if lost else ""
        raise ConfigError(f"these runs hold no size of a grid (role grid or seed){why}, so there is no curve to fit")
    arms = sorted(dict.fromkeys(r.arm for r in used), key=lambda arm: arm != baseline)
    curves = curves_of(used, arms, _bpb_of_a_nat(used))
    optima = draw_optima(curves, resamples)
    manifest = manifest_of(used)
    train_tokens = (manifest.get("tokens") or {}).get("train")
    often = (r for r in used if (epochs_of(r, train_tokens) or 0) > NO_VERDICT and not allow_repeats)
    repeated = frozenset((r.arm, r.budget) for r in often)
    diverged = frozenset((r.arm, r.budget) for r in lost)
    tuned = tuned_arms(records)
    line = line_of(
        [o for o in optima.values() if o is not None and o.curve.arm == baseline and o.curve.bracketed],
        np.random.default_rng(2),
    )
    laws, law_said = laws_of(curves, resamples)
    granularity = granularity_laws(used, resamples)
    said = law_said + granularity_warnings(granularity)
    base = [c for c in curves if c.arm == baseline]
    by_law = budget_by_law([entry for entry in laws if entry["arm"] == baseline], base)
    terms = Terms(baseline, tuned, repeated, resamples, by_law, diverged)
    quantities, far = quantities_of(curves, optima, line, terms)
    repeats = warnings_of(records, curves, baseline, train_tokens, allow_repeats)
    documents = all(q["test"] in (None, BOTH) for q in quantities)
    return {
        "title": f"isoFLOP study: {', '.join(arms)}",
        "command": command,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "convention": used[0].convention,
        "corpus": _corpus(used[0], manifest),
        "baseline": baseline,
        "arms": arms,
        "budgets": sorted({r.budget for r in used}),
        "seeds": {arm: {c.budget: len(c.seeded) for c in curves if c.arm == arm} for arm in arms},
        "runs": [_run(r, train_tokens) for r in ended(records)],
        "diverged": [_lost(r) for r in lost],
        "curves": [curve.as_data() for curve in curves],
        "optimum_against_budget": [
            exponent(arm, [o for (a, _), o in optima.items() if a == arm and o and o.curve.bracketed]) for arm in arms
        ],
        "laws": laws,
        "granularity": granularity,
        "quantities": quantities,
        "warnings": [*divergence_of(lost), *manifest.get("warnings", ()), *repeats, *said, *far],
        "does_not_show": does_not_show(records, curves, tuned, laws=bool(laws), documents=documents),
    }


def ended(records: Sequence[Record]) -> list[Record]:
    """Those that have a loss."""
    return [record for record in records if not record.diverged]


def _lost(record: Record) -> dict[str, Any]:
    """The entry of `diverged`."""
    width = record.settings["model"]["d_model"]
    said = {"arm": record.arm, "role": record.role, "budget": record.budget, "seed": record.seed, "width": width}
    return said | {"folder": record.folder.name, "why": record.diverged}


def _bpb_of_a_nat(records: Sequence[Record]) -> float:
    """Bits per byte of one nat per token, the same for all runs that read the same test tokens. Raises ConfigError."""
    ratios = [r.bpb / r.nats for r in records]
    low, high = (records[int(f(ratios))] for f in (np.argmin, np.argmax))
    if max(ratios) > min(ratios) * (1 + 1e-4):
        raise ConfigError(
            f"these runs cannot be compared: {low.folder} and {high.folder} were tested on different tokens; give them "
            "the same train.test_tokens"
        )
    return float(np.median(ratios))


def manifest_of(records: Sequence[Record]) -> dict[str, Any]:
    """The facts of the study's prepared text where it still stands beside its runs, else none; of a damaged one its
    damage, as `warnings`."""
    for record in records:
        for above in (record.folder.parent, record.folder.parent.parent):
            path = above / "data" / "manifest.json"
            if path.is_file():
                try:
                    manifest = read_mapping(path, "this report says nothing of the text")
                except DamagedError as error:
                    return {"warnings": [str(error)]}
                if manifest.get("fingerprint") == record.settings["data"].get("fingerprint"):
                    return manifest
    return {}


def read_line(records: Sequence[Record]) -> str | None:
    """What was read and what was skipped, in a line."""
    return (manifest_of(records).get("read") or {}).get("line")


def _corpus(record: Record, manifest: dict[str, Any]) -> dict[str, Any]:
    data = record.settings["data"]
    return {
        "text": list(data.get("text", [])),
        "fingerprint": data.get("fingerprint"),
        "train_tokens": (manifest.get("tokens") or {}).get("train"),
        "contamination": manifest.get("contamination"),
        "read": (manifest.get("read") or {}).get("line"),
        "vocab_size": record.settings["model"]["vocab_size"],
    }


def _run(record: Record, train_tokens: int | None) -> dict[str, Any]:
    """The entry of `runs`."""
    same = ("arm", "role", "budget", "seed", "params", "active_params", "forward_flops", "tokens", "nats", "bpb")
    same += ("validation_bpb", "lookahead_bpb", "lr", "wall_s", "tokens_per_s", "peak_memory_bytes")
    blocks = record.settings["model"]["blocks"]
    return {name: getattr(record, name) for name in same} | {
        "width": record.settings["model"]["d_model"],
        "layers": len(blocks) if isinstance(blocks, list) else blocks["count"],
        "epochs": epochs_of(record, train_tokens),
        "folder": record.folder.name,
        "curve": [list(point) for point in record.curve],
        "routing": record.result.get("routing"),
        "steps": record.result.get("steps", round(record.wall_s * steps_per_s(record))),
    }
