"""Mixture-of-Depths trains in static shapes: one graph, and no recompiles over steps."""

import pytest
import torch
from cases import build, tokens
from mod_steps import BASE, BLOCK, CASES, step, train_steps
from torch._dynamo.testing import CompileCounter

from sparsemix.layers import Ctx, update


@pytest.mark.parametrize("name", CASES)
def test_one_full_graph_serves_every_training_step(name):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    mine = train_steps(build(CASES[name]), compiled)
    wanted = train_steps(build(CASES[name]), step)
    assert counter.frame_count == 1, "later steps must not compile again"
    for got, want in zip(mine, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_annealing_compiles_once_a_level():
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = build(BASE | {"anneal_steps": 20, "inner": BLOCK["ffn"]})
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    levels = set()
    for _ in range(24):
        levels.add(layer.slack)
        update(layer, compiled(layer, tokens(), Ctx())[2])
    assert counter.frame_count == len(levels) == 5
