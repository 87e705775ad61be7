"""Every registered kind trains as one graph and equals the eager layer."""

import pytest
import torch
from cases import BASES, build
from mod_steps import step, train_steps
from torch._dynamo.testing import CompileCounter


@pytest.mark.parametrize("kind", BASES)
def test_one_full_graph_trains_a_layer_of_every_kind(kind):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    mine, wanted = (train_steps(build(BASES[kind]), run, steps=3) for run in (compiled, step))
    assert counter.frame_count == 1
    for got, want in zip(mine, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
