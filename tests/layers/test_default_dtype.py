"""The process's default number type, which other libraries set, changes no result: whatever is made says its own."""

import contextlib
from copy import deepcopy

import pytest
import torch
from cases import ATTENTION, BASES, MODE, MOE, PEER, PKM, tokens
from test_settings import OTHER

import sparsemix
from sparsemix.config import parse
from sparsemix.generation import generate
from sparsemix.layers import Ctx, LayerConfig, update
from sparsemix.model import ModelConfig
from sparsemix.optim.tables import _new_slots

D = 20
CLASHES = {"mode": "routing", "mod": "sampling"}
OTHERWISE = {kind: {k: v for k, v in OTHER[kind].items() if k != CLASHES.get(kind)} for kind in OTHER.keys() & BASES}
KINDS = BASES | {f"{kind}_otherwise": BASES[kind] | OTHERWISE[kind] for kind in sorted(OTHERWISE)}
KINDS["mode_expert_choice"] = MODE | {"routing": "expert_choice"}
DEFAULTS = (torch.float64, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def defaulting(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def assert_equal(mine, other):
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def steps(layer, x, ctx):
    found, state = {}, {name: value.clone() for name, value in layer.state_dict().items()}
    for step in range(2):
        layer.zero_grad()
        torch.manual_seed(step)
        y, aux = layer(x, ctx)
        total = y.square().sum() + sum(aux.losses.values())
        total.backward()
        update(layer, aux.stats)
        found |= {f"{step} y": y, f"{step} total": total}
        found |= {f"{step} {kind} {k}": v for kind in ("losses", "stats") for k, v in getattr(aux, kind).items()}
        found |= {f"{step} {k} grad": p.grad for k, p in layer.named_parameters() if p.grad is not None}
    found |= {f"after {name}": value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        found["causal"] = layer.eval()(x, Ctx(valid=ctx.valid, causal=True))[0]
    layer.train().load_state_dict(state)
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_same_under_every_default(kind):
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, 4:] = False
    layer, x = parse(LayerConfig, KINDS[kind]).build(D).train(), tokens(2, 7, D).float()
    wanted = steps(layer, x, Ctx(valid=valid))
    for default in DEFAULTS:
        with defaulting(default):
            assert_equal(steps(layer, x, Ctx(valid=valid)), wanted)


def trained(model, batches, generated):
    """Losses, weights, the optimizer's state and the tokens drawn afterwards."""
    optimizer, found = sparsemix.build_optimizer(model, lr=1e-3), {}
    for step, batch in enumerate(batches):
        mean, nats, aux = model.train().loss(batch[:, :-1], batch[:, 1:])
        (mean + sum(aux.losses.values())).backward()
        norm = optimizer.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sparsemix.update(model, aux.stats)
        found |= {f"{step} mean": mean.detach(), f"{step} nats": nats, f"{step} norm": norm}
    found |= model.state_dict()
    drawn = generate(model.eval(), batches[0][:, :5], generated, valid=batches[0][:, :5] > 2)
    found["drawn"] = torch.stack([step.token_ids for step in drawn])
    for i, slots in optimizer.state_dict()["state"].items():
        found |= {f"{i} {name}": value for name, value in slots.items() if isinstance(value, torch.Tensor)}
    return {name: value.clone() for name, value in found.items()}


def test_a_model_trains_and_generates_the_same_under_every_default():
    ffns = [MOE | {"bias_rate": 0.1, "capacity_factor": 1.0}, PEER, PKM]
    blocks = [{"kind": "block", "mixer": ATTENTION, "ffn": ffn} for ffn in ffns]
    config = parse(ModelConfig, {"d_model": D, "vocab_size": 31, "seq_len": 12, "blocks": blocks})
    batches = torch.randint(3, 31, (3, 2, 12))
    batches[0, :, 0] = 1
    model = config.build()
    wanted = trained(deepcopy(model), batches, 6)
    for default in DEFAULTS:
        with defaulting(default):
            assert_equal(trained(deepcopy(model), batches, 6), wanted)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_a_table_counts_its_steps_beyond_256(default):
    with defaulting(default):
        slots = _new_slots(torch.zeros(3, 2), by_row=False, catch_up=False)
        slots["step"] += 2**20
        slots["step"] += 1
    assert int(slots["step"]) == 2**20 + 1
