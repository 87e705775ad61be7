"""What a reader must know before believing a study: warnings, and what it does not show, from the data at hand."""

from collections.abc import Sequence

import numpy as np

from sparsemix.report.fits.curves import Curve
from sparsemix.report.fits.quadratic import FAR, WANTED
from sparsemix.report.optimum import size_of
from sparsemix.report.records import Record

WIDE = 1.3
REPEATS, NO_VERDICT = 1.0, 4.0


def epochs_of(record: Record, train_tokens: int | None) -> float | None:
    return None if not train_tokens else record.tokens / train_tokens


def tuned_arms(records: Sequence[Record]) -> frozenset[str]:
    """Arms of which three learning rates or more were tried on one size: fewer are no search."""
    tried: dict[str, set[float]] = {}
    for record in records:
        if record.role == "rate":
            tried.setdefault(record.arm, set()).add(record.lr)
    return frozenset(arm for arm, rates in tried.items() if len(rates) >= 3)


def warnings_of(
    records: Sequence[Record], curves: Sequence[Curve], baseline: str, train_tokens: int | None, allow_repeats: bool
) -> list[str]:
    said = []
    if baseline not in {r.arm for r in records}:
        said.append(f"no run of the baseline {baseline}: nothing is compared")
    used = [r for r in records if r.role != "rate"]
    said += [line for curve in curves for line in _of_curve(curve)]
    said += _duplicates(used)
    said += _edges(records)
    said += _repeats(used, train_tokens, allow_repeats)
    return said


def divergence_of(lost: Sequence[Record]) -> list[str]:
    """A warning for each run without a loss."""
    return [
        f"{r.arm} at {r.budget:.3g} FLOPs, width {r.settings['model']['d_model']}, seed {r.seed} ({r.folder.name}): "
        f"diverged, {r.diverged}; there is no verdict on {r.arm} at this budget"
        for r in lost
    ]


def _of_curve(curve: Curve) -> list[str]:
    name = f"{curve.arm} at {curve.budget:.3g} FLOPs"
    said = []
    if curve.said:
        return [f"{name}: no optimum, {curve.said}"]
    fit = curve.optimum
    assert fit is not None and fit.vertex_interval is not None
    if not fit.bracketed:
        below = sum(x < fit.vertex for x in fit.sizes)
        said.append(
            f"{name}: not bracketed, of {len(fit.sizes)} sizes {below} lie below the fitted optimum and "
            f"{len(fit.sizes) - below} above; it takes two on each side"
        )
    elif fit.vertex_interval[0] < fit.sizes[0] or fit.vertex_interval[1] > fit.sizes[-1]:
        said.append(f"{name}: the optimum's interval reaches beyond the sizes that were run")
    span, middle = fit.sizes[-1] - fit.sizes[0], (fit.sizes[0] + fit.sizes[-1]) / 2
    if span > WIDE:
        said.append(f"{name}: sizes span {10**span:.0f} times; so wide a parabola is biased (arXiv:2603.22339)")
    if fit.bracketed and abs(fit.vertex - middle) > span / 4:
        said.append(f"{name}: the optimum is off the middle of the sizes, which biases a parabola (arXiv:2603.22339)")
    if fit.dropped:
        said.append(f"{name}: not in the fit, being more than {FAR} nats above the best: {_sizes(fit.dropped)}")
    if len(fit.sizes) < WANTED:
        said.append(f"{name}: {len(fit.sizes)} sizes in the fit, {WANTED} are wanted")
    if fit.scatter:
        said.append(f"{name}: sizes scatter about the curve more than seeds do; the scatter is taken for the error")
    if len(curve.seeded) == 1:
        said.append(f"{name}: one seed, nothing is known of others")
    sizes = [size_of(point[0]) for point in curve.points]
    nearest = min(range(len(sizes)), key=lambda i: abs(sizes[i] - fit.vertex))
    if abs(curve.points.index(curve.seeded) - nearest) > 1:
        said.append(
            f"{name}: its seeds are at {_sizes([size_of(curve.seeded[0])])}, not next to the optimum at "
            f"{_sizes([fit.vertex])}; what is compared is the loss there"
        )
    return said


def _sizes(logs: Sequence[float]) -> str:
    return ", ".join(f"{_amount(10**x)} FLOPs a token" for x in logs)


def _duplicates(records: Sequence[Record]) -> list[str]:
    seen: dict[tuple, Record] = {}
    said = []
    for record in records:
        first = seen.setdefault((record.arm, record.budget, record.forward_flops, record.params, record.seed), record)
        if first.folder != record.folder:
            said.append(
                f"{record.arm} at {record.budget:.3g} FLOPs: {first.folder.name} and {record.folder.name} have equal "
                f"size ({record.params}) and seed; the first is used"
            )
    return said


def _edges(records: Sequence[Record]) -> list[str]:
    """Searches whose best learning rate has none worse on one side."""
    searches: dict[tuple[str, float, int], dict[float, float]] = {}
    for r in records:
        if r.role == "rate":
            searches.setdefault((r.arm, r.budget, r.params), {})[r.lr] = r.validation_bpb
    said = []
    for (arm, budget, _), losses in searches.items():
        best = min(losses, key=losses.__getitem__)
        if len(losses) > 1 and best in (min(losses), max(losses)):
            said.append(f"{arm} at {budget:.3g} FLOPs: the best learning rate {best:.3g} is at the end of those tried")
    return said


def _repeats(records: Sequence[Record], train_tokens: int | None, allow_repeats: bool) -> list[str]:
    if not train_tokens:
        return ["the size of the training text is not known: its data folder is missing, so epochs cannot be told"]
    most = max(records, key=lambda r: r.tokens)
    epochs = most.tokens / train_tokens
    if epochs <= REPEATS:
        return []
    much = ", and beyond 4 epochs there is no verdict unless repeats are allowed"
    much = much if epochs > NO_VERDICT and not allow_repeats else ""
    return [
        f"up to {epochs:.1f} epochs over the training text ({most.arm} at {most.budget:.3g} FLOPs): repeated text "
        f"distorts the comparison{much}"
    ]


def does_not_show(
    records: Sequence[Record], curves: Sequence[Curve], tuned: frozenset[str], *, laws: bool, documents: bool
) -> list[str]:
    """Sentences a sceptic would want, each true of these runs."""
    largest, budgets = max(r.params for r in records), sorted({r.budget for r in records})
    text = ", ".join(sorted({str(t) for r in records for t in r.settings["data"].get("text", [])})) or "one text"
    scale = f"{_amount(largest)} parameters and {budgets[-1]:.3g} training FLOPs a run"
    said = [f"Anything beyond {scale}: orders of kinds are known to change with scale."]
    if len(budgets) < 3 or not laws:
        number = "one budget draws" if len(budgets) == 1 else f"{len(budgets)} budgets draw"
        said.append(f"How a gap changes with the budget: {number} no law.")
    vocabulary = records[0].settings["model"]["vocab_size"]
    said.append(f"Other texts than {text}, other tokenizers (vocabulary {vocabulary}), or other tasks.")
    if untuned := [arm for arm in dict.fromkeys(r.arm for r in records) if arm not in tuned]:
        said.append(f"{', '.join(untuned)} with a learning rate of its own: none was searched.")
    searched = {(r.arm, r.budget, r.params) for r in records if r.role == "rate"}
    if tuned and {(r.arm, r.budget, r.params) for r in records} - searched:
        said.append("Learning rates searched at every size and budget: others follow by rule from where it was done.")
    said.append("Any other hyperparameter tuned for each kind.")
    counts = [len(curve.seeded) for curve in curves]
    if counts and min(counts) < 3:
        said.append("The spread of seeds, where a kind has fewer than three at its optimum.")
    if any(len(point) == 1 for curve in curves for point in curve.points):
        said.append("The spread of seeds at other sizes than the optimum: it is taken to be the same there.")
    if not documents:
        said.append("Whether other test documents would say the same: losses by document are missing for some runs.")
    if len({r.settings["train"].get("batch_tokens") for r in records}) == 1:
        said.append("Other batch sizes: every run took the same tokens a step, whatever its size.")
    said.append(
        "Speed elsewhere: seconds are of this machine and these kernels, and runs beside one another slow each other."
    )
    if any(r.lookahead_bpb is not None for r in records):
        kinds = ", ".join(dict.fromkeys(r.arm for r in records if r.lookahead_bpb is not None))
        said.append(f"What {kinds} would reach by looking ahead at test time as in training: losses are causal.")
    return said


def _amount(n: float) -> str:
    power = int(np.log10(n) // 3) if n >= 1 else 0
    return f"{n / 1000**power:.3g} {['', 'k', 'M', 'G', 'T'][power]}".strip()
