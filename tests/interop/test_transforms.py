"""torch.func through a model with labels: gradients of all parameters as one function, and of single examples."""

import pytest
import torch
from hf_models import hf_model
from torch.func import functional_call, grad, jacrev, vmap

from tiny import BLOCKS, T, V

# torch's own attention has no rule for a batch of calls, and says so.
pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def tokens(B=3):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def of_parameters(model):
    """The loss as a function of the parameters and the tokens."""
    parameters = dict(model.named_parameters())
    # Not differentiated: a tied head is one tensor under one name.
    return parameters, lambda values, ids: functional_call(model, values, (), {"input_ids": ids, "labels": ids}).loss


def assert_gradients(got, model):
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got[name], wanted, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_the_gradient_of_torch_func_is_that_of_backward(name, mode):
    model = hf_model(name).train(mode)
    parameters, loss = of_parameters(model)
    state = {key: value.clone() for key, value in model.named_buffers()}
    # A selector that draws draws the same.
    torch.manual_seed(3)
    got = grad(loss)(parameters, tokens())
    assert all(torch.equal(value, state[key]) for key, value in model.named_buffers())
    model.zero_grad()
    torch.manual_seed(3)
    model(tokens(), labels=tokens()).loss.backward()
    assert_gradients(got, model)
    assert all(torch.isfinite(g).all() for g in got.values()) and any(g.any() for g in got.values())


@pytest.mark.parametrize("name", ["dense", "peer", "pkm"])
def test_the_gradients_of_single_examples_come_by_vmap(name):
    model = hf_model(name)
    parameters, loss = of_parameters(model)
    got = vmap(grad(lambda values, ids: loss(values, ids[None])), (None, 0))(parameters, tokens())
    for b, ids in enumerate(tokens()):
        model.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        assert_gradients({key: value[b] for key, value in got.items()}, model)


def test_a_jacobian_is_rows_of_gradients():
    model = hf_model("moe")
    parameters, loss = of_parameters(model)
    norms = {name: p for name, p in parameters.items() if name.endswith("ffn_norm.weight")}
    rows = jacrev(lambda part: torch.stack([loss(parameters | part, ids[None]) for ids in tokens()]))(norms)
    for b, ids in enumerate(tokens()):
        wanted = grad(loss)(parameters, ids[None])
        assert all(torch.allclose(rows[name][b], wanted[name], rtol=1e-10, atol=1e-12) for name in norms)


@pytest.mark.parametrize("name", ["moe", "mh_moe", "mode"])
def test_experts_under_vmap_are_refused_in_one_line(name):
    parameters, loss = of_parameters(hf_model(name).train())
    with pytest.raises(ValueError, match=r"vmap cannot run experts: .* loop over the examples instead"):
        vmap(lambda values, ids: loss(values, ids[None]), (None, 0))(parameters, tokens())
