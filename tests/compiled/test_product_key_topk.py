"""The look-up by product keys inside torch.compile: one graph, the same picks and gradients."""

import pytest
import torch

from sparsemix.ops.product_key_topk import product_key_topk


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_a_compiled_look_up_is_the_eager_one(impl):
    def loss(query, keys):
        left, right, i, j = product_key_topk(query * 2, keys, 5, impl)
        return (left * right).sum(), i * 9 + j

    query = (torch.randint(-8, 9, (11, 2, 2, 3)) / 4).requires_grad_()
    keys = (torch.randint(-8, 9, (2, 9, 3)) / 4).requires_grad_()
    found = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        value, ids = run(query, keys)
        found.append((value, ids, *torch.autograd.grad(value, [query, keys])))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
