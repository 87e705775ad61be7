"""One self-contained page of a generated text: every token, the blocks that processed it, what its routers said.

No script: tokens are radio buttons, so that a pointer, arrow keys and a screen reader reach each of them."""

from collections import Counter
from pathlib import Path
from typing import Any

from sparsemix.report.numbers import SPACE, Markup, escape, fixed, percent, si
from sparsemix.report.page import join, listed, paragraph, render
from sparsemix.report.shades import DARK, LIGHT, shade
from sparsemix.report.tables import table

# Experts of one layer that can be marked: those with the most tokens.
MARKED_EXPERTS = 12
READING = (
    "A token is coloured by how many blocks processed it. Blocks without Mixture-of-Depths process every token; tokens "
    "without a colour passed those alone.",
    "The routing is that of the token itself, known once the model has read it: it decides how much work goes into "
    "predicting the token after it.",
    "The gate of Mixture-of-Depths multiplies the block's update. For a token that went past the block it is the gate "
    "it would have had. A predictor above 0 lets the token in.",
    "Of a token's experts those with the largest gates are listed. Gates of the same expert found by several heads are "
    "added. In a multi-head mixture every sub-token has experts of its own.",
    "Log-probabilities are the model's own, before temperature and cuts, in nats.",
    "Every layer kept to its causal rule: no token's routing saw a later token.",
)


def generation_page(record: dict[str, Any]) -> str:
    """The page of one text; `record` is what `sparsemix generate` gathered."""
    css = Path(__file__).with_name("generation.css").read_text(encoding="utf-8") + _shades(record) + _mark_rules(record)
    tokens = record["tokens"]
    written = sum(not token["prompt"] for token in tokens)
    sections = [
        ("text", "Text", join(_scale(record), _marks(record), _text(record))),
        ("layers", "Routed layers", _layers(record)),
        ("run", "Run", _run(record)),
        ("reading", "How to read this", listed(READING)),
    ]
    byline = f"{len(tokens) - written} tokens of prompt, {written} generated"
    return render(f"Routing of a text: {record['run']}", byline, sections, css)


def _levels(record: dict[str, Any]) -> range:
    return range(record["least"], record["most"] + 1)


def _shades(record: dict[str, Any]) -> str:
    rules = {"light": ["--b: transparent; --f: var(--ink);"], "dark": ["--b: transparent; --f: var(--ink);"]}
    levels = _levels(record)
    for name, ramp in (("light", LIGHT), ("dark", DARK)):
        for n in levels[1:]:
            ground, ink = shade((n - levels[0]) / (levels[-1] - levels[0]), ramp)
            rules[name].append(f"--b: {ground}; --f: {ink};")
    css = {
        name: "".join(f".n{n} {{ {rule} }}\n" for n, rule in zip(levels, said, strict=True))
        for name, said in rules.items()
    }
    return f"{css['light']}@media screen and (prefers-color-scheme: dark) {{\n{css['dark']}}}\n"


def _scale(record: dict[str, Any]) -> Markup:
    most = record["most"]
    if len(_levels(record)) == 1:
        return paragraph(f"Every token passes all {most} blocks: no block is routed.")
    items = "".join(f'<li><span class="t n{n}">{n}</span></li>' for n in _levels(record))
    return Markup(
        f'<ul class="scale" aria-label="Scale"><li>Blocks that processed a token, of {most}:</li>{items}'
        '<li><span class="t p">underlined</span>: the prompt</li></ul>'
    )


def _groups(record: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, set[int]]]]]:
    """What can be marked, by layer: (css class, name, numbers of the tokens)."""
    depths: list[tuple[str, str, set[int]]] = []
    groups = [("Mixture-of-Depths in", depths)]
    for i, layer in enumerate(record["layers"]):
        said = [token["layers"].get(layer["path"]) for token in record["tokens"]]
        if layer["experts"] is None:
            taken = {t for t, one in enumerate(said) if one and one["routed"]}
            depths.append((f"x{i}", f"{layer['path']}{SPACE}({len(taken)})", taken))
            continue
        by: dict[int, set[int]] = {}
        for t, one in enumerate(said):
            for part in one["experts"] if one else []:
                for expert, _ in part:
                    by.setdefault(expert, set()).add(t)
        most = sorted(by, key=lambda e: (-len(by[e]), e))[:MARKED_EXPERTS]
        named = [(f"x{i}-{e}", f"expert{SPACE}{e}{SPACE}({len(by[e])})", by[e]) for e in sorted(most)]
        groups.append((f"{layer['path']}:", named))
    return [group for group in groups if group[1]]


def _marks(record: dict[str, Any]) -> Markup:
    groups = _groups(record)
    if not groups:
        return Markup("")
    parts = ['<label><input type="radio" name="mark" id="mark-none" checked="" />nothing</label>']
    for heading, marks in groups:
        labels = "".join(
            f'<label><input type="radio" name="mark" id="mark-{css}" aria-label="{escape(heading)} {escape(name)}" />'
            f"{escape(name)}</label>"
            for css, name, _ in marks
        )
        parts.append(f'<span class="group">{escape(heading)} {labels}</span>')
    return Markup(
        '<details class="marks"><summary>Mark the tokens of a layer or an expert</summary><fieldset>'
        f'<legend class="note">Taken by (so many tokens):</legend>{"".join(parts)}</fieldset></details>'
    )


def _mark_rules(record: dict[str, Any]) -> str:
    rules = []
    for _, marks in _groups(record):
        for css, _, _ in marks:
            on = f"main:is(:has(#mark-{css}:checked), :has(label:hover > #mark-{css})) .words"
            rules.append(f"{on} .t:not(.{css}) {{ --b: transparent; --f: var(--soft); }}\n")
            rules.append(f"{on} .t.{css} {{ box-shadow: 0 3px 0 var(--c2); }}\n")
    return "".join(rules)


def _text(record: dict[str, Any]) -> Markup:
    classes: list[list[str]] = [[f"n{token['blocks']}"] for token in record["tokens"]]
    for _, marks in _groups(record):
        for css, _, numbers in marks:
            for t in numbers:
                classes[t].append(css)
    first = next((i for i, token in enumerate(record["tokens"]) if not token["prompt"]), 0)
    parts = []
    for i, token in enumerate(record["tokens"]):
        css = " ".join(["t", *(["p"] if token["prompt"] else []), *classes[i]])
        name = f"{spoken(token)}, {token['blocks']} of {record['most']} blocks"
        chosen = 'checked="" ' if i == first else ""
        box = (
            f'<input type="radio" name="token" id="t{i}" aria-label="{escape(name)}" aria-describedby="d{i}" {chosen}/>'
        )
        parts.append(
            f'<label class="{css}">{box}{_shown(token)}<sub>{token["blocks"]}</sub>{_detail(record, i)}</label>'
        )
    return Markup(
        '<fieldset class="tokens"><legend class="note">Point at a token, or go from one to the next with the arrow '
        f'keys.</legend><div class="words">{"".join(parts)}</div></fieldset>'
    )


def spoken(token: dict[str, Any]) -> str:
    """A token in words, for what has no glyphs of its own."""
    text = token["text"]
    if not text:
        return token["name"]
    if text.isspace():
        return ", ".join({" ": "space", "\n": "line break", "\t": "tab"}.get(c, f"U+{ord(c):04X}") for c in text)
    return text.strip()


def _shown(token: dict[str, Any]) -> str:
    if not token["text"]:
        # A special token, or a part of a character that a later token completes.
        return f'<span class="seen">⟨{escape(token["name"])}⟩</span>'
    return escape(token["text"]).replace("\n", '<span class="seen">↵</span>\n')


def _detail(record: dict[str, Any], i: int) -> str:
    token = record["tokens"][i]
    logprob = token["logprob"]
    facts = [
        f"<b>{escape(spoken(token))}</b>",
        f"token {i}, id {token['id']}",
        "prompt" if logprob is None else f"log-probability {fixed(logprob, 2)}",
        f"{token['blocks']} of {record['most']} blocks",
    ]
    rows = []
    for layer in record["layers"]:
        said = token["layers"].get(layer["path"])
        name = f"<b>{escape(layer['path'])}</b>"
        if said is None:
            rows.append(f'<span class="off">{name}: not reached</span>')
        elif layer["experts"] is None:
            took = "processed it" if said["routed"] else "went past it"
            guess = f", predictor {fixed(said['guess'], 2)}" if "guess" in said else ""
            numbers = f"gate {fixed(said['gate'], 2)}, score {fixed(said['score'], 2)}{guess}"
            rows.append(f'<span class="{"on" if said["routed"] else "off"}">{name}: {took} ({numbers})</span>')
        else:
            rows.append(f"<span>{name}: {_experts(said)} of {layer['experts']} experts</span>")
    body = f'<span class="rows">{"".join(rows)}</span>' if rows else ""
    return f'<span class="d" id="d{i}"><span>{" · ".join(facts)}</span>{body}</span>'


def _experts(said: dict[str, Any]) -> str:
    parts = []
    for number, (picks, others) in enumerate(zip(said["experts"], said["others"], strict=True)):
        shown = ", ".join(f"{e}{SPACE}({fixed(gate, 2)})" for e, gate in picks) or "none"
        more = f" and {others} more" if others else ""
        parts.append((f"sub-token {number}: " if len(said["experts"]) > 1 else "") + shown + more)
    return "; ".join(parts)


def _layers(record: dict[str, Any]) -> Markup:
    depth, experts = [], []
    for layer in record["layers"]:
        pairs = [(token["prompt"], token["layers"].get(layer["path"])) for token in record["tokens"]]
        if layer["experts"] is None:
            shares = [
                _share([bool(said and said["routed"]) for p, said in pairs if p in of]) for of in ([True], [False])
            ]
            gates = [said["gate"] for _, said in pairs if said and said["routed"]]
            mean = fixed(sum(gates) / len(gates), 2) if gates else None
            depth.append([layer["path"], *(percent(share) for share in shares), mean])
            continue
        told = [said for _, said in pairs if said]
        picks = Counter(e for said in told for part in said["experts"] for e, _ in part)
        most = ", ".join(f"{e}{SPACE}({n})" for e, n in picks.most_common(5))
        experts.append([layer["path"], layer["kind"], layer["experts"], len(told), len(picks), most or None])
    parts = []
    if depth:
        heads = ["layer", "of the prompt", "of what was generated", "mean gate"]
        parts.append(table("Mixture-of-Depths: tokens that the layer processed.", heads, depth))
    if experts:
        caption = "Experts: among each token's listed ones, those with the most picks."
        heads = ["layer", "kind", "experts", "tokens", "listed", "most picks"]
        parts.append(table(caption, heads, experts, text=[1, 5]))
    return join(*parts) if parts else paragraph("This model has no routed layer.")


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _run(record: dict[str, Any]) -> Markup:
    held, dense = record["kv_bytes"], record["kv_dense_bytes"]
    facts = [
        *record["settings"].items(),
        ["speed", f"{si(record['tokens_per_s'])} tokens/s"],
        ["keys and values", f"{si(held, 'B')}, {percent(held / dense)} of {si(dense, 'B')} without routing"],
        ["ended by", record["ended"]],
    ]
    return table("How this text came to be.", ["what", "value"], [list(fact) for fact in facts], text=[1])
