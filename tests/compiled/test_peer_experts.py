"""The fused op under torch.compile: one graph, the same kernels, the same numbers."""

import pytest
import torch

from lookups import take_rows
from sparsemix.ops.peer_experts import peer_experts
from sparsemix.ops.row_grad import table_grad
from sparsemix.ops.row_grad.factored import lend


@pytest.mark.parametrize("record", [False, True], ids=["dense", "recorded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_full_graph_equals_eager_kernels(dtype, record):
    torch._dynamo.reset()
    N, R, M, D = 9, 5, 12, 20
    ids = torch.randint(M, (N, R))
    inputs = [torch.randn(N, D).to(dtype), torch.rand(N, R), torch.randn(M, D).to(dtype), torch.randn(M, D).to(dtype)]

    def run(x, gates, w_in, w_out):
        return peer_experts(x, ids, gates, w_in, w_out, record=record, impl="native")

    def both(function):
        moving = [x.clone().requires_grad_() for x in inputs]
        for table in moving[2:]:
            lend(table, table)
        y = function(*moving)
        y.float().square().sum().backward()
        grads = [x.grad for x in moving]
        if record:
            left = [take_rows(table)[0] for table in moving[2:]]
            grads[2:] = [table_grad(f.coef, f.ids, f.vec, M) for f in left]
        return [y, *grads]

    for got, want in zip(both(torch.compile(run, backend="aot_eager", fullgraph=True)), both(run), strict=True):
        assert torch.equal(got, want)
