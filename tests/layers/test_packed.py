"""Packed inference is the forward that was trained."""

import math

import pytest
import torch
from cases import ATTENTION, BASES, DENSE, MOE, build, tokens
from test_ternary import MODEL, TERNARY

from sparsemix.api import build_model, build_optimizer
from sparsemix.checkpoint import load_weights, save_weights
from sparsemix.config import ConfigError
from sparsemix.layers import Ctx, update
from sparsemix.layers.linear import Experts, Linear
from sparsemix.layers.packed import PackedExperts, PackedLinear, TernaryWeight, pack_ternary
from sparsemix.layers.ternary import PrecisionConfig
from sparsemix.model import token_nats
from sparsemix.ops import ternary_mm as op
from sparsemix.ops.flop_counter import count_flops

MH_MOE = BASES["mh_moe"]
LAYERS = {
    "attention": ATTENTION | TERNARY,
    "dense": DENSE | TERNARY,
    "dense_relu": DENSE | TERNARY | {"activation": "relu"},
    "dense_no_norm": DENSE | {"precision": {"weights": "ternary", "sub_norm": False}},
    "moe": MOE | TERNARY | {"shared_d_ff": 4},
    "moe_gelu": MOE | TERNARY | {"activation": "gelu"},
    "mh_moe": MH_MOE | TERNARY | {"inner": MOE | TERNARY},
    "mode": {"kind": "mode", "num_experts": 4, "num_noop": 2, "top_k": 2, "d_ff": 3} | TERNARY,
    "moe_capacity": MOE | TERNARY | {"capacity_factor": 0.5},
    "mh_moe_inner": MH_MOE | {"inner": MOE | TERNARY},
}


def far(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("T", [1, 7, 63])
@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_is_the_layer_that_was_trained(name, T):
    layer, x = build(LAYERS[name], train=False).float(), tokens(2, T).float()
    wanted = layer(x)[0].detach()
    assert far(pack_ternary(layer)(x)[0], wanted) <= 1e-6


def test_the_sums_of_codes_are_equal_bit_for_bit(monkeypatch):
    layer, x = Linear(63, 33, precision=PrecisionConfig(weights="ternary")), torch.randn(23, 63)
    sums = {}
    monkeypatch.setattr("sparsemix.layers.ternary.F.linear", lambda a, b: sums.setdefault("trained", a @ b.mT))
    wanted = layer(x)
    monkeypatch.undo()
    packed = pack_ternary(layer)
    sums["packed"] = op.ternary_mm(op.int8_rows(x)[0], packed.weight.codes)
    assert packed.weight.codes.shape == (33, 16) and packed.weight.codes.dtype == torch.uint8
    assert torch.equal(sums["trained"].to(torch.int32), sums["packed"])
    assert torch.equal(packed(x), wanted)


def test_a_packed_layer_is_as_near_to_fp64_as_its_integers_allow():
    layer, x = build(LAYERS["dense_no_norm"], train=False), tokens(2, 23)
    up = layer.up.float()
    codes, scale = op.ternary(up.weight.detach().double())
    rows, row_scale = op.int8_rows(x[0].double())
    wanted = (rows.double() @ codes.double().T) * row_scale * scale
    assert far(pack_ternary(up)(x[0].float()).double(), wanted) <= 1e-7


def trained_model(steps=30):
    """A small model of every kind, off its initial values, whose batch statistics were observed."""
    torch.manual_seed(0)
    model = build_model(MODEL)
    optimizer = build_optimizer(model, lr=1e-2)
    for _ in range(steps):
        text = torch.randint(64, (8, 33)).sort(dim=1).values
        output = model(text[:, :-1])
        loss = token_nats(output.logits, text[:, 1:]).mean() + sum(output.aux.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update(model, output.aux.stats)
    return model.eval()


def outcome(model, text):
    """Logits, what was routed where, nats."""
    with torch.no_grad():
        output = model(text[:, :-1])
    routing = {name: v for name, v in output.aux.stats.items() if name.rpartition(".")[2] in ("counts", "passes")}
    return output.logits, routing, token_nats(output.logits, text[:, 1:])


def test_a_packed_model_says_the_same_tokens_routes_the_same_way_and_has_the_same_perplexity():
    model, text = trained_model(), torch.randint(64, (40, 33)).sort(dim=1).values
    logits, routing, nats = outcome(model, text)
    packed_logits, packed_routing, packed_nats = outcome(pack_ternary(model), text)
    assert logits[..., 0].numel() >= 1000
    best = logits.topk(2).values
    # Where the two best are this close the order is that of the last bits.
    clear = best[..., 0] - best[..., 1] >= 1e-5
    assert clear.float().mean() > 0.995
    assert torch.equal(logits.argmax(-1)[clear], packed_logits.argmax(-1)[clear])
    assert routing and set(routing) == set(packed_routing)
    assert all(torch.equal(packed_routing[name], value) for name, value in routing.items())
    perplexities = [f"{math.exp(float(n.mean())):.4f}" for n in (nats, packed_nats)]
    assert perplexities[0] == perplexities[1]
    assert far(packed_logits, logits) <= 1e-5


def test_a_packed_model_loads_bit_for_bit_and_has_two_bits_a_weight_in_memory_and_on_disk(tmp_path):
    model = trained_model(3)
    tokens_, latent = torch.randint(64, (3, 23)), dict(model.named_parameters())
    packed = pack_ternary(model)
    save_weights(packed, tmp_path / "model.safetensors")
    again = pack_ternary(build_model(MODEL, seed=1)).eval()
    assert not torch.equal(again.blocks[0].mixer.q.weight.codes, packed.blocks[0].mixer.q.weight.codes)
    load_weights(again, tmp_path / "model.safetensors")
    assert torch.equal(again(tokens_).logits, packed(tokens_).logits)
    weights = {name: m for name, m in packed.named_modules() if isinstance(m, TernaryWeight)}
    state = packed.state_dict()
    num_weights = sum(m.codes[..., 0].numel() * m.d_in for m in weights.values())
    on_disk = sum(state[f"{name}.codes"].numel() * state[f"{name}.codes"].element_size() for name in weights)
    assert 8 * on_disk / num_weights <= 2.1
    assert 8 * sum(m.codes.nbytes for m in weights.values()) / num_weights <= 2.1
    assert num_weights < sum(p.numel() for p in latent.values())


HIGH = {"float32"}


def test_every_number_of_a_model_of_every_kind_is_stored_as_the_precision_map_says():
    model = trained_model(1)
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}, "latent weights"
    state = pack_ternary(model).state_dict()
    stored = {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()}
    attention = [f"{part}.weight" for part in "qkvo"]
    feed = [f"{part}.weight" for part in ("gate", "up", "down")]
    ternary = {
        *(f"{block}.{name}" for block in (0, "1.inner", 2, 3) for name in (f"mixer.{part}" for part in attention)),
        *(f"0.ffn.{name}" for name in feed),
        *(f"1.inner.ffn.{name}" for name in ("experts.first", "experts.down", *(f"shared.{part}" for part in feed))),
        *(f"2.ffn.{name}" for name in ("head.weight", "merge.weight", "inner.experts.first", "inner.experts.down")),
    }
    codes = {f"blocks.{name}.codes" for name in ternary}
    assert {name for name, dtype in stored.items() if dtype == "uint8"} == codes
    rest = {name: dtype for name, dtype in stored.items() if name not in codes}
    assert {f"blocks.{name}.scale" for name in ternary} <= set(rest)
    # Embedding (and head), norms, routers, predictor, PEER's query network and tables.
    for name in (
        *("embed.weight", "norm.weight", "blocks.0.mixer_norm.weight", "blocks.0.mixer.sub_norm.weight"),
        *("blocks.0.ffn.sub_norm.weight", "blocks.1.router.weight", "blocks.1.predictor.up.weight"),
        *("blocks.1.inner.ffn.router.weight", "blocks.1.inner.ffn.experts.sub_norm", "blocks.2.ffn.merge_norm.weight"),
        *(
            "blocks.2.ffn.inner.router.weight",
            "blocks.3.ffn.query.weight",
            "blocks.3.ffn.sub_keys",
            "blocks.3.ffn.w_in",
        ),
    ):
        assert rest[name] == "float32", name
    counters = {name for name, dtype in rest.items() if dtype != "float32"}
    assert not [name for name in counters if not name.endswith("num_updates")], counters


def test_a_state_dict_stays_as_it_was_read_and_a_packed_bank_keeps_its_names():
    bank = pack_ternary(Experts(3, 10, 7, "swiglu", PrecisionConfig(weights="ternary")))
    state = bank.state_dict()
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in state.items()}
    assert shapes == {
        "first.codes": (torch.uint8, (3, 4, 10)),
        "first.scale": (torch.float32, (3, 2)),
        "down.codes": (torch.uint8, (3, 3, 7)),
        "down.scale": (torch.float32, (3, 1)),
        "sub_norm": (torch.float32, (3, 7)),
    }
    bank.load_state_dict(state)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"up.weight.codes": s["up.weight.codes"][:1]}, r"up\.weight\.codes must be packed .*\(2, 10\)"),
        (lambda s: s | {"up.weight.codes": s["up.weight.codes"].float()}, r"uint8 \(2, 10\), not torch\.float32"),
        (lambda s: s | {"up.weight.codes": s["up.weight.codes"] | 3}, r"up\.weight\.codes: packed weights hold a code"),
        (lambda s: s | {"up.weight.scale": torch.ones(3)}, r"size mismatch for up\.weight\.scale"),
        (lambda s: {n: v for n, v in s.items() if n != "up.weight.codes"}, r"Missing key.*up\.weight\.codes"),
    ],
    ids=["shape", "dtype", "code", "scale", "missing"],
)
def test_a_file_that_does_not_fit_is_refused(change, message):
    layer = pack_ternary(build(DENSE | TERNARY).float())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(change(layer.state_dict()))


@pytest.mark.parametrize("name", ["attention", "dense", "moe", "mh_moe", "mode"])
def test_a_packed_layer_counts_the_flops_that_its_cost_says(name):
    layer, x = build(LAYERS[name], 20, train=False).float(), torch.randn(1, 23, 20)
    wanted = count_flops(lambda: layer(x, Ctx()))
    assert count_flops(lambda: pack_ternary(layer)(x, Ctx())) == wanted > 0


def test_packing_takes_a_single_matrix_or_bank_and_refuses_what_has_nothing_to_pack():
    precision = PrecisionConfig(weights="ternary")
    assert isinstance(pack_ternary(Linear(3, 5, precision=precision)), PackedLinear)
    assert isinstance(pack_ternary(Experts(2, 3, 5, "relu", precision)), PackedExperts)
    with pytest.raises(ConfigError, match=r"^precision=float everywhere in this module"):
        pack_ternary(build(DENSE))


def test_packing_waits_for_the_warm_up_to_end():
    layer = build(DENSE | {"precision": {"weights": "ternary", "warmup_steps": 2}}, train=False).float()
    x = tokens().float()
    update(layer, {})
    with pytest.raises(ConfigError, match=r"step=1 is less than warmup_steps=2: .* train on"):
        pack_ternary(layer)
    update(layer, {})
    wanted = layer(x)[0].detach()
    assert far(pack_ternary(layer)(x)[0], wanted) <= 1e-6


def test_bf16_inputs_differ_only_by_their_own_rounding():
    layer, x = build(LAYERS["dense"], train=False).float(), tokens(2, 23).float()
    wanted = layer(x)[0].detach()
    y = pack_ternary(layer)(x.bfloat16())[0]
    assert y.dtype == torch.bfloat16
    assert 1e-6 < far(y.float(), wanted) < 0.03


def test_another_precision_leaves_codes_and_scales_as_they_are():
    layer = pack_ternary(build(DENSE | TERNARY, train=False).float())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    after = layer.bfloat16().state_dict()
    assert after["sub_norm.weight"].dtype == torch.bfloat16
    for name, value in after.items():
        if name.endswith(("codes", "scale")):
            assert torch.equal(value, before[name]), name
