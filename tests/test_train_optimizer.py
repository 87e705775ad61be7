"""Training runs move tables and matrices by the settings of the optimizer, and resume with its state."""

import pytest
import torch
from safetensors.torch import load_file

from sparsemix import train
from sparsemix.config import ConfigError, parse
from sparsemix.settings import RunConfig
from tiny import changed, prepared, result_of, run_config

pytestmark = pytest.mark.usefixtures("unchecked")

SETTINGS = [{"table_moment": "row"}, {"optimizer": "muon"}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["nested", "pkm"])
def test_a_run_resumes_to_the_same_bits_and_differs_from_the_default(corpus, tmp_path, kind, settings):
    data, shards = corpus
    config = run_config(data, kind, steps=6, accumulation=2, evals=0, keep_checkpoints=True, **settings)

    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    whole = result_of(config, tmp_path / "whole", shards)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "twice", shards, stop)
    assert result_of(config, tmp_path / "twice", shards)["bpb"] == whole["bpb"]
    for file in ("model/model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        ends = [load_file(tmp_path / name / file) for name in ("whole", "twice")]
        assert changed(*ends) == []
    plain = run_config(data, kind, steps=6, accumulation=2, evals=0)
    assert result_of(plain, tmp_path / "plain", shards)["bpb"] != whole["bpb"]


def test_tables_are_trained_from_recorded_gradients_and_keep_one_second_moment_a_row_on_request(corpus, tmp_path):
    data, shards = corpus
    config = run_config(data, "peer", steps=2, evals=0, table_moment="row", keep_checkpoints=True)
    result_of(config, tmp_path, shards)
    slots = load_file(tmp_path / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    second = {name: t for name, t in slots.items() if name.endswith("exp_avg_sq") and t.shape == (64,)}
    assert len(second) == 2 and all((t > 0).any() for t in second.values())


def test_a_step_that_cannot_be_taken_names_the_table_and_leaves_no_record(corpus, tmp_path):
    data, shards = corpus
    config = run_config(data, "peer", steps=2)
    model = config.model.build(0).train()
    optimizer = config.train.build_optimizer(model)
    table = model.blocks[1].ffn.w_in
    with torch.no_grad():
        model.blocks[1].ffn.w_out.fill_(torch.nan)
    batch = shards.batch(0, 2, 16, 0)
    model(batch.tokens).logits.sum().backward()
    norm = optimizer.clip_grad_norm_(model.parameters(), 1.0)
    assert not norm.isfinite() and not optimizer.is_finite(table)
    optimizer.zero_grad()
    assert optimizer.is_finite(table) and table.grad is None


@pytest.mark.parametrize(("name", "value"), [("optimizer", "sgd"), ("table_moment", "rows")])
def test_an_unknown_choice_is_a_one_line_error_that_names_it(corpus, name, value):
    settings = run_config(corpus[0]).model_dump()
    settings["train"][name] = value
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, settings)
    assert f"train.{name}" in str(caught.value) and value in str(caught.value) and "\n" not in str(caught.value)
