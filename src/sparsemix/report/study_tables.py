"""The tables of an isoFLOP study, once as data: for its page, for a terminal and as Markdown."""

from collections.abc import Callable
from typing import Any

from rich.console import Group
from rich.text import Text

from sparsemix.report.held_out import found_in_train
from sparsemix.report.inspect_tables import Spec
from sparsemix.report.markdown import markdown_table
from sparsemix.report.numbers import DASH, duration, exponent, fixed, interval, is_number, p_value, si
from sparsemix.report.study_plots import Analysis, short

Said = dict[str, Any]


def _with(of: Said, key: str, decimals: int, signed: bool = False) -> str:
    """An estimate with its interval; a dash if there is none."""
    if not is_number(of.get(key)):
        return DASH
    ends = of.get(f"{key}_ci")
    return f"{fixed(of[key], decimals, signed)}{f' {interval(ends, decimals, signed)}' if ends else ''}"


def optima(analysis: Analysis) -> Spec:
    """Where each curve has its optimum, and its loss there."""
    rows = []
    for q in analysis["quantities"]:
        ends = q.get("optimal_params_ci")
        size = f"{short(q['optimal_params'])}" if is_number(q.get("optimal_params")) else DASH
        size += f" [{short(ends[0])}, {short(ends[1])}]" if ends and all(map(is_number, ends)) else ""
        seeds = analysis["seeds"].get(q["arm"], {})
        num = seeds.get(q["budget"], seeds.get(str(q["budget"])))
        rows.append([q["arm"], exponent(q["budget"]), size, _with(q, "nats", 4), _with(q, "bpb", 4), fixed(num, 0)])
    caption = "The optimum of each curve, with 95\u00a0% intervals. A dash: the curve has no bracketed optimum."
    return Spec(caption, ["arm", "budget", "parameters", "nats per token", "bits per byte", "seeds"], rows, (0,))


def gaps(analysis: Analysis) -> Spec:
    """Loss at the optimum against the baseline's, with verdicts."""
    rows = [
        [
            q["arm"], exponent(q["budget"]), _with(q, "gap_nats", 4, True), _with(q, "gap_percent", 2, True),
            _with(q, "gap_bpb", 4, True), p_value(q.get("p_value")), str(q.get("verdict") or DASH),
            fixed(q.get("visible"), 4), fixed(q.get("seeds"), 0), fixed(q.get("effective_documents"), 1),
        ]
        for q in analysis["quantities"]
        if q["arm"] != analysis["baseline"]
    ]  # fmt: skip
    tests = ", ".join(dict.fromkeys(q["test"] for q in analysis["quantities"] if q.get("test")))
    caption = (
        f"Loss of the size next to the optimum minus {analysis['baseline']}'s at the same budget; negative is better. "
        f"Test: {tests or DASH}; p-values after Holm over all rows. Visible: the smallest difference that the seeds "
        "show with a power of 80\u00a0%, in nats. Effective documents: how many of equal length would weigh the same."
    )
    columns = ["arm", "budget", "nats per token", "percent", "bits per byte", "p (Holm)", "verdict", "visible"]
    columns += ["seeds", "effective documents"]
    return Spec(caption, columns, rows, (0, 6))


def equal_loss(analysis: Analysis) -> Spec:
    """What equal loss costs beside the baseline."""
    base, few = analysis["baseline"], len(analysis["budgets"]) < 2
    known = {(q["arm"], q["budget"]) for q in analysis["quantities"] if is_number(q.get("nats"))}
    rows = []
    for q in analysis["quantities"]:
        if q["arm"] == base:
            continue
        both = {(q["arm"], q["budget"]), (base, q["budget"])} <= known
        missing = ("not reached", "one budget" if few else DASH) if both else ("no optimum", "no optimum")
        numbers = [
            _with(q, key, 2) if is_number(q.get(key)) else missing[key != "forward_ratio"]
            for key in ("forward_ratio", "flop_multiplier", "wall_multiplier")
        ]
        rows.append([q["arm"], exponent(q["budget"]), *numbers, _with(q, "steps_per_s_ratio", 2)])
    caption = (
        f"At equal loss. Forward FLOPs: of the smallest model of the arm that reaches {base}'s optimal loss, over "
        f"{base}'s. Multipliers: what {base} would need in training FLOPs, or seconds here, for the arm's optimal "
        "loss, over what the arm took; above 1 is better. Steps: steps per second of the pair, arm over baseline."
    )
    columns = ["arm", "budget", "forward FLOPs ratio", "FLOP multiplier", "time multiplier", "steps/s ratio"]
    return Spec(caption, columns, rows, (0,))


def laws(analysis: Analysis) -> list[Spec]:
    """The joint laws and the laws with granularity, where there are any."""
    specs = []
    if joint := analysis.get("laws"):
        names = ("E", "A", "B", "alpha", "beta")
        rows = [
            [
                law["arm"],
                law["method"],
                *(_parameter(law, name) for name in names),
                fixed(law.get("rmse"), 4),
                fixed(law.get("num_runs"), 0),
            ]
            for law in joint
        ]
        caption = "L = E + A / N^alpha + B / D^beta, N all parameters, D tokens, with 95\u00a0% intervals."
        specs.append(Spec(caption, ["arm", "method", *names, "RMSE (nats)", "runs"], rows, (0, 1)))
    if fine := analysis.get("granularity"):
        names = tuple(
            dict.fromkeys(n for law in fine for n in law if is_number(law[n]) and n not in ("rmse", "num_runs"))
        )
        rows = [[law["arm"], *(_parameter(law, name) for name in names)] for law in fine]
        specs.append(Spec("The law with granularity, with 95\u00a0% intervals.", ["arm", *names], rows, (0,)))
    return specs


def _parameter(law: Said, name: str) -> str:
    ends = (law.get("ci") or {}).get(name)
    said = f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends and all(map(is_number, ends)) else ""
    return f"{law[name]:.3g}{said}" if is_number(law.get(name)) else DASH


def rates(analysis: Analysis) -> Spec:
    """Learning rates, seeds and epochs of each arm at each budget."""
    rows = []
    for arm in analysis["arms"]:
        for budget in analysis["budgets"]:
            runs = [r for r in analysis["runs"] if (r["arm"], r["budget"]) == (arm, budget)]
            fitted, tried = [r for r in runs if r["role"] != "rate"], [r for r in runs if r["role"] == "rate"]
            if not runs:
                continue
            read = [r["epochs"] for r in fitted if is_number(r.get("epochs"))]
            rows.append([
                arm, exponent(budget), str(len({r["params"] for r in fitted})),
                _several({r["seed"] for r in fitted}, str),
                _several({r["lr"] for r in fitted}, exponent), _several({r["lr"] for r in tried}, exponent),
                f"{fixed(min(read), 2)} to {fixed(max(read), 2)}" if read else DASH,
                duration(sum(r["wall_s"] for r in {r["folder"]: r for r in runs}.values())),
            ])  # fmt: skip
    columns = ["arm", "budget", "sizes", "seeds", "learning rates", "rates tried", "epochs", "time, all runs"]
    return Spec("What each arm was given.", columns, rows, (0, 3, 4, 5))


def _several(values: set[Any], text: Callable[[Any], str]) -> str:
    ordered = sorted(values)
    if len(ordered) > 6:
        return f"{text(ordered[0])} to {text(ordered[-1])} ({len(ordered)})"
    return ", ".join(map(text, ordered)) or DASH


def runs(analysis: Analysis) -> Spec:
    """Every run; the folder is the last column."""
    rows = [
        [
            r["arm"], exponent(r["budget"]), fixed(r["width"], 0), fixed(r["layers"], 0), si(r["params"]),
            si(r.get("active_params")), si(r["forward_flops"]), si(r["tokens"]), exponent(r["lr"]), fixed(r["seed"], 0),
            r["role"], fixed(r["nats"], 4), fixed(r["bpb"], 4), fixed(r.get("lookahead_bpb"), 4), duration(r["wall_s"]),
            si(r["tokens_per_s"]), si(r["peak_memory_bytes"], "B"), str(r["folder"]),
        ]
        for r in analysis["runs"]
    ]  # fmt: skip
    columns = [
        "arm", "budget", "width", "layers", "parameters", "active", "forward FLOPs per token", "tokens", "rate",
        "seed", "role", "nats per token", "bits per byte", "look-ahead", "time", "tokens/s", "peak memory", "folder",
    ]  # fmt: skip
    return Spec(
        "Every run. Losses are causal; look-ahead is the loss with the routing of training.", columns, rows, (0, 10, 17)
    )


def result_tables(analysis: Analysis) -> list[Spec]:
    """What a study found."""
    return [spec for spec in (optima(analysis), gaps(analysis), equal_loss(analysis), *laws(analysis)) if spec.rows]


def console(analysis: Analysis) -> Group:
    """The results for a terminal, then warnings."""
    tables = [spec.rich() for spec in result_tables(analysis)]
    seen = Text(f"{found_in_train(analysis['corpus'].get('contamination'))}")
    return Group(*tables, seen, *(Text(f"warning: {text}", style="yellow") for text in analysis["warnings"]))


def to_markdown(analysis: Analysis) -> str:
    """The results, what each arm was given, and the limits, to paste into a document."""
    parts = [f"`{analysis['command']}`" if analysis["command"] else ""]
    parts += [f"**Warning:** {text}" for text in analysis["warnings"]]
    for spec in [*result_tables(analysis), rates(analysis)]:
        parts.append(f"{spec.caption}\n\n{markdown_table(spec.columns, spec.rows)}")
    parts.append(f"Held-out text: {found_in_train(analysis['corpus'].get('contamination'))}.")
    parts.append("What this does not show:\n\n" + "\n".join(f"- {text}" for text in analysis["does_not_show"]))
    parts.append(f"Convention: {analysis['convention']}")
    return "\n\n".join(part for part in parts if part) + "\n"
