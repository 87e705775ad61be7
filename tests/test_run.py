import json
import os

import pytest
import yaml

from sparsemix import run as run_module
from sparsemix.config import ConfigError, config_hash, parse, to_yaml
from sparsemix.durable import write_atomic
from sparsemix.provenance import hardware, versions
from sparsemix.run import Run, refuse_other
from sparsemix.settings import RunConfig
from tiny import run_config, write_corpus


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").mkdir()
    return run_config(write_corpus(tmp_path / "text"), "nested")


def test_settings_read_back_to_an_equal_config(config, tmp_path):
    Run(tmp_path / "run", config)
    assert parse(RunConfig, Run(tmp_path / "run").settings) == config


def test_other_settings_are_refused_and_the_same_ones_open_the_run_again(config, tmp_path):
    Run(tmp_path / "run", config).log(step=1, loss=2.0)
    assert [line["step"] for line in Run(tmp_path / "run", config).metrics()] == [1]
    with pytest.raises(ConfigError, match="holds a run with other settings; choose another folder or delete it"):
        Run(tmp_path / "run", config.replace(seed=1))
    assert Run(tmp_path / "run").settings["seed"] == 0


def test_another_run_is_refused_before_the_text_has_a_fingerprint(config, tmp_path):
    refuse_other(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    Run(tmp_path / "run", config.replace(data=config.data.replace(fingerprint="abc")))
    refuse_other(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        refuse_other(tmp_path / "run", config.replace(seed=1))


def test_a_run_from_before_a_setting_existed_is_opened_with_its_default(config, tmp_path):
    Run(tmp_path / "run", config)
    path = tmp_path / "run" / "config.yaml"
    older = yaml.safe_load(path.read_text(encoding="utf-8"))
    del older["train"]["threads"]
    path.write_text(yaml.safe_dump(older), encoding="utf-8")
    assert Run(tmp_path / "run", config).settings == older
    with pytest.raises(ConfigError, match="other settings"):
        Run(tmp_path / "run", config.replace(train=config.train.replace(threads=1)))
    path.write_text(yaml.safe_dump(older | {"colour": "red"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="other settings"):
        Run(tmp_path / "run", config)


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not empty and holds no run; choose another folder"):
        Run(tmp_path, config)
    assert not (tmp_path / "config.yaml").exists()
    (tmp_path / "empty").mkdir()
    assert Run(tmp_path / "empty", config).settings["seed"] == 0


def test_a_folder_without_settings_cannot_be_read_as_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"is no run folder: it has no config\.yaml"):
        Run(tmp_path)


def test_the_result_is_none_until_the_run_is_finished(config, tmp_path):
    run = Run(tmp_path / "run", config)
    assert run.result is None
    run.finish({"bpb": 1.25, "routing": {"passes": [1, 2]}})
    assert Run(tmp_path / "run").result == {"bpb": 1.25, "routing": {"passes": [1, 2]}}


def test_a_torn_last_line_is_dropped_and_later_lines_are_forgotten(config, tmp_path):
    run = Run(tmp_path / "run", config)
    assert list(run.metrics()) == []
    for step in range(1, 6):
        run.log(step=step, loss=1 / step)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 6, "lo', encoding="utf-8")
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5]
    run.rewind(3)
    run.log(step=4, loss=0.5)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.5)]


def test_a_line_that_lost_only_its_newline_does_not_swallow_the_next(config, tmp_path):
    run = Run(tmp_path / "run", config)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}', encoding="utf-8")
    run.rewind(1)
    run.log(step=2, loss=1.0)
    assert [line["step"] for line in run.metrics()] == [1, 2]


def test_a_write_that_dies_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomic(path, "old")

    def die(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new and longer")
    assert path.read_text(encoding="utf-8") == "old"


def test_versions_and_hardware_say_what_a_result_depends_on(config, tmp_path):
    found = versions()
    assert {"python", "sparsemix", "torch", "numpy"} <= set(found) and all(found.values())
    assert hardware().endswith(f", {os.cpu_count()} cores")


def test_the_settings_file_is_plain_yaml_without_python_tags(config, tmp_path):
    Run(tmp_path / "run", config)
    text = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "!!" not in text and yaml.safe_load(text)["model"]["blocks"][1]["kind"] == "mod"


def test_settings_that_came_later_do_not_rename_the_runs_of_earlier_versions():
    ffn = {"kind": "peer", "num_experts": 16, "num_heads": 1, "top_k": 2, "d_key": 8}
    block = {"kind": "block", "mixer": {"kind": "attention", "num_heads": 2}, "ffn": ffn}
    model = {"d_model": 16, "vocab_size": 300, "seq_len": 8, "blocks": [block]}
    raw = {"model": model, "data": {"vocab_size": 300}, "train": {"budget_flops": 1e9}}
    # Computed before `split`, `text_as`, `keep_checkpoints` and `rates` were settings.
    assert config_hash(parse(RunConfig, raw)) == "049406505a"
    for part, later in (
        ("data", {"split": "file"}),
        ("data", {"text_as": [".asc"]}),
        ("train", {"keep_checkpoints": True}),
        ("train", {"rates": {"keys": 0.5}}),
    ):
        config = parse(RunConfig, raw | {part: raw[part] | later})
        assert config_hash(config) != "049406505a"
        assert parse(RunConfig, yaml.safe_load(to_yaml(config))) == config
