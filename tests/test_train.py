import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsemix import build_optimizer, train
from sparsemix.checkpoint import TrainState
from sparsemix.config import ConfigError
from sparsemix.errors import OutOfMemoryError, TrainingError
from sparsemix.evaluate.ngram import ngram_baselines
from sparsemix.layers import Ctx
from sparsemix.model import LM, token_nats
from sparsemix.run import Run
from sparsemix.settings import RunConfig
from tiny import KINDS, T, changed, prepared, result_of, run_config

pytestmark = pytest.mark.usefixtures("unchecked")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus"))


def trained_steps(config, shards, steps):
    """The model after `steps` steps of the training loop's own parts, without evaluation."""
    model = config.model.build(config.seed).train()
    optimizer = build_optimizer(model, config.train.lr, config.train.weight_decay)
    batches = train.training_batches(config, shards, TrainState(), CPU)
    for _ in range(steps):
        train.train_step(config, model, optimizer, [next(batches) for _ in range(config.train.accumulation)])
        optimizer.step()
    return model


def trunk(model):
    return {name: p for name, p in model.named_parameters() if "predictor" not in name.split(".")}


def test_a_predictor_of_any_width_leaves_the_trunk_bit_identical_to_none(corpus, monkeypatch):
    data, shards = corpus
    settings = {"clip_norm": 0.05}
    config = run_config(data, "nested", **settings)
    without = trunk(trained_steps(run_config(data, "nested_threshold", **settings), shards, 20))
    for width in (1, 32):
        blocks = config.model_dump()["model"]["blocks"]
        blocks[1]["predictor_width"] = width
        assert changed(trunk(trained_steps(run_config(data, blocks, **settings), shards, 20)), without) == []
    # The control: clipped together with the trunk, the predictor's gradient changes the trunk.
    monkeypatch.setattr(train, "clip_groups", lambda model: [list(model.parameters())])
    assert "embed.weight" in changed(trunk(trained_steps(config, shards, 20)), without)


def test_a_budget_below_one_step_is_refused(corpus):
    config = run_config(corpus[0])
    less = config.replace(train=config.train.replace(budget_flops=0.99 * config.step_flops))
    with pytest.raises(
        ConfigError, match=r"train\.budget_flops=.* is less than one step \(.* raise the budget or lower"
    ):
        _ = less.steps


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(corpus, tmp_path):
    data, shards = corpus
    smaller = data.replace(vocab_size=280)
    config = run_config(data).model_dump() | {"data": smaller.model_dump()}
    config["model"]["vocab_size"] = 280
    with pytest.raises(ConfigError, match=r"model\.vocab_size=280 is less than the tokenizer's"):
        train.train(RunConfig.model_validate(config), tmp_path / "run", shards)
    assert not (tmp_path / "run").exists()


def test_the_order_of_the_data_depends_on_the_seed_alone(corpus):
    data, shards = corpus

    def order(kind, accumulation=1, **settings):
        """The tokens of the first two steps."""
        config = run_config(data, kind, accumulation=accumulation, **settings)
        batches = train.training_batches(config, shards, TrainState(), CPU)
        return torch.cat([next(batches).tokens for _ in range(2 * accumulation)])

    dense = order("dense")
    for kind in KINDS:
        assert torch.equal(order(kind), dense)
    assert len(dense) == 8 and torch.equal(order("moe", accumulation=2), dense)
    assert not torch.equal(order("dense", seed=1), dense)
    config = run_config(data)
    resumed = train.training_batches(config, shards, TrainState(cursor=4), CPU)
    assert torch.equal(next(resumed).tokens, dense[4:8])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_more_than_the_frequencies_of_words(corpus, tmp_path, kind):
    data, shards = corpus
    config = run_config(data, kind, steps=45, lr=2e-2, evals=0, eval_tokens=10**6)
    bpb = result_of(config, tmp_path, shards)["validation_bpb"]
    num_bytes = int(shards.bytes("validation").sum())
    baselines = ngram_baselines(shards.tokens("train"), shards.tokens("validation"), num_bytes, 300)
    assert bpb < 0.8 * baselines["unigram_bpb"]
    losses = [line["loss"] for line in Run(tmp_path).metrics()]
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_two_micro_batches_have_the_gradient_of_one_batch(corpus):
    data, shards = corpus
    gradients, lines = [], []
    for accumulation in (1, 2, 4):
        config = run_config(data, "dense", accumulation=accumulation, clip_norm=1e9)
        model = config.model.build(0).train()
        batches = train.training_batches(config, shards, TrainState(), CPU)
        micro = [next(batches) for _ in range(accumulation)]
        lines.append(train.train_step(config, model, build_optimizer(model, 1e-3), micro))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for line, several in zip(lines[1:], gradients[1:], strict=True):
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
        for name, gradient in several.items():
            torch.testing.assert_close(gradient, gradients[0][name], msg=name)


@pytest.mark.parametrize("kind", ["mh_moe", "nested"])
def test_bf16_trains_to_finite_weights_near_those_of_fp32(corpus, tmp_path, kind):
    data, shards = corpus
    bpb = {}
    for dtype in ("float32", "bfloat16"):
        result = result_of(run_config(data, kind, steps=5, dtype=dtype), tmp_path / dtype, shards)
        weights = load_file(tmp_path / dtype / "model" / "model.safetensors")
        assert all(t.isfinite().all() for t in weights.values())
        assert all(t.dtype == torch.float32 for t in weights.values() if t.is_floating_point())
        bpb[dtype] = result["bpb"]
    assert bpb["bfloat16"] != bpb["float32"]
    assert bpb["bfloat16"] == pytest.approx(bpb["float32"], rel=0.02)


def test_weight_decay_leaves_norms_embeddings_biases_and_tables_alone(corpus):
    config = run_config(corpus[0], "nested")
    model = config.model.build(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, lr=0.5, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = ("embed", "norm", "mixer_norm", "ffn_norm", "query_norm", "sub_keys", "w_in", "w_out", "bias")
    for name, parameter in model.named_parameters():
        if set(name.split(".")) & set(kept):
            assert torch.equal(parameter, before[name]), name
        else:
            torch.testing.assert_close(parameter, 0.95 * before[name], msg=name)


def test_a_rate_far_too_high_stops_with_the_step_and_the_layers_and_saves_a_finite_state(corpus, tmp_path):
    data, shards = corpus
    config = run_config(data, "nested", steps=9, lr=1e30, warmup=0)
    with pytest.raises(TrainingError) as caught:
        train.train(config, tmp_path, shards)
    (newest,) = (tmp_path / "checkpoints").iterdir()
    step = int(newest.name.removeprefix("step-"))
    assert 0 < step < 9 and str(caught.value).startswith(f"step {step + 1}: non-finite loss or gradient (loss ")
    assert "largest weights: embed.weight 1e+30" in str(caught.value)
    assert "lower train.lr=1e+30" in str(caught.value) and str(newest.parent) in str(caught.value)
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())
    assert Run(tmp_path).result is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_turns_nan_leaves_the_state_before_that_step(corpus, tmp_path, monkeypatch, accumulation):
    data, shards = corpus
    config = run_config(data, "nested", steps=6, accumulation=accumulation)
    calls = []

    real = LM.loss

    def poisoned(*args):
        calls.append(1)
        loss = real(*args)
        # The last micro-batch of step 4: the running statistics of the others must not count either.
        return loss._replace(mean=loss.mean * (math.nan if len(calls) == 4 * accumulation else 1.0))

    monkeypatch.setattr(LM, "loss", poisoned)
    with pytest.raises(
        TrainingError, match=r"^step 4: .*loss nan.*not finite in: embed\.weight, .*before this step is"
    ):
        train.train(config, tmp_path / "poisoned", shards)
    monkeypatch.undo()

    def interrupt(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "sound", shards, interrupt)
    for file in ("model", "optimizer"):
        path = f"checkpoints/step-00000003/{file}.safetensors"
        assert changed(load_file(tmp_path / "poisoned" / path), load_file(tmp_path / "sound" / path)) == []


def test_the_result_says_what_was_measured(corpus, tmp_path):
    data, shards = corpus
    result = result_of(run_config(data, "nested", steps=3), tmp_path, shards)
    documents = np.load(tmp_path / "documents.npz")
    parts = shards.parts("test", T, 150)
    num_bytes = parts.bytes
    np.testing.assert_array_equal(documents["ids"], parts.docs)
    np.testing.assert_array_equal(documents["groups"], shards.groups("test")[parts.docs])
    np.testing.assert_array_equal(documents["bytes"], num_bytes)
    total = documents["nats"].sum()
    assert result["bpb"] == pytest.approx(total / math.log(2) / num_bytes.sum(), rel=1e-12)
    assert result["perplexity"] == pytest.approx(math.exp(total / result["test_tokens"]), rel=1e-12)
    assert result["lookahead_bpb"] not in (None, result["bpb"])
    assert sum(result["routing"]["passes"]) == result["test_tokens"] == parts.tokens <= 150
    assert set(result["routing"]["predictor"]) == {"blocks.1"}
    always = {"blocks.0.ffn", "blocks.2.ffn"}
    assert always <= set(result["routing"]["experts"]) <= always | {"blocks.1.inner.ffn"}
    assert result["peak_memory_bytes"] > 10**7 and result["wall_s"] > 0
    dense = result_of(run_config(data, steps=1), tmp_path / "dense", shards)
    assert dense["lookahead_bpb"] is None and dense["routing"]["passes"] is None


def test_the_first_loss_is_that_of_an_untrained_model(corpus, tmp_path):
    data, shards = corpus
    config = run_config(data, "moe", steps=2)
    train.train(config, tmp_path, shards)
    batch = shards.batch(0, 4, T, seed=0)
    with torch.no_grad():
        output = config.model.build(0).train()(batch.tokens, Ctx(batch.positions, batch.doc_ids))
    first = next(Run(tmp_path).metrics())
    assert first["loss"] == pytest.approx(float(token_nats(output.logits, batch.targets).mean()), rel=1e-6)
    assert first["blocks.1.ffn.balance"] == pytest.approx(float(output.aux.losses["blocks.1.ffn.balance"]), rel=1e-6)


def test_a_refused_run_leaves_nothing_and_the_mended_one_is_trained(corpus, tmp_path, monkeypatch):
    data, shards = corpus
    config = run_config(data, steps=1)
    long = config.replace(model=config.model.replace(seq_len=1 << 20), train=config.train.replace(budget_flops=1e30))
    with pytest.raises(ConfigError, match="seq_len=1048576 must be below the training split"):
        train.train(long, tmp_path / "deep" / "run", shards)
    assert not list(tmp_path.iterdir())
    # The allocator's own error, of a model that no machine holds.
    monkeypatch.setattr(LM, "train", lambda *_: torch.empty(1 << 50))
    with pytest.raises(OutOfMemoryError, match=r"d_model=16, .*out of memory; it takes about .* GiB, and .* were free"):
        train.train(config, tmp_path / "deep" / "run", shards)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert train.train(config, tmp_path / "deep" / "run", shards).result is not None
