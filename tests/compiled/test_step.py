"""Training through compiled blocks is training: equal losses, gradients and weights, whole runs and resumed ones."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from lookups import take_rows
from sparsemix import build_model, train
from sparsemix.layers import Ctx, update
from sparsemix.optim.loan import borrow
from sparsemix.step import block_runner
from tiny import BLOCKS, DENSE, D, T, V, mod, prepared, run_config

# torch.compile looks at the .grad of inputs that are no leaves, and hides its own warning by other means than filters;
# its compiler imports what torch itself deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def model_of(blocks):
    model = {"d_model": D, "vocab_size": V, "seq_len": T, "blocks": blocks}
    return build_model(model).double().train()


def steps(model, run, count=3):
    """Losses and gradients over steps of SGD, with documents and padding."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for i in range(count):
        torch.manual_seed(i)
        tokens = torch.randint(V, (2, T + 1))
        ctx = Ctx(doc_ids=(torch.arange(T) >= 3 * i).long().expand(2, T), valid=torch.rand(2, T) > 0.1)
        torch.manual_seed(i)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], ctx, run)
        optimizer.zero_grad()
        (loss.mean + sum(loss.aux.losses.values())).backward()
        optimizer.step()
        update(model, loss.aux.stats)
        seen += [loss.mean.detach(), *loss.aux.stats.values()]
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return seen


# Every block once, each being a graph to compile.
CASES = {name: blocks[-1:] for name, blocks in BLOCKS.items()} | {
    "mode_choice": BLOCKS["mode"][:1],
    "nested": BLOCKS["nested"][:2],
    "nested_threshold": BLOCKS["nested_threshold"][1:2],
}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_blocks_take_the_steps_of_plain_ones(name, recompute):
    torch._dynamo.reset()
    model, plain = model_of(CASES[name]), model_of(CASES[name])
    # Only the recomputed form needs the backward pass traced as well.
    counter = CompileCounterWithBackend("aot_eager") if recompute else CompileCounter()
    mine = steps(model, block_runner(model, True, recompute, counter))
    wanted = steps(plain, block_runner(plain, False, False))
    assert counter.frame_count == len(set(model.config.blocks)), "one graph for each kind of block"
    for got, want in zip(mine, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_equal_blocks_share_one_graph_and_each_kind_may_anneal_for_itself():
    torch._dynamo.reset()
    counter = CompileCounter()
    dense = BLOCKS["dense"][0]
    annealed = [mod(DENSE, anneal_steps=8), mod(DENSE, anneal_steps=8, gate="raw")]
    model = model_of([dense, dense, *annealed])
    steps(model, block_runner(model, True, False, counter), 9)
    # Five levels of two kinds are more graphs than torch.compile allows one function.
    assert counter.frame_count == 1 + 2 * 5


# Here torch's SGD steps beside the factors.
@pytest.mark.filterwarnings("ignore:.*forms the whole gradient")
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_factored_gradients_of_tables_are_recorded_once(recompute):
    torch._dynamo.reset()
    model = model_of(BLOCKS["peer"][1:])
    layer = model.blocks[0].ffn
    borrow([layer], model)

    def factors(run):
        steps(model, run, 1)
        return [take_rows(table) for table in (layer.w_in, layer.w_out)]

    wanted = factors(block_runner(model, False, False))
    model = model_of(BLOCKS["peer"][1:])
    layer = model.blocks[0].ffn
    borrow([layer], model)
    mine = factors(block_runner(model, True, recompute, "aot_eager"))
    for got, want in zip(mine, wanted, strict=True):
        assert len(got) == len(want) == 1
        for a, b in zip(got[0], want[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_compiled_run_resumes_to_the_same_bits_and_learns_as_a_plain_one(tmp_path):
    data, shards = prepared(tmp_path)
    blocks = [mod(BLOCKS["dense"][0])]
    config = run_config(data, blocks, 4, compile=True)
    whole = train.train(config, tmp_path / "whole", shards).result

    def interrupt(line):
        if line["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "twice", shards, interrupt)
    twice = train.train(config, tmp_path / "twice", shards).result
    plain = train.train(run_config(data, blocks, 4, compile=False), tmp_path / "plain", shards).result
    assert whole["compiled"] and not plain["compiled"]
    assert whole["bpb"] == twice["bpb"] == pytest.approx(plain["bpb"], rel=1e-5)
