"""What a training run spends of its budget, and how rates follow it."""

import math

import pytest
from safetensors.torch import load_file

from sparsemix import train
from sparsemix.optim import schedule
from sparsemix.run import Run
from sparsemix.settings import TrainConfig
from tiny import ATTENTION, MH_MOE, MOE, T, changed, prepared, result_of, run_config

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus"))


def test_two_stages_drop_the_rate_and_the_weight_decay_at_half_of_the_run(corpus, tmp_path, monkeypatch):
    data, shards = corpus
    decays = []
    built = TrainConfig.build_optimizer

    def watched(*args):
        optimizer = built(*args)
        optimizer.register_step_pre_hook(lambda o, *_: decays.append([g["weight_decay"] for g in o.param_groups]))
        return optimizer

    monkeypatch.setattr(TrainConfig, "build_optimizer", watched)
    config = run_config(data, "moe", steps=9, schedule="two_stage", lr=0.01)
    result_of(config, tmp_path, shards)
    assert decays == [[0.1, 0.0]] * 5 + [[0.0, 0.0]] * 4
    rates = [line["lr"] for line in Run(tmp_path, config).metrics()]
    assert rates == pytest.approx([0.01 * schedule(step, 9, 0, shape="two_stage") for step in range(9)])


def test_a_ternary_model_trains_resumes_bit_for_bit_and_keeps_latent_weights_in_fp32(corpus, tmp_path):
    data, shards = corpus
    precision = {"precision": {"weights": "ternary", "warmup_steps": 5}}
    blocks = [
        {"kind": "block", "mixer": ATTENTION | precision, "ffn": ffn} for ffn in (MOE | precision, MH_MOE | precision)
    ]
    config = run_config(data, blocks, steps=8)
    whole = result_of(config, tmp_path / "whole", shards)

    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "twice", shards, stop)
    assert result_of(config, tmp_path / "twice", shards)["bpb"] == whole["bpb"]
    weights, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "twice"))
    assert changed(weights, again) == []
    assert int(weights["blocks.0.mixer.q.warmup.step"]) >= 8
    assert {str(v.dtype) for name, v in weights.items() if "step" not in name} == {"torch.float32"}


def test_training_ends_at_the_budget_with_the_schedule(corpus, tmp_path):
    data, shards = corpus
    config = run_config(data, "moe", steps=7, warmup=0.3)
    assert config.steps == math.floor(config.train.budget_flops / config.step_flops) == 7
    result = result_of(config, tmp_path, shards)
    assert result["steps"] == 7 and result["flops"] == pytest.approx(7 * config.step_flops, rel=1e-12)
    assert result["flops"] <= config.train.budget_flops < result["flops"] + config.step_flops
    assert result["tokens"] == 7 * 4 * T
    lines = list(Run(tmp_path).metrics())
    assert [line["lr"] for line in lines] == pytest.approx([config.train.lr * schedule(i, 7, 2) for i in range(7)])
    assert max(line["lr"] for line in lines) == lines[2]["lr"] == config.train.lr and schedule(7, 7, 2) == 0.1
    assert lines[-1]["validation_bpb"] == pytest.approx(result["validation_bpb"], rel=1e-6)


def test_a_layer_that_spends_more_than_its_settings_say_gets_fewer_steps(corpus, tmp_path):
    data, shards = corpus
    blocks = run_config(data, "nested").model_dump()["model"]["blocks"]
    blocks[1]["anneal_steps"] = 6
    config = run_config(data, blocks, steps=12, warmup=0.2, evals=3)
    run = train.train(config, tmp_path, shards)
    lines, result = list(run.metrics()), run.result
    assert result is not None
    wanted = 0.0
    for line in lines:
        extra = sum(value for name, value in line.items() if name.endswith("extra_flops"))
        wanted += config.step_flops + 3 * extra
        assert line["flops"] == wanted
        # The rate belongs to what was spent before the step.
        before = (wanted - config.step_flops - 3 * extra) / config.step_flops
        assert line["lr"] == pytest.approx(config.train.lr * schedule(before, 12, 2))
    assert lines[0]["blocks.1.extra_flops"] > 0 and "blocks.1.extra_flops" not in lines[-1]
    assert result["flops"] == wanted and result["steps"] == len(lines) < config.steps == 12
    assert 12 * config.step_flops - config.step_flops < result["flops"] <= 12 * config.step_flops
    assert sum("validation_bpb" in line for line in lines) == 3 and "validation_bpb" in lines[-1]
