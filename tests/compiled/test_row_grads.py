"""What a compiled backward pass records for the optimizer is what an eager one does, and so is its step."""

import pytest
import torch
from torch import nn

from sparsemix.api import build_layer, build_optimizer
from sparsemix.ops.row_adam import Moments, Rates, all_rows_, some_rows_
from sparsemix.ops.row_grad import RowGrad, row_norm, sort_rows

LOOK_UP = {"num_heads": 2, "top_k": 4, "d_key": 6, "query_norm": "none"}
KINDS = {"peer": {"kind": "peer", "num_experts": 64, **LOOK_UP}, "pkm": {"kind": "pkm", "num_values": 64, **LOOK_UP}}


def trained(config, compiles):
    """A layer between two linear maps, whose buffers a compiled graph reuses; two micro-batches a step."""
    torch.manual_seed(0)
    layer = build_layer(config, 12).train()
    model = nn.ModuleDict({"up": nn.Linear(12, 12), "layer": layer, "down": nn.Linear(12, 12)})
    optimizer = build_optimizer(model, 0.01)

    def forward(x):
        return model["down"](layer(model["up"](x))[0]).square().mean()

    run = torch.compile(forward, fullgraph=True, dynamic=False) if compiles else forward
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            run(torch.randn(2, 7, 12)).backward()
        optimizer.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert all(getattr(layer, table).grad is None for table in layer.tables)
    return dict(model.named_parameters())


# torch's compiler imports a deprecated part of torch.
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_compiled_step_moves_the_tables_as_an_eager_one(config):
    torch._dynamo.reset()
    compiled, eager = trained(config, True), trained(config, False)
    for name, wanted in eager.items():
        torch.testing.assert_close(compiled[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_a_compiled_optimizer_step_is_the_eager_one():
    M, N, R, D = 9, 4, 3, 6
    state = torch.randn(M, D), torch.rand(M, D), torch.rand(M)
    grad = torch.randint(M, (N, R)), torch.randn(N, R), torch.randn(N, D)

    def step(table, first, second, ids, coef, vec):
        order, rates = sort_rows(ids, M), Rates(0.1, (0.9, 0.95), 1e-8, 1)
        norm = row_norm(order, coef, vec)
        for move in (some_rows_, all_rows_):
            move(table, Moments(first, second), RowGrad(ids, coef, vec), order, rates)
        return norm

    compiled, eager = ([x.clone() for x in state] for _ in range(2))
    # The number of different rows depends on the data.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        norm = torch.compile(step, fullgraph=True)(*compiled, *grad)
    assert torch.equal(norm, step(*eager, *grad))
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
