"""Perplexity of trained models on the corpora of the multi-head papers, where these lie on this machine."""

from collections.abc import Mapping, Sequence

from sparsemix.evaluate.corpora import read_suite
from sparsemix.evaluate.suite import SuiteOptions, run_suite
from sparsemix.report.numbers import DASH, fixed
from sparsemix.report.records import Record
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Lab
from sparsemix.reproduce.tables import spread
from sparsemix.trained import load

# In the order of the paper's columns.
CORPORA = {"redpajama": "RedPajama", "wikitext": "Wiki", "c4": "C4"}
# Of each source of a corpus; all of it at the larger scales.
TOKENS = {"demo": 10_000, "laptop": 30_000}
NO_DATA = "no data here"

# arm -> corpus -> perplexity of every seed.
Scores = dict[str, dict[str, list[float]]]


def score(lab: Lab) -> Scores:
    """Token perplexity of every run on the corpora that local files hold, kept in the run's suite.json; empty without a
    folder of corpora. Nothing is read from the network."""
    if lab.corpora is None:
        return {}
    corpora = {name: corpus.replace(hub=None) for name, corpus in read_suite("papers", list(CORPORA)).items()}
    options = SuiteOptions(max_tokens=TOKENS.get(lab.scale.name))
    found: Scores = {arm: {name: [] for name in CORPORA} for arm in lab.runs}
    for arm, records in lab.runs.items():
        for record in records:
            lab.say(f"scoring {arm}, seed {record.seed}, on {', '.join(CORPORA.values())}")
            for name, value in _perplexities(lab, record, corpora, options).items():
                found[arm][name].append(value)
    return found


def _perplexities(lab: Lab, record: Record, corpora: Mapping, options: SuiteOptions) -> dict[str, float]:
    trained = load(record.folder)
    assert trained.tokenizer is not None, f"{record.folder} was written without its tokenizer"
    out = record.folder / "suite.json"
    result = run_suite(
        trained.model, trained.tokenizer, corpora, lab.corpora, options, out, lambda *_: None, lambda _: None
    )
    rows = {name: corpus["rows"][0] for name, corpus in result["corpora"].items() if "rows" in corpus}
    values = {name: row["perplexity"]["value"] for name, row in rows.items()}
    return {name: value for name, value in values.items() if value is not None}


def cells(scores: Scores, arm: str) -> list[str]:
    """Ours in the paper's columns: mean and standard deviation over seeds."""
    values = [scores.get(arm, {}).get(name, []) for name in CORPORA]
    return [spread(of, 2) if of else NO_DATA for of in values]


def printed(numbers: Sequence[float] | None) -> list[str]:
    """The paper's three numbers; dashes for a model that it does not have."""
    return [DASH] * len(CORPORA) if numbers is None else [fixed(value, 2) for value in numbers]


def paper_table(
    caption: str,
    models: Mapping[str, Mapping[str, str]],
    scores: Scores,
    paper: Mapping[str, Mapping[str, Sequence[float]]],
) -> TextTable:
    """The paper's table with a row of ours above each of its own. paper: column group -> model -> numbers; models:
    which of our arms stands in which of the groups, for each model in the paper's order."""
    columns = ["model", *(f"{group} {name}".strip() for group in paper for name in CORPORA.values())]
    rows = []
    for model, arms in models.items():
        ours = [cells(scores, arms[group]) if group in arms else [DASH] * len(CORPORA) for group in paper]
        rows.append([f"{model}, here", *(cell for group in ours for cell in group)])
        if any(model in numbers for numbers in paper.values()):
            rows.append([f"{model}, paper", *(cell for of in paper.values() for cell in printed(of.get(model)))])
    return TextTable(caption, columns, rows)


def note(lab: Lab, scores: Scores) -> str:
    """What the columns of the corpora hold."""
    if not scores:
        return (
            "RedPajama, Wiki and C4: no folder of corpora was named (--data-dir or SPARSEMIX_DATA), so only the "
            "study's own text is scored."
        )
    limit = TOKENS.get(lab.scale.name)
    part = f"the first documents within {limit:,} tokens of each source" if limit else "all documents of the suite"
    return (
        f"RedPajama, Wiki and C4: {part}, at the end of training. Perplexity is per token of each model's own "
        "vocabulary, so ours and the paper's are no measure of each other; their order is."
    )
