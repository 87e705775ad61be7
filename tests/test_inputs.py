"""What people write and what files hold: plain values, or one line."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from sparsemix.config import ConfigError, apply_overrides, parse, to_yaml
from sparsemix.data import DataConfig
from sparsemix.errors import DamagedError
from sparsemix.inputs import checked_json, expanded, load_json, load_yaml, read_mapping, read_yaml, tried, trusted
from sparsemix.patterns import expand_blocks
from sparsemix.recipes import settings_of
from sparsemix.settings import RunConfig

sys.path.insert(0, str(Path(__file__).parent / "fuzzing"))

from mutate import BOMB, MERGES, WORDS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2020-01-01", "2020-01-01"),
        ("2020-13-45", "2020-13-45"),
        ("0b_", "0b_"),
        ("12:30", "12:30"),
        ("!!int abc", "abc"),
        ("!!bool maybe", "maybe"),
        ("9" * 5000, "9" * 5000),
        ("{1: 2, yes: no}", {"1": 2, "yes": False}),
        ("[0x10, 1_000, 1.5, ~, on]", [16, 1000, 1.5, None, True]),
        ("{a: &a {x: 1}, b: {<<: *a, y: 2}, c: *a}", {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}),
    ],
)
def test_yaml_holds_what_json_holds_and_words(text, value):
    assert read_yaml(text) == value


def test_what_was_read_is_the_readers_own():
    read_yaml("{a: [1]}")["a"].append(2)
    assert read_yaml("{a: [1]}") == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("&a [*a]", "holds itself"),
        ("&a {x: {y: *a}}", "holds itself"),
        (BOMB, "more than 200000 values"),
        (MERGES, "more than 200000 values"),
        ("[" * 3000, "nested more than 100 deep"),
        ("{a: " * 3000, "nested more than 100 deep"),
        ("{a: 1, a: 2}", "a is given twice"),
        ("{[1]: 2}", "a name must be a word"),
        ("!!python/object/apply:os.getcwd []", "constructor"),
        ("!!binary aGk=", "constructor"),
    ],
    ids=str,
)
def test_other_yaml_is_refused(text, says):
    with pytest.raises(yaml.YAMLError, match=says):
        read_yaml(text)


def test_any_word_as_any_override_is_a_plain_value_or_one_line():
    for word in WORDS:
        try:
            json.dumps(apply_overrides({}, [f"train.lr={word}"]))
        except ConfigError as error:
            assert len(str(error)) < 1000, word[:40]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data=3", "data must hold settings (a mapping), not int"),
        ("model=[1]", "model must hold settings (a mapping), not list"),
        ("train.lr=2020-01-01", "train.lr=2020-01-01 input should be a valid number"),
        ("train.lr=.nan", "train.lr=nan input should be a finite number"),
        ("seed=" + "9" * 30, "seed=0x"),
        ("model.blocks.count=1000000000", "needs count (from 1 to 10000)"),
        ("model.blocks.²=3", "is no part of a pattern"),
        ("d_model=96", "did you mean 'model.d_model'?"),
        ("lr=0.1", "did you mean 'train.lr'?"),
        ("data.text=[x\udce9]", "quote it"),
    ],
)
def test_a_setting_gone_wrong_is_one_line(override, says):
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, settings_of("tiny", [override]))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: recipe.yaml", "must name another recipe, which is not built on this one"),
        ("base: 3", "must name another recipe"),
        ("sizes: [1]", "sizes must be SIZE: {setting.by.path: value}"),
        ("sizes: {a: 1}", "sizes must be"),
        ("model: 3", "model must hold settings"),
        ("[1]", "must hold settings (a mapping), not list"),
        ("model: {blocks: {count: 1000000000, each: {kind: block}}}", "needs count (from 1 to 10000)"),
        ("model: {blocks: {count: 2, each: 3}}", "needs count"),
    ],
)
def test_a_recipe_gone_wrong_is_one_line(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        expand_blocks(settings_of("recipe.yaml", ["model.seq_len=8"])["model"])
    assert says in str(caught.value)


def test_two_recipes_that_are_each_others_base_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("base: b.yaml")
    Path("b.yaml").write_text("base: a.yaml")
    with pytest.raises(ConfigError, match="not built on this one"):
        settings_of("a.yaml")


@pytest.mark.parametrize("held", [b"", b"\xff", b"[" * 100_000, b"[1]", b"9" * 5000, b'{"a": 1'], ids=len)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, held):
    for read, name in ((load_json, "a.json"), (load_yaml, "a.yaml")):
        (tmp_path / name).write_bytes(held)
        with pytest.raises(ConfigError, match=re.escape(name)):
            read(tmp_path / name)
        with pytest.raises(ConfigError, match="no such file"):
            read(tmp_path / f"no-{name}")
    with pytest.raises(ConfigError, match=r"a folder"):
        load_json(tmp_path)


def test_values_of_other_types_name_their_file_and_errors_of_settings_stay():
    for wrong in (lambda: {}["x"], lambda: 3 + "x", lambda: float("x"), lambda: 1 / 0, lambda: None.x):
        with pytest.raises(ConfigError, match=r"result\.json is damaged"), trusted(Path("result.json")):
            wrong()
    with pytest.raises(ConfigError, match=r"^mine$"), trusted(Path("result.json")):
        raise ConfigError("mine")


def test_a_name_that_is_not_utf_8_survives_the_settings_file(tmp_path):
    config = parse(DataConfig, {"text": ("caf\udce9.txt",)})
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert parse(DataConfig, load_yaml(tmp_path / "config.yaml")) == config


def test_a_place_is_tried_before_work_is_done_for_it_and_left_as_it_was(tmp_path):
    (tmp_path / "file").touch()
    for place, folder, says in [
        (tmp_path, False, "is a folder; name a file"),
        (tmp_path / "none" / "a.json", False, "there is no folder"),
        (tmp_path / "file" / "a.json", False, "is no folder"),
        (tmp_path / "file" / "x", True, "is no folder"),
        (Path("/proc/x"), True, "cannot be written"),
        (Path("/proc/x"), False, "cannot be written"),
    ]:
        with pytest.raises(ConfigError, match=says):
            tried(place, "out", folder)
    tried(tmp_path / "a" / "b", "out", folder=True)
    tried(tmp_path / "a.json", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_home_that_nobody_knows_is_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="nobody knows this home"):
        expanded("~nobody-of-this-name/x")


def test_a_value_changed_in_a_file_that_holds_its_checksum_is_damage(tmp_path):
    path, held = tmp_path / "result.json", {"rows": [{"bpb": 1.25, "bad": float("inf"), "name": "ß"}], 3: None}
    path.write_text(checked_json(held))
    assert read_mapping(path) == {"rows": held["rows"], "3": None}
    # Another layout holds the same values, a version that knew no checksum any.
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert read_mapping(path) == {"rows": held["rows"], "3": None}
    path.write_text('{"rows": 3}')
    assert read_mapping(path) == {"rows": 3}
    for spoil in (("1.25", "1.26"), ('"ß"', '"s"'), ("null", "0")):
        text = checked_json(held, ensure_ascii=False)
        assert spoil[0] in text
        path.write_text(text.replace(*spoil))
        with pytest.raises(DamagedError, match=r"result.json is damaged .it is not what was written.; "):
            read_mapping(path)
