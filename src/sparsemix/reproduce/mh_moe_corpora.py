"""Perplexity of trained models on the corpora of the multi-head papers, where these lie on this machine."""

from collections.abc import Mapping, Sequence

from sparsemix.report.numbers import DASH, fixed
from sparsemix.report.simple_page import TextTable
from sparsemix.reproduce.base import Lab
from sparsemix.reproduce.peer_corpora import MAX_TOKENS, Corpora
from sparsemix.reproduce.tables import spread

# In the order of the paper's columns.
CORPORA = {"redpajama": "RedPajama", "wikitext": "Wiki", "c4": "C4"}
NO_DATA = "no data here"

# arm -> corpus -> perplexity of every seed.
Scores = dict[str, dict[str, list[float]]]


def score(lab: Lab) -> Scores:
    """Token perplexity of every run on the corpora that local files hold, kept in the run's folder; empty without a
    folder of corpora."""
    if lab.corpora is None:
        return {}
    corpora = Corpora(list(CORPORA), lab.corpora, MAX_TOKENS[lab.scale.name])
    found: Scores = {arm: {name: [] for name in CORPORA} for arm in lab.runs}
    for arm, records in lab.runs.items():
        for record in records:
            lab.say(f"scoring {arm}, seed {record.seed}, on {', '.join(CORPORA.values())}")
            for name, measured in corpora.measure(record, lookahead=False, say=lab.say).items():
                if measured.perplexity is not None:
                    found[arm][name].append(measured.perplexity)
    return found


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
    limit = MAX_TOKENS[lab.scale.name]
    part = f"the first documents within {limit:,} tokens of each source" if limit else "all documents of the suite"
    return (
        f"RedPajama, Wiki and C4: {part}, at the end of training. Perplexity is per token of each model's own "
        "vocabulary, so ours and the paper's are no measure of each other; their order is."
    )
