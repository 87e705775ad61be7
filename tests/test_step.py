"""Gradients of one step: recomputed blocks never re-route, statistics count once, one transfer from the device."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ranks import on_ranks
from sparsemix import build_model, build_optimizer, step, train
from sparsemix.checkpoint import TrainState
from sparsemix.data import Batch
from sparsemix.layers import Ctx
from sparsemix.layers.router import Router
from sparsemix.model import after
from tiny import ATTENTION, BLOCKS, DENSE, D, T, V, mod, prepared, run_config

sys.path.append(str(Path(__file__).parent / "layers"))
from memory import allocated

pytestmark = pytest.mark.usefixtures("unchecked")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus"))


def model_of(blocks, seq_len=T, d_model=D):
    return build_model({"d_model": d_model, "vocab_size": V, "seq_len": seq_len, "blocks": blocks}).train()


def passed(model, run, batch=4, seq_len=T):
    """(loss, gradients by name, statistics) of one forward and backward pass."""
    torch.manual_seed(1)
    tokens = torch.randint(V, (batch, seq_len + 1))
    model.zero_grad()
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], Ctx(), run)
    (loss.mean + sum(loss.aux.losses.values())).backward()
    return loss.mean.detach(), {n: p.grad for n, p in model.named_parameters()}, loss.aux.stats


@pytest.mark.parametrize("name", BLOCKS)
def test_recomputed_blocks_give_the_same_bits(name):
    model = model_of(BLOCKS[name])
    (loss, grads, stats), (wanted, wanted_grads, wanted_stats) = (passed(model, r) for r in (step.recomputed, after))
    assert torch.equal(loss, wanted)
    assert stats.keys() == wanted_stats.keys()
    assert all(torch.equal(stats[key], wanted_stats[key]) for key in stats)
    for key, gradient in grads.items():
        assert gradient is wanted_grads[key] is None or torch.equal(gradient, wanted_grads[key]), key


class Wavering:
    """Router scores of every second call are turned round: as if near ties had been decided anew."""

    def __init__(self, monkeypatch):
        self.calls = 0
        real = Router.forward

        def forward(router, x):
            self.calls += 1
            return real(router, x) * (-1 if self.calls == 2 else 1)

        monkeypatch.setattr(Router, "forward", forward)


PLAIN = partial(checkpoint, after, use_reentrant=False)


@pytest.mark.parametrize("selector", ["expert_choice", "token_choice"])
def test_a_recomputed_block_keeps_its_first_routing(monkeypatch, selector):
    """Gradients of what the picked tokens ran through are those of the first picks, even if scores came out anew."""
    settings = {"gate": "one", "selector": selector, "router_loss_weight": 0.0}
    model = model_of([mod({"kind": "block", "mixer": ATTENTION, "ffn": DENSE}, **settings)])

    def inner(run):
        return {name: g for name, g in passed(model, run)[1].items() if ".inner." in name}

    wanted = inner(after)
    with monkeypatch.context() as patch:
        wavering = Wavering(patch)
        kept = inner(step.recomputed)
        assert wavering.calls == 2
    with monkeypatch.context() as patch:
        Wavering(patch)
        lost = inner(PLAIN)
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    # The control: recomputation that decides again takes the gradient of other tokens.
    assert not all(torch.allclose(lost[name], wanted[name], rtol=1e-2) for name in wanted)


@pytest.mark.parametrize("name", ["moe", "expert_choice", "mode"])
def test_experts_are_recomputed_on_their_first_tokens(monkeypatch, name):
    model = model_of(BLOCKS[name][1:])
    seen = []
    # Which operands say who goes where: token_ids and counts.
    places = {torch.ops.sparsemix.expert_mlp.default: (1, 3), torch.ops.sparsemix.expert_mlp_backward.default: (3, 5)}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in places:
                seen.append([args[place].tolist() for place in places[func]])
            return func(*args, **(kwargs or {}))

    def sent(run):
        seen.clear()
        Wavering(monkeypatch)
        with Counting():
            passed(model, run)
        monkeypatch.undo()
        return seen[:]

    kept, lost = sent(step.recomputed), sent(PLAIN)
    # Forward, recomputation, backward.
    assert len(kept) >= 3 and all(places == kept[0] for places in kept)
    assert not all(places == lost[0] for places in lost)


def test_recomputation_holds_less_memory():
    blocks, seq_len, d_model = BLOCKS["dense"][:1] * 6, 64, 32
    model = model_of(blocks, seq_len, d_model)
    work = {run: allocated(lambda run=run: passed(model, run, 8, seq_len)).peak for run in (step.recomputed, after)}
    assert work[step.recomputed] < 0.5 * work[after]


def test_a_recomputed_run_ends_with_the_bits_of_a_plain_one(corpus, tmp_path):
    data, shards = corpus
    results = []
    for recompute in (False, True):
        config = run_config(data, "nested", 4, accumulation=2, recompute_blocks=recompute)
        results.append(train.train(config, tmp_path / str(recompute), shards).result)
    assert results[0]["bpb"] == results[1]["bpb"] and results[0]["routing"] == results[1]["routing"]


def test_a_step_reads_from_the_device_once(corpus, monkeypatch):
    data, shards = corpus
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                reads.append(func)
            return func(*args, **(kwargs or {}))

    config = run_config(data, [*BLOCKS["dense"], *BLOCKS["mod"]], accumulation=2)
    model = config.model.build(0).train()
    optimizer = build_optimizer(model, 1e-3)
    batches = train.training_batches(config, shards, TrainState(), CPU)
    micro = [next(batches) for _ in range(2)]
    transfers = []
    monkeypatch.setattr(train, "read", lambda scalars: transfers.append(scalars) or step.read(scalars))
    # The cross-entropy looks at its targets on a CPU only, where that costs no waiting.
    monkeypatch.setattr("sparsemix.ops.cross_entropy._known_ids", lambda *_: None)
    with Reads():
        line = train.train_step(config, model, optimizer, micro)
    assert not reads and len(transfers) == 1
    assert {"loss", "grad_norm", "blocks.3.predictor"} <= set(line)


def test_a_loss_is_the_mean_of_token_nats_with_the_gradients_of_logits():
    model = model_of(BLOCKS["mod"])
    tokens, targets = torch.randint(V, (2, T)), torch.randint(V, (2, T))
    loss = model.loss(tokens, targets, Ctx())
    output = model(tokens, Ctx())
    nats = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(loss.nats.flatten(), nats.detach())
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine, wanted = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss.mean, nats.mean()))
    for got, want in zip(mine, wanted, strict=True):
        assert got is want is None or torch.testing.assert_close(got, want) is None
    with pytest.raises(RuntimeError, match="require grad"):
        loss.nats.sum().backward()
    assert torch.equal(model.eval().loss(tokens, targets).nats, model.loss(tokens, targets, Ctx(causal=True)).nats)


def test_the_picked_number_type_threads_and_compilation_stay_when_a_run_goes_on(corpus, tmp_path, monkeypatch):
    data, shards = corpus
    config = run_config(data, steps=4, dtype="auto", threads="auto")
    monkeypatch.setattr("sparsemix.machine.thread_rates", lambda _: {2: 1.0})

    def interrupt(line):
        if line["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "pick_dtype", lambda *_: torch.bfloat16)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path, shards, interrupt)
    # Another machine would pick otherwise.
    monkeypatch.setattr(train, "pick_dtype", lambda *_: torch.float32)
    monkeypatch.setattr("sparsemix.machine.thread_rates", lambda _: {1: 1.0})
    result = train.train(config, tmp_path, shards).result
    assert result["dtype"] == "bfloat16" and result["compiled"] is False and result["threads"] == 2
    assert torch.get_num_threads() == 1


def read_by(rank):
    return step.read({"loss": torch.tensor(1.0 + rank), "norm": torch.tensor(float("nan") if rank else 2.0)})


def test_ranks_read_the_same_numbers_so_that_all_refuse_a_step_together(tmp_path):
    for line in on_ranks(read_by, tmp_path):
        assert line["loss"] == 1.5 and line["norm"] != line["norm"]


def batch_of(rows, seq_len):
    torch.manual_seed(0)
    tokens = torch.randint(V, (rows, seq_len + 1))
    positions = torch.arange(seq_len).expand(rows, -1)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, torch.zeros_like(positions))


@pytest.mark.parametrize("name", ["dense", "moe", "peer", "mh_moe", "mod", "expert_choice"])
def test_activation_bytes_are_what_the_profiler_sees_grow_while_the_loss_is_held(name):
    model, rows, seq_len = model_of(BLOCKS[name], seq_len=63), 5, 63

    def held(rows):
        batch, kept = batch_of(rows, seq_len), []
        ctx = Ctx(doc_ids=batch.doc_ids)
        return allocated(lambda: kept.append(model.loss(batch.tokens, batch.targets, ctx))).held

    held(1)  # What is made once and kept, such as rotation tables.
    grown = [held(1), held(rows)]
    found = step.activation_bytes(model, batch_of(rows, seq_len), torch.float32, after)
    assert found == pytest.approx((grown[1] - grown[0]) / ((rows - 1) * seq_len), rel=0.01)
    assert 0 < step.activation_bytes(model, batch_of(rows, seq_len), torch.float32, step.recomputed) < found / 3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_branch_that_leads_to_no_loss_holds_no_activations():
    model, batch = model_of(BLOCKS["dense"], seq_len=63), batch_of(5, 63)

    def with_a_branch(block, x, ctx):
        # Large, so that its memory goes back to the system, and is not given to another tensor.
        x.repeat(64, 1, 1).exp()
        return after(block, x, ctx)

    found = [step.activation_bytes(model, batch, torch.float32, run) for run in (after, with_a_branch)]
    assert found[0] == found[1]
