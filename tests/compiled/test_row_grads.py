"""What a compiled backward pass records for the optimizer is what an eager one does."""

import pytest
import torch
from torch import nn

from sparsemix.api import build_layer, build_optimizer

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
