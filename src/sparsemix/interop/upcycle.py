"""Weights of a new layer from those of the feed-forward whose place it takes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsemix.interop.copies import Bank, num_slices, scale
from sparsemix.layers import DenseConfig, LayerConfig, MoDConfig, PEERConfig
from sparsemix.layers.expert_choice import ExpertChoice
from sparsemix.layers.linear import Experts
from sparsemix.layers.mod import MoD
from sparsemix.layers.mode import MoDE
from sparsemix.layers.moe import MoE

# What a parameter of the new layer was made from: parameters of the feed-forward, or a sentence.
Made = dict[str, tuple[str, ...] | str]
# The logit at which an untrained predictor lets every token pass: soon moved, and above 0.
PASS = 0.5


def copy(layer: nn.Module, new: LayerConfig, old: DenseConfig, source: Mapping[str, Tensor], noise: float) -> Made:
    """Fill `layer` with copies of the feed-forward `source`, noise drawn from the global generator."""
    if isinstance(new, DenseConfig):
        return _copy_dense(layer, source, noise)
    if isinstance(new, PEERConfig):
        return _copy_neurons(layer, new, old, source, noise)
    assert isinstance(new, Bank) and isinstance(layer, (MoE, MoDE, ExpertChoice))
    return _copy_experts(layer, new, old, source, noise)


def _copy_dense(layer: nn.Module, source: Mapping[str, Tensor], noise: float) -> Made:
    both = {name: tensor for name, tensor in layer.named_parameters() if name in source}
    for name, tensor in both.items():
        tensor.copy_(_noisy(source[name], noise))
    return {name: (name,) for name in both}


def _copy_experts(
    layer: MoE | MoDE | ExpertChoice, new: Bank, old: DenseConfig, source: Mapping[str, Tensor], noise: float
) -> Made:
    """Expert e is slice e mod G of the feed-forward's neurons, G slices making up one whole.

    The experts of one whole share their router row, so a token that picks one of them picks all. No-op rows start at
    the mean of the others: the largest score is then an expert's."""
    E, G, f = new.num_experts, num_slices(new, old), new.d_ff
    bank: Experts = layer.experts  # type: ignore[assignment]
    names = tuple(name for name in ("gate.weight", "up.weight") if name in source)
    first = torch.cat([source[name].unflatten(0, (G, f)) for name in names], dim=1).repeat(E // G, 1, 1)  # (E, 2F, D)
    down = scale(new, old) * source["down.weight"].unflatten(1, (G, f)).transpose(0, 1).repeat(E // G, 1, 1)
    bank.first.copy_(_noisy(first, noise))
    bank.down.copy_(_noisy(down, noise))
    made: Made = {"experts.gate_up" if len(names) == 2 else "experts.up": names, "experts.down": ("down.weight",)}
    if bank.sub_norm is not None and "sub_norm.weight" in source:
        bank.sub_norm.copy_(source["sub_norm.weight"].view(G, f).repeat(E // G, 1))
        made["experts.sub_norm"] = ("sub_norm.weight",)
    rows = layer.router.weight[:E].unflatten(0, (E // G, G))  # (R, G, D)
    rows.copy_(rows[:, :1].clone().expand_as(rows))
    layer.router.weight[E:] = layer.router.weight[:E].mean(dim=0)
    if getattr(layer, "shared", None) is not None:
        made |= {f"shared.{name}": said for name, said in silence(layer.shared).items()}  # type: ignore[arg-type]
    return made


def _copy_neurons(
    layer: nn.Module, new: PEERConfig, old: DenseConfig, source: Mapping[str, Tensor], noise: float
) -> Made:
    """Expert e is neuron e mod F; rows beyond whole copies are silent. Queries start at 0, so all gates are even."""
    N, F = new.num_experts, old.d_ff
    whole, weights = N // F, dict(layer.named_parameters())
    rows = torch.arange(whole * F) % F
    weights["w_in"][: whole * F] = _noisy(source["up.weight"], noise)[rows]
    factor = N / (new.num_heads * whole)
    weights["w_out"].zero_()[: whole * F] = factor * _noisy(source["down.weight"].T, noise)[rows]
    even = ("query.weight", "query.bias")
    for name in even:
        weights[name].zero_()
    return {"w_in": ("up.weight",), "w_out": ("down.weight",), **dict.fromkeys(even, "zeros")}


def _noisy(weight: Tensor, noise: float) -> Tensor:
    return weight + noise * weight.std() * torch.randn_like(weight) if noise else weight


LAST = ("experts.down", "down.weight", "down.bias", "merge.weight", "merge.bias", "w_out", "value_vectors")


def silence(layer: nn.Module, shared: bool = True) -> Made:
    """Zero the parameters that end the layer (and its shared expert, unless that is what is kept): its output is 0, and
    they learn from the first step on."""
    weights = dict(layer.named_parameters())
    ends = (*LAST, "shared.down.weight", "shared.down.bias") if shared else LAST
    last = [name for name in ends if name in weights]
    assert any(name in LAST for name in last), "no parameter is known to end this layer"
    for name in last:
        weights[name].zero_()
    return dict.fromkeys(last, "zeros")


def open_gates(layer: MoD, config: MoDConfig) -> Made:
    """Scores of 0, at which the gate is 1, and a causal rule that lets every token pass until it is trained."""
    layer.router.weight.zero_()
    made: Made = {"router.weight": "zeros"}
    if config.predicts:
        layer.predictor.down.weight.zero_()
        assert layer.predictor.down.bias is not None
        layer.predictor.down.bias.fill_(PASS)
        made |= {"predictor.down.weight": "zeros", "predictor.down.bias": f"{PASS:g}, so that every token passes"}
    if layer.threshold is not None:
        # Below every score; it counts as one observation, which training soon outweighs.
        layer.threshold.threshold.fill_(-1.0)
        layer.threshold.num_updates.fill_(1)
    return made
