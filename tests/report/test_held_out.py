"""Every report says how much of the held-out text stands in the training text, and what to beware of."""

import io
import json

from made_records import made_study
from rich.console import Console

from sparsemix.report import study_tables
from sparsemix.report.console import tables
from sparsemix.report.held_out import found_in_train
from sparsemix.report.isoflop import analyse
from sparsemix.report.markdown import to_markdown
from sparsemix.report.page import write_report
from sparsemix.report.study_page import write_study

MEASURED = {"test": 0.6123, "validation": 0.043, "window": 20, "windows": {"test": 900, "validation": 800}}
SAID = "61.2 % of the test split's windows of 20 tokens stand word for word in the training text (validation 4.3 %)"
WARNED = "61% of the test split's windows stand in train"


def plain(text):
    return " ".join(text.replace("\u00a0", " ").replace("&#x27;", "'").split())


def shown(drawn):
    console = Console(file=io.StringIO(), width=400)
    with console.capture() as said:
        console.print(drawn)
    return plain(said.get())


def test_a_comparison_says_it_on_its_page_in_markdown_and_on_the_terminal(result, tmp_path):
    result["corpus"] |= {"contamination": MEASURED}
    result["warnings"] = [WARNED]
    for row in result["rows"]:
        row["routing"]["predictor"] = {}
    write_report(result, tmp_path / "report.html")
    for text in ((tmp_path / "report.html").read_text(), to_markdown(result), shown(tables(result))):
        assert SAID in plain(text) and WARNED in plain(text)


def test_a_study_says_it_on_its_page_in_markdown_and_on_the_terminal(tmp_path):
    records = made_study(folder=tmp_path)
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"contamination": MEASURED, "warnings": [WARNED]}
    path.write_text(json.dumps(manifest))
    analysis = analyse(records, resamples=50)
    page = write_study(analysis, tmp_path, records)
    for text in (page.read_text(), study_tables.to_markdown(analysis), shown(study_tables.console(analysis))):
        assert SAID in plain(text) and WARNED in plain(text)


def test_reports_of_earlier_texts_say_that_it_was_not_measured():
    assert "was not measured" in found_in_train(None) and "was not measured" in found_in_train({})
