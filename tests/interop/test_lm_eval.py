"""lm-evaluation-harness on our models: its tasks of every kind, offline, and the same numbers as the suites."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsemix import cli, saved
from sparsemix.api import build_model
from sparsemix.config import ConfigError
from sparsemix.data.tokenizer import train_tokenizer
from sparsemix.evaluate.sliding import score
from sparsemix.evaluate.suite import SuiteOptions, run_suite
from tiny import BLOCKS, D, V

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'sparsemix[eval]'")
# The harness and what it imports warn of themselves.
pytestmark = [pytest.mark.usefixtures("unchecked"), pytest.mark.filterwarnings("ignore")]

SEQ_LEN = 12
TEXTS = [f"the {a} dog sees {n} of the {b} hats in a box that it found there" for a, b, n in zip(
    ("red", "old", "big", "sad", "new"), ("blue", "odd", "red", "flat", "tall"), range(3, 8), strict=True)]  # fmt: skip
KINDS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["a hat", "the old dog"]
doc_to_target: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "own_last_word": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]
""",
    "own_answer": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "a box"
generation_kwargs: {until: ["."], do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


TOO_LONG = {
    "long_choice": KINDS["own_choice"].replace("the old dog", " and ".join(["a hat"] * 40)),
    "long_answer": KINDS["own_answer"].replace("{until", "{max_gen_toks: 12, until"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 4, V)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    # Read by these libraries when they are first imported; there is no network in tests in any case.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, rest in (KINDS | TOO_LONG).items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{rest}")
    return folder


def model_of(kind):
    settings = {"d_model": D, "vocab_size": V, "seq_len": SEQ_LEN, "blocks": BLOCKS[kind]}
    model = build_model(settings)
    for name, parameter in model.named_parameters():
        if name.endswith("predictor.down.weight"):
            parameter.data *= 40
    return model.eval()


@pytest.mark.parametrize("kind", ["moe", "mod"])
def test_all_kinds_of_requests_give_the_suites_numbers(kind, tokenizer, tasks, tmp_path):
    from sparsemix.interop.harness import run_tasks

    model = model_of(kind)
    found = run_tasks(model, tokenizer, list(KINDS), tasks)
    ids = [np.array(tokenizer.encode(text).ids) for text in TEXTS]
    assert min(map(len, ids)) > SEQ_LEN
    nats = score(model, ids, 0, SEQ_LEN, SEQ_LEN).nats.sum()
    words, num_bytes = sum(len(t.split()) for t in TEXTS), sum(len(t.encode()) for t in TEXTS)
    rolling = {name: value["value"] for name, value in found["own_rolling"]["metrics"].items()}
    assert rolling["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert rolling["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    # The suite's last word is the harness's too.
    (tmp_path / "c.yaml").write_text("about: a\nlicence: b\nfiles: [texts.jsonl]\nlast_word: true\n")
    from sparsemix.evaluate.corpora import read_suite

    corpora = read_suite(str(tmp_path / "c.yaml"))
    result = run_suite(
        model, tokenizer, corpora, tasks, SuiteOptions(), tmp_path / "e.json", lambda *_: None, lambda _: None
    )
    last, of_task = result["corpora"]["c"]["rows"][0]["last_word"], found["own_last_word"]["metrics"]
    assert of_task["perplexity"]["value"] == pytest.approx(last["perplexity"]["value"], rel=1e-5)
    assert of_task["acc"]["value"] == last["accuracy"]["value"]
    assert 0 <= found["own_choice"]["metrics"]["acc"]["value"] <= 1
    assert found["own_answer"]["metrics"]["exact_match"]["value"] == 0
    assert {task["samples"] for task in found.values()} == {len(TEXTS)}


@pytest.mark.parametrize(("task", "room"), [("long_choice", 12), ("long_answer", 11)])
def test_an_answer_longer_than_the_context_is_named_as_the_cause(task, room, tokenizer, tasks):
    from sparsemix.interop.harness import run_tasks

    told = rf"^tasks={task}: seq_len=12 has room for an answer of {room} tokens, and a task has one of \d+; leave that"
    with pytest.raises(ConfigError, match=told):
        run_tasks(model_of("dense"), tokenizer, [task], tasks)


def test_the_command_runs_tasks_and_saves_them_beside_the_suites(tokenizer, tasks, tmp_path, monkeypatch, capsys):
    saved.write(model_of("dense"), tmp_path / "model", tokenizer)
    asked = ["sparsemix", "eval", str(tmp_path / "model"), "--include-path", str(tasks), "--limit", "2"]
    monkeypatch.setattr(sys, "argv", [*asked, "--tasks", "own_choice,own_rolling", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    result = json.loads(capsys.readouterr().out)
    assert list(result["tasks"]) == ["own_choice", "own_rolling"]
    assert {task["samples"] for task in result["tasks"].values()} == {2}
    assert json.loads((tmp_path / "model" / "eval.json").read_text())["tasks"] == result["tasks"]
    monkeypatch.setattr(sys, "argv", [*asked, "--tasks", "own_last_word", "--num-fewshot", "1"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "own_last_word" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "model" / "eval.json").read_text())["tasks"]) == 3


def test_an_unknown_task_or_folder_is_one_line_that_says_how_to_list_them(tokenizer, tasks, monkeypatch):
    from sparsemix.interop import harness

    # Without the harness's own tasks, whose index takes seconds to read.
    manager = harness.TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)
    with pytest.raises(ConfigError, match=r"did you mean 'own_choice'\?; `lm_eval ls tasks` lists them"):
        harness.run_tasks(model_of("dense"), tokenizer, ["own_choise"], tasks)
    with pytest.raises(ConfigError, match="include_path=nowhere is no folder"):
        harness.run_tasks(model_of("dense"), tokenizer, ["own_choice"], Path("nowhere"))


def test_a_task_whose_data_are_not_there_is_one_line(tokenizer, tasks, tmp_path):
    from sparsemix.interop.harness import run_tasks

    (tmp_path / "gone.yaml").write_text((tasks / "own_choice.yaml").read_text().replace("own_choice", "gone").replace(
        "texts.jsonl", "gone.jsonl"))  # fmt: skip
    with pytest.raises(ConfigError, match="tasks=gone cannot be run") as error:
        run_tasks(model_of("dense"), tokenizer, ["gone"], tmp_path)
    assert "\n" not in str(error.value)


def test_the_harness_own_command_runs_a_saved_model(tokenizer, tasks, tmp_path, monkeypatch):
    """What `lm_eval --model hf --model_args pretrained=DIR` does."""
    import lm_eval

    from sparsemix.interop.hf import SparsemixForCausalLM, wrap_tokenizer

    model = model_of("mod")
    SparsemixForCausalLM.wrap(model).save_pretrained(tmp_path)
    wrap_tokenizer(tokenizer, SEQ_LEN).save_pretrained(tmp_path)
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={tmp_path}",
        tasks=["own_rolling"],
        device="cpu",
        batch_size=2,
        task_manager=manager,
    )
    ids = [np.array(tokenizer.encode(text).ids) for text in TEXTS]
    nats = score(model, ids, 0, SEQ_LEN, SEQ_LEN).nats.sum()
    wanted = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert found["results"]["own_rolling"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-5)
