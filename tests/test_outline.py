"""Settings that are refused before torch is loaded are refused in the same words by the settings themselves."""

import random
import sys
from contextlib import suppress
from pathlib import Path

import pytest

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


def test_the_outline_gives_every_packaged_recipe_the_steps_of_the_settings():
    outline, known = run_config(), 0
    for name in recipes():
        size = (sizes_of(name) or [""])[-1]
        raw = settings_of(f"{name}:{size}" if size else name)
        raw["data"] = {"vocab_size": raw["model"]["vocab_size"], **raw.get("data", {})}
        with suppress(NameError):
            assert parse(outline, raw).steps == parse(RunConfig, raw).steps
            known += 1
    assert known > 9


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
