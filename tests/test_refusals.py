"""What can be refused without torch is refused before it is loaded, in one line, and leaves nothing."""

import subprocess
import sys
import textwrap

BLOCK = "model.blocks.each.ffn."
ANSWERED = [[], ["--version"], ["recipes"], ["reproduce", "--list"], ["train", "--help"]]
REFUSED = [
    (["foo"], "no such command 'foo'"),
    (["train", "--foo"], "no such option"),
    (["train", "tinny"], "did you mean 'tiny'"),
    (["train", "tiny", "train.lr"], "must look like setting.name=value"),
    (["train", "tiny", "data=3"], "data must hold settings"),
    (["train", "tiny", "--out", "/proc/x"], "cannot be written"),
    (["train", "tiny", "--text", "none.txt"], "none.txt: no such file"),
    (["compare", "--out", "out", "--recipe", "tinny"], "did you mean 'tiny'"),
    (["compare", "--out", "out", "--set", "a"], "must look like"),
    (["compare", "--out", "/proc/x"], "cannot be written"),
    (["isoflop", "--out", "out", "--budgets", "x"], "must be FLOPs"),
    (["isoflop", "--out", "out", "--budgets", "1e9", "--recipe", "tinny"], "did you mean 'tiny'"),
    (["reproduce"], "name a table or figure"),
    (["status", "none"], "holds no runs"),
    (["report", "none"], "no such folder"),
    (["generate", "none", "--prompt", "x"], "no such folder"),
    (["generate", ".", "--prompt", "x"], "is no model"),
    (["eval", "none"], "no such folder"),
    (["inspect", "none"], "no such folder"),
    (["export", "none", "--to", "out"], "no such folder"),
    (["convert", "none", "--to", "out"], "no such folder"),
    (["train", "tiny", "model.d_modl=3"], "did you mean 'd_model'?"),
    (["train", "tiny", "train.lr=abc"], "train.lr=abc input should be a valid number"),
    (["train", "tiny", "model.blocks.1.ffn.kind=pear"], "did you mean 'peer'?"),
    (["train", "tiny", *(f"{BLOCK}{s}" for s in ("kind=moe", "num_experts=4", "d_ff=8","top_k=9"))], "must lie"),
    (["train", "tiny", "model.precision=ternery"], "did you mean 'ternary'?"),
    (["compare", "--out", "out", "--set", "d_model=96"], "did you mean 'model.d_model'?"),
    (["isoflop", "--out", "out", "--budgets", "1e9", "--set", "train.dtype=x"], "train.dtype=x"),
    (["isoflop", "--out", "out", "--budgets", "1e9,1e9"], "must name each budget once"),
    (["isoflop", "--out", "out", "--budgets", "1e9", "--kinds", "dense,pear"], "did you mean 'peer'?"),
    (["compare", "--out", "out", "--kinds", "dense,pear"], "did you mean 'peer'?"),
    (["compare", "--out", "out", "--kinds", "dense,mod+mod"], "mod wraps blocks once"),
    (["compare", "--out", "out", "--budget", "auto:0s"], "must give a time above 0"),
    (["compare", "--out", "out", "--set", "train.lr=1"], "--lr decides train.lr"),
    (["compare", "--out", "out", "--launcher", "rey"], "did you mean 'ray'?"),
    (["compare", "--out", "out", "--launch", "thread=1"], "did you mean 'threads'?"),
    (["compare", "--out", "out", "--track", "foo"], "track=foo is none of"),
    (["train", "tiny", "--track", "foo"], "track=foo is none of"),
    (["train", "--text", "stdlib"], "name a recipe"),
    (["train", "train.lr=1"], "train.lr=1 is a setting, where the recipe belongs; name a recipe"),
    (["train", "tiny", "--text", ""], "text= is empty"),
    (["train", "--init-from", "."], "is no model"),
    (["inspect", "."], "is no run folder"),
    (["train", "tiny", "model.d_model=65"], "must give every head an even width"),
    (["train", "tiny", "train.budget_flops=1"], "is less than one step"),
    (["train", "tiny", "--text", "*.none"], "the glob matches no supported file"),
    (["train", "tiny", "--text", "hf:a:b:c"], "must look like hf:NAME:SPLIT"),
    (["compare", "--out", "out", "--budget", "1"], "is less than one step"),
    (["compare", "--out", "out", "--set", "model.d_model=65"], "must give every head an even width"),
    (["compare", "--out", "out", "--text", "*.none"], "the glob matches no supported file"),
    (["isoflop", "--out", "out", "--budgets", "1e9", "--text", "hf:x"], "must look like hf:NAME:SPLIT"),
    (["reproduce", "foo"], "name=foo is none of"),
    (["reproduce", "peer-table2", "--scale", "foo"], "scale=foo input should be"),
    (["reproduce", "peer-table2", "--text", "*.none"], "the glob matches no supported file"),
    (["reproduce", "peer-table2", "--launcher", "rey"], "did you mean 'ray'?"),
    (["kinds", "pear"], "did you mean 'peer'?"),
    (["parity", "--d-model", "0"], "d_model=0 must be at least 1"),
    (["train", "tiny", "train.threads=0"], "train.threads=0 input should be 'auto' or greater than or equal to 1"),
    (["train", "tiny", "train..lr=3"], "override 'train..lr=3' must look like setting.name=value"),
    (["compare", "--out", "out", "--launch", "foo=1"], "no setting here (known: workers, threads, memory_gib)"),
    (["compare", "--out", "out", "--launch", "kind=ray"], "launch=kind=ray would have no effect"),
    (["train", "tiny", "--out", "foreign"], "foreign is not empty and holds no run"),
    (["compare", "--out", "foreign"], "foreign is not empty and holds no comparison"),
    (["isoflop", "--out", "foreign", "--budgets", "1e12"], "foreign is not empty and holds no study"),
    (["reproduce", "peer-table2", "--out", "foreign"], "foreign is not empty and holds no study"),
    (["export", "foreign", "--to", "foreign"], "foreign is no model"),
    (["export", "model", "--to", "foreign"], "to=foreign is not empty"),
    (["convert", "model", "--to", "foreign"], "to=foreign is not empty"),
    (["convert", "model", "--to", "out", "--ffn", "pear"], "did you mean 'peer'?"),
    (["convert", "model", "--to", "out", "--text", "none"], "none: no such file"),
    (["eval", "model", "--suite", "paper"], "did you mean 'papers'?"),
    (["eval", "model", "--stride", "0"], "stride=0 input should be"),
    (["generate", "model", "--prompt", "x", "--top-p", "3"], "top_p=3"),
]  # fmt: skip


def test_answers_and_refusals_load_no_torch_and_leave_nothing(tmp_path):
    places = [tmp_path / "foreign" / "letter.doc", tmp_path / "model" / "config.json"]
    for place in places:
        place.parent.mkdir()
        place.write_text("{}")
    calls = [*((words, 0, "") for words in ANSWERED), *((words, 2, says) for words, says in REFUSED)]
    code = f"""
        import io, sys
        from contextlib import redirect_stderr, redirect_stdout
        from sparsemix.cli.app import run
        for words, code, says in {calls!r}:
            sys.argv, told = ["sparsemix", *words], io.StringIO()
            try:
                with redirect_stderr(told), redirect_stdout(io.StringIO()): run()
            except SystemExit as end: assert end.code == code, (words, end.code, told.getvalue())
            told = told.getvalue()
            assert says in told and told.count("\\n") == (code > 0), (words, told)
            heavy = {{"torch", "transformers", "datasets", "matplotlib"}} & set(sys.modules)
            assert not heavy, (words, heavy)
    """
    script = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(script, cwd=tmp_path, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()[-600:]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == places
