"""Is an op its reference, in the output and in every gradient?"""

import torch


def assert_same(op, reference, *inputs, expanded=False):
    """Both in fp64, to 1e-11. `expanded` sends back a gradient of stride 0, as .sum() does."""
    moving = [x for x in inputs if x.is_floating_point()]
    for x in moving:
        assert x.dtype == torch.float64
        x.requires_grad_()
    out, wanted = op(*inputs), reference(*inputs)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)
    grad = torch.ones((), dtype=out.dtype).expand_as(out) if expanded else torch.randn_like(out)
    grads, wanted_grads = (torch.autograd.grad(y, moving, grad) for y in (out, wanted))
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)
