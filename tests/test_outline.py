"""Settings that are refused before torch is loaded are refused in the same words by the settings themselves."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from sparsemix.cli import early
from sparsemix.cli.outline import run_config
from sparsemix.config import ConfigError, apply_overrides, parse
from sparsemix.layers import LayerConfig
from sparsemix.recipes import recipes, settings_of, sizes_of
from sparsemix.settings import RunConfig

sys.path.insert(0, str(Path(__file__).parent / "fuzzing"))

from mutate import WORDS

BLOCK = "model.blocks.each.ffn."
PATHS = [
    *("model.d_model", "model.seq_len", "model.norm", "model.precision", "model.blocks.each.ffn", "model.blocks.wrap"),
    *(
        "model.blocks",
        "train.lr",
        "train.threads",
        "train.dtype",
        "train.schedule",
        "data.test_fraction",
        "seed",
        "init",
    ),
    *(f"{BLOCK}kind", f"{BLOCK}d_ff", "model.blocks.each.mixer.qk_norm", "model.blocks.each.mixer.rope_scaling", "x"),
]


def told(config, raw) -> str | None:
    try:
        parse(config, raw)
    except ConfigError as error:
        return str(error)
    except NameError:
        return None
    return None


def test_the_outline_knows_every_kind_and_every_setting():
    outline = run_config()
    assert outline is not None
    kinds = outline.model_fields["model"].annotation.model_fields["blocks"].annotation.__args__[0].family
    assert kinds.keys() == LayerConfig.family.keys()
    for name, kind in LayerConfig.family.items():
        assert kinds[name] is not kind
        assert list(kinds[name].model_fields) == list(kind.model_fields)


def test_the_outline_takes_every_packaged_recipe():
    assert run_config() is not None
    for name in recipes():
        size = (sizes_of(name) or [""])[-1]
        early._refuse_settings(f"{name}:{size}" if size else name, (), decided=False)


@pytest.mark.parametrize("recipe", ["tiny", "tiny-mod", "tiny-peer"])
def test_what_the_outline_refuses_the_settings_refuse_in_the_same_words(recipe):
    rng, refused, outline, whole = random.Random(recipe), 0, run_config(), settings_of(recipe)
    for _ in range(75):
        try:
            raw = apply_overrides(whole, [f"{rng.choice(PATHS)}={rng.choice(WORDS)}"])
        except ConfigError:
            continue
        said = told(outline, raw)
        refused += said is not None
        if said is not None:
            assert said == told(RunConfig, raw)
    assert refused > 25


def test_a_refused_setting_loads_no_torch(tmp_path):
    calls = [
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
    ]  # fmt: skip
    code = (
        "import io, sys\nfrom contextlib import redirect_stderr\nfrom sparsemix import cli\n"
        f"for words, says in {calls!r}:\n"
        "    sys.argv, told = ['sparsemix', *words], io.StringIO()\n"
        "    try:\n"
        "        with redirect_stderr(told): cli.main()\n"
        "    except SystemExit as end: assert end.code == 2\n"
        "    assert says in told.getvalue(), told.getvalue()\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()[-600:]
    assert not list(tmp_path.iterdir())
