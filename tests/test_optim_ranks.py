"""Tables under several ranks: two of them, each with half of the batch, train as one process does."""

import copy

import torch
from torch import nn

from lookups import LAYERS, PEER, inputs, layer_of, tables_of
from ranks import on_ranks
from sparsemix.api import build_optimizer
from sparsemix.optim import tables

STEPS = 4
# Batch statistics are each rank's own, by design; a relu leaves picked rows without any gradient.
KINDS = {
    **{name: config | {"query_norm": "layer"} for name, config in LAYERS.items()},
    "peer_relu": PEER | {"query_norm": "layer", "activation": "relu"},
}
# Of few tokens: most rows are picked by none, or by one rank.
BATCHES = [x[:, :3] for x in inputs(2 * STEPS)]


def trained(config, rank=None, moment="full", clip=0.1, ours=True):
    """Parameters after a few steps of one process on whole batches, or of a rank on its rows of them."""
    layer = layer_of(config)
    model = layer if rank is None else nn.parallel.DistributedDataParallel(layer)
    optimizer = build_optimizer(layer, 0.02, table_moment=moment)
    if not ours:
        optimizer.release()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        # Two micro-batches a step.
        for x in BATCHES[2 * step : 2 * step + 2]:
            y, _ = model(x if rank is None else x[rank : rank + 1])
            (20 * y.square().mean()).backward()
        if ours:
            optimizer.clip_grad_norm_(layer.parameters(), clip)
        else:
            nn.utils.clip_grad_norm_(layer.parameters(), clip)
        optimizer.step()
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


def all_trained(rank):
    found = {name: trained(config, rank) for name, config in KINDS.items()}
    found |= {f"{name} by row": trained(KINDS[name], rank, "row") for name in LAYERS}
    # The controls: each rank's own picks alone; and torch's AdamW on the dense gradients.
    exchange = tables.picked_by_any
    tables.picked_by_any = lambda lent: [tables.take_picks(table) for table in lent]
    found["alone"] = trained(KINDS["peer_relu"], rank)
    tables.picked_by_any = exchange
    found["dense"] = trained(KINDS["peer"], rank, ours=False)
    return found


def assert_same(got, wanted):
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def differs(got, wanted):
    return max(float((got[name] - value).abs().max()) for name, value in wanted.items())


def test_two_ranks_train_tables_as_one_process_and_leave_unpicked_rows_alone(tmp_path):
    ranks = on_ranks(all_trained, tmp_path)
    for name, config in KINDS.items():
        wanted = trained(config)
        for rank in ranks:
            assert_same(rank[name], wanted)
        start = tables_of(layer_of(config))
        for table, before in start.items():
            stayed = (ranks[0][name][table] == before).all(dim=1)
            assert torch.equal(stayed, (wanted[table] == before).all(dim=1)) and 0 < stayed.sum() < len(stayed)
    for name in LAYERS:
        for rank in ranks:
            assert_same(rank[f"{name} by row"], trained(KINDS[name], moment="row"))
    # The controls must fail.
    alone, one = [rank["alone"] for rank in ranks], trained(KINDS["peer_relu"])
    assert max(differs(rank, one) for rank in alone) > 1e-3
    assert differs(ranks[0]["dense"], trained(KINDS["peer"])) > 5e-3


def test_copies_of_layers_train_alone_under_ranks_too(monkeypatch):
    """A layer whose tables no optimizer of ours has notes nothing."""
    layer = layer_of(PEER)
    owner = build_optimizer(layer, 0.1)
    twin = copy.deepcopy(layer)
    monkeypatch.setattr("sparsemix.ops.row_grad.factored.several_ranks", lambda: True)
    for each in (layer, twin):
        each(inputs(1)[0])[0].square().mean().backward()
        assert type(each.w_in.grad) is torch.Tensor
    assert tables.take_picks(layer.w_in).any() and not tables.take_picks(twin.w_in).any()
    assert layer.tables_owner() is owner


def test_sharded_tables_have_dense_gradients(monkeypatch):
    layer = layer_of(PEER)

    class Sharded(nn.Parameter):
        pass

    layer.w_in = Sharded(layer.w_in.detach())
    optimizer = build_optimizer(layer, 0.1)
    assert not layer.row_grads and len(optimizer.param_groups) == 2
    layer(inputs(1)[0])[0].square().mean().backward()
    assert type(layer.w_in.grad) is torch.Tensor
