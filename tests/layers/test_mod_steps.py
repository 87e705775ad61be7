"""Mixture-of-Depths trains deterministically, with or without recomputation, in any precision."""

import pytest
import torch
from cases import build, contexts, tokens
from mod_steps import BASE, BLOCK, CASES, step, train_steps
from torch.utils.checkpoint import checkpoint

from sparsemix.layers import Ctx

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("name", CASES)
def test_two_runs_of_one_seed_are_equal_bit_for_bit(name):
    first, second = (train_steps(build(CASES[name]), step) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_recomputation_routes_as_before_and_gives_the_same_gradients(name):
    def recomputed(layer, x, ctx):
        y, aux = checkpoint(layer, x, ctx, use_reentrant=False)
        return y, (y.square().sum() + sum(aux.losses.values())), aux.stats

    mine = train_steps(build(CASES[name]), recomputed)
    wanted = train_steps(build(CASES[name]), step)
    assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("ctx", [contexts()[name] for name in ("plain", "all")], ids=["plain", "all"])
@pytest.mark.parametrize("gate", ["sigmoid", "raw"])
def test_gradients_are_finite_differences(gate, ctx):
    layer = build(BASE | {"gate": gate})
    names = [name for name, _ in layer.named_parameters()]

    def output(x, *parameters):
        y, _ = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, ctx))
        return y if ctx.valid is None else y * ctx.valid[..., None]

    x = tokens().requires_grad_()
    assert torch.autograd.gradcheck(output, (x, *layer.parameters()), atol=1e-6, fast_mode=True)
    # The predictor's loss reaches the predictor alone: to x it is a constant, which finite differences cannot know.
    predictor = list(layer.predictor.parameters())
    assert torch.autograd.gradcheck(lambda *_: layer(x.detach(), ctx)[1].losses["predictor"], predictor, atol=1e-6)


def test_low_precision_routes_as_full_precision_does():
    layer, x = build(BASE | {"inner": BLOCK["ffn"]}).float(), tokens(8, 4096).float()
    # The stream itself is bf16, as it is inside a model under autocast; the router still works in fp32.
    x = x.bfloat16().float()
    wanted = layer(x, Ctx())[0].abs().sum(-1) > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.router(x.bfloat16()).dtype == torch.float32
        taken = layer(x.bfloat16(), Ctx())[0].abs().sum(-1) > 0
    assert float((taken == wanted).float().mean()) >= 0.9999
    # The control: scores in bf16 tie and so pick other tokens.
    rough = (x.bfloat16() @ layer.router.weight[0].bfloat16()).float()
    picked = torch.zeros_like(wanted).scatter(1, rough.topk(int(wanted[0].sum()), dim=1).indices, True)
    assert float((picked == wanted).float().mean()) < 0.9999
