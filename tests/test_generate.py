"""`sparsemix generate` as a user meets it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from commands import call
from sparsemix import saved, trained
from sparsemix.generation import Sampling
from sparsemix.play import Play
from tiny import BLOCKS, T, prepared, result_of, run_config, unchecked_shapes

GREEDY = ("--temperature", "0", "--max-tokens", "5")
PROMPT = "the cat sees"
# The superuser may write everywhere but into the kernel's own folder.
UNWRITABLE = "/proc/page.html" if sys.platform == "linux" else "/page.html"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a model with Mixture-of-Depths and experts, its data beside it."""
    place = tmp_path_factory.mktemp("runs")
    data, shards = prepared(place)
    with unchecked_shapes():
        result_of(run_config(data, [*BLOCKS["mod"], *BLOCKS["moe"][1:]], steps=6), place / "run", shards)
    return place / "run"


@pytest.fixture
def generate(monkeypatch, capsys):
    return lambda *args: call(monkeypatch, capsys, "generate", *args)


def test_text_goes_to_standard_output_and_what_it_cost_to_standard_error(run, generate):
    before = sorted(run.rglob("*"))
    code, out, err = generate(run, "--prompt", PROMPT, *GREEDY)
    assert code == 0 and out.startswith(PROMPT) and out.endswith("\n") and len(out) > len(PROMPT) + 2
    said = re.fullmatch(
        r"(\d) tokens, [\d.]+.tokens/s; routed: blocks\.1 ([\d.]+).%; keys and values ([\d.]+).k?B, "
        r"([\d.]+).% of a dense model's; ended by (.*)\n",
        err,
    )
    assert said and int(said[1]) <= 5
    # Keys of a routed block are a third of all.
    assert float(said[4]) == pytest.approx((2 + float(said[2]) / 100) / 3 * 100, abs=0.1)
    assert sorted(run.rglob("*")) == before, "without --show or --html nothing is written"
    assert generate(run, "--prompt", PROMPT, *GREEDY)[1] == out


def test_a_saved_models_folder_and_a_prompt_file_give_the_same_text(run, generate, tmp_path):
    model = trained.load(run)
    saved.write(model.model, tmp_path / "model", model.tokenizer)
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    wanted = generate(run, "--prompt", PROMPT, *GREEDY)[1]
    _, text, err = generate(tmp_path / "model", "--prompt-file", tmp_path / "prompt.txt", *GREEDY)
    assert text == wanted and "read: 1 file, 12 bytes, 1 document, " in err


def test_a_prompt_may_come_from_a_pipe(run, generate, monkeypatch):
    wanted = generate(run, "--prompt", PROMPT, *GREEDY)[1]
    for words in ((), ("--prompt-file", "-")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode())))
        assert generate(run, *words, *GREEDY)[:2] == (0, wanted)


def test_show_routing_numbers_the_tokens_in_a_pipe_and_writes_the_page(run, generate, tmp_path):
    plain = generate(run, "--prompt", PROMPT, *GREEDY)[1]
    code, out, err = generate(run, "--prompt", PROMPT, *GREEDY, "--show", "routing", "--html", tmp_path / "page.html")
    assert code == 0 and re.sub(r"\[\d\]", "", out) == plain and re.match(r"\[[23]\]", out)
    assert "[n] before a token: n of 3 blocks" in err and f"page: {tmp_path / 'page.html'}" in err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('name="token"') >= 5 and "blocks.1" in page and "blocks.2.ffn" in page
    assert not (run / "generation.html").exists()
    assert generate(run, "--prompt", PROMPT, *GREEDY, "--show", "routing")[0] == 0
    assert (run / "generation.html").is_file()
    (run / "generation.html").unlink()


def test_the_text_is_the_same_with_routing_shown_or_not_and_tells_of_every_token(run):
    told = {}
    for routing in (False, True):
        play = Play(run, PROMPT, 6, Sampling(seed=5), routing)
        told[routing] = list(play.tokens())
        assert "".join(token["text"] for token in told[routing]).startswith(PROMPT)
        assert play.cache.seen.tolist() == [len(told[routing]) - (not routing and play.ended == "max_tokens=6")]
    for plain, routed in zip(told[False], told[True], strict=True):
        assert routed["blocks"] in (2, 3) and {"blocks.1", "blocks.2.ffn"} <= set(routed["layers"])
        assert {name: routed[name] for name in plain} == pytest.approx(plain)
    json.dumps(play.record(), allow_nan=False)


def test_generation_ends_at_the_models_context_and_says_so(run, generate):
    code, _, err = generate(run, "--prompt", PROMPT, "--max-tokens", "500", "--seed", "1")
    assert code == 0 and (f"ended by the model's context, seq_len={T}" in err or "ended by the end of the text" in err)
    play = Play(run, PROMPT, 500, Sampling(), False)
    assert play.room == T - play.prompt_tokens


BAD = [
    (("--prompt", ""), "the prompt is empty"),
    ((), "the prompt is empty"),
    (("--prompt", "a\udce9"), "prompt is not UTF-8 at byte 1"),
    (("--prompt", "\ud800"), "prompt is not UTF-8 at byte 0"),
    (("--prompt", "a", "--prompt-file", "b"), "give either --prompt or --prompt-file"),
    (("--prompt-file", "nowhere.txt"), "prompt-file=nowhere.txt: no such file"),
    (("--prompt", "the red hat " * 99), f"must be shorter than the model's context, seq_len={T}"),
    (("--prompt", "a", "--temperature", "-1"), "temperature=-1"),
    (("--prompt", "a", "--top-p", "1.5"), "top_p=1.5"),
    (("--prompt", "a", "--top-p", "0"), "top_p=0"),
    (("--prompt", "a", "--top-k", "0"), "top_k=0"),
    (("--prompt", "a", "--temperature", "nan"), "temperature=nan"),
    (("--prompt", "a", "--html", "nowhere/page.html"), "there is no folder nowhere"),
    (("--prompt", "a", "--html", "."), "is a folder; name a file"),
    (("--prompt", "a", "--html", UNWRITABLE), "cannot be written"),
]


@pytest.mark.parametrize(("args", "says"), BAD, ids=[says for _, says in BAD])
def test_what_a_user_gets_wrong_is_one_line_and_nothing_is_written(run, generate, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    code, out, err = generate(run, *args)
    assert code == 2 and out == "" and says in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [] and not (run / "generation.html").exists()


def test_a_folder_that_is_no_model_or_has_no_tokenizer_is_refused(run, generate, tmp_path):
    code, out, err = generate(tmp_path, "--prompt", "a")
    assert code == 2 and "is no model" in err and err.count("\n") == 1 and out == ""
    saved.write(trained.load(run).model, tmp_path / "bare")
    code, out, err = generate(tmp_path / "bare", "--prompt", "a")
    assert code == 2 and "holds no tokenizer" in err and err.count("\n") == 1 and out == ""


def test_a_prompt_that_is_not_text_is_refused(run, generate, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, _, err = generate(run, "--prompt-file", tmp_path / "latin.txt")
    assert code == 2 and "is not UTF-8 at byte 3" in err


def test_ctrl_c_ends_the_line_and_leaves_no_page(run, monkeypatch, capsys, tmp_path):
    tokens = Play.tokens

    def interrupted(self):
        for number, token in enumerate(tokens(self)):
            if number == 3:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Play, "tokens", interrupted)
    code, out, err = call(monkeypatch, capsys, "generate", run, "--prompt", PROMPT, "--html", tmp_path / "page.html")
    assert code == 130 and out.endswith("\n") and "interrupted" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error(run):
    command = (
        f"{sys.executable} -c 'from sparsemix.cli import main; main()' generate {run} --prompt 'the cat' | head -c 3"
    )
    if shutil.which("bash") is None:
        pytest.skip("needs bash for its pipefail")
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=os.environ, check=False
    )
    assert ended.stdout == "the" and ended.returncode == 0 and "Traceback" not in ended.stderr
