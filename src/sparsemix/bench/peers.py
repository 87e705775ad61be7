"""Other people's layers with our weights, so that both compute the same function."""

import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsemix.api import build_layer
from sparsemix.bench.work import Unavailable
from sparsemix.layers import AttentionConfig, DenseConfig, Layer
from sparsemix.layers.linear import Experts
from sparsemix.model import LM


def imported(name: str) -> Any:
    """A peer's module, untyped: what is used of it is used here. Raises Unavailable."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.msg}; pip install 'sparsemix[bench]'") from None


def adam(module: nn.Module, lr: float) -> torch.optim.AdamW:
    """What our optimizer is compared with: torch's fused AdamW, with our betas, without decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)


def sides_first(query: Float[Tensor, "R D"], num_heads: int) -> Float[Tensor, "R D"]:
    """Our query rows (H, 2, C) in the order (2, H, C) of both product-key peers; twice with 2 for num_heads is back."""
    return query.view(num_heads, 2, -1, query.shape[1]).transpose(0, 1).reshape_as(query)


def heads_first(query: Float[Tensor, "R D"], num_heads: int) -> Float[Tensor, "R D"]:
    """The inverse of `sides_first`."""
    return query.view(2, num_heads, -1, query.shape[1]).transpose(0, 1).reshape_as(query)


def our_peer(num_experts: int, d_model: int, num_heads: int, top_k: int, d_key: int) -> Layer:
    """A `peer` layer as PEER-pytorch computes it: sub-keys per head, no norm of queries, no query bias."""
    settings = {"num_experts": num_experts, "num_heads": num_heads, "top_k": top_k, "d_key": d_key}
    layer = build_layer({"kind": "peer", **settings, "query_norm": "none", "share_keys": False}, d_model)
    return without_query_bias(layer)


def without_query_bias(layer: Layer) -> Layer:
    """The layer with its query bias held at 0: the peers have none."""
    bias = layer.get_parameter("query.bias")
    bias.requires_grad_(False)
    return layer


@torch.no_grad()
def peer_pytorch(ours: Layer, share_tables: bool = False) -> nn.Module:
    """PEER-pytorch 0.2.2 with the weights of `ours`. Its softmax over the k of a head is asked for by
    non_competing_scores=False, its dim_key is one half of our d_key, its keys lie as (H, n, 2, C)."""
    config, keys = ours.config, ours.get_parameter("sub_keys")
    w_in, w_out = ours.get_parameter("w_in"), ours.get_parameter("w_out")
    assert not isinstance(config, (Tensor, nn.Module))
    # Not drawn at random first: a million rows take seconds.
    with torch.device("meta"):
        layer = imported("PEER_pytorch").PEER(
            w_in.shape[1],
            heads=config.num_heads,
            num_experts=config.num_experts,
            num_experts_per_head=config.top_k,
            product_key_topk=config.top_k,
            dim_key=config.d_key // 2,
            non_competing_scores=False,
        )
    layer.weight_down_embed.weight = w_in if share_tables else nn.Parameter(w_in.clone())
    layer.weight_up_embed.weight = w_out if share_tables else nn.Parameter(w_out.clone())
    layer.to_queries[0].weight = nn.Parameter(sides_first(ours.get_parameter("query.weight"), config.num_heads))
    layer.keys = nn.Parameter(keys.permute(0, 2, 1, 3).contiguous())
    return layer


def peer_names(entry: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Entries of PEER-pytorch's parameters under our names and in our layout."""
    return {
        "query.weight": heads_first(entry["to_queries.0.weight"], num_heads),
        "sub_keys": entry["keys"].permute(0, 2, 1, 3),
        "w_in": entry["weight_down_embed.weight"],
        "w_out": entry["weight_up_embed.weight"],
    }


def our_pkm(num_values: int, d_model: int, num_heads: int, top_k: int, d_key: int) -> Layer:
    """A `pkm` layer as product-key-memory computes it, but for its norm of queries."""
    settings = {"num_values": num_values, "num_heads": num_heads, "top_k": top_k, "d_key": d_key}
    return without_query_bias(build_layer({"kind": "pkm", **settings, "query_norm": "none"}, d_model))


@torch.no_grad()
def product_key_memory(ours: Layer) -> nn.Module:
    """product-key-memory 0.3.0 with the weights of `ours`. Its LayerNorm is over each half of a query, ours over the
    whole: both are taken out, and what is compared is the memory."""
    config, values = ours.config, ours.get_parameter("value_vectors")
    assert not isinstance(config, (Tensor, nn.Module))
    with torch.device("meta"):
        layer = imported("product_key_memory").PKM(
            values.shape[1], heads=config.num_heads, num_keys=config.n, topk=config.top_k, dim_head=config.d_key // 2
        )
    layer.norm = nn.Identity()
    layer.values.weight = nn.Parameter(values.clone())
    layer.to_queries.weight = nn.Parameter(sides_first(ours.get_parameter("query.weight"), config.num_heads))
    layer.keys = nn.Parameter(ours.get_parameter("sub_keys").permute(0, 2, 1, 3).contiguous())
    return layer


def pkm_names(entry: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Entries of product-key-memory's parameters under our names and in our layout."""
    return {
        "query.weight": heads_first(entry["to_queries.weight"], num_heads),
        "sub_keys": entry["keys"].permute(0, 2, 1, 3),
        "value_vectors": entry["values.weight"],
    }


def transformers_experts(bank: Experts, implementation: str) -> nn.Module:
    """The expert bank of transformers' Qwen3-MoE on the same tensors: its layout is ours."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, D, F = bank.down.shape
    config = Qwen3MoeConfig(num_experts=E, hidden_size=D, moe_intermediate_size=F, hidden_act="silu")
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = bank.gate_up, bank.down
    return experts


@torch.no_grad()
def transformers_llama(model: LM) -> Any:
    """transformers' Llama with the weights of a dense model of ours."""
    transformers = imported("transformers")
    mixer, ffn = model.config.blocks[0].children()
    assert isinstance(mixer, AttentionConfig) and isinstance(ffn, DenseConfig)
    settings = transformers.LlamaConfig(
        hidden_size=model.config.d_model,
        intermediate_size=ffn.d_ff,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=mixer.num_heads,
        num_key_value_heads=mixer.kv_heads,
        vocab_size=model.config.vocab_size,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    llama = transformers.LlamaForCausalLM(settings)
    names = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"mixer.{part}": f"self_attn.{part}_proj" for part in "qkvo"}
    names |= {f"ffn.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    state = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.get_parameter("weight")}
    for i, block in enumerate(model.blocks):
        for ours, theirs in names.items():
            state[f"model.layers.{i}.{theirs}.weight"] = block.get_parameter(f"{ours}.weight")
    llama.load_state_dict(state | {"lm_head.weight": model.embed.weight}, assign=True)
    return llama.eval()


def our_moe(num_experts: int, d_model: int, d_ff: int, capacity_factor: float, activation: str) -> Layer:
    """A `moe` layer as both capacity peers compute it: two experts a token, gates that sum to one, a fixed capacity."""
    sizes = {"num_experts": num_experts, "top_k": 2, "d_ff": d_ff, "capacity_factor": capacity_factor / 2}
    rules = {"normalize_gates": True, "balance_weight": 0.0, "activation": activation}
    return build_layer({"kind": "moe", **sizes, **rules}, d_model)


@torch.no_grad()
def mixture_of_experts(ours: Layer, capacity_factor: float) -> nn.Module:
    """mixture-of-experts 0.2.3 with the weights of `ours` (gelu). Its second expert is used always
    (second_policy_train="all"; its default drops some at random); capacity_factor counts seats a token, not a pick."""
    up, down, router = (ours.get_parameter(name) for name in ("experts.up", "experts.down", "router.weight"))
    layer = imported("mixture_of_experts").MoE(
        up.shape[2],
        num_experts=len(up),
        hidden_dim=up.shape[1],
        activation=nn.GELU,
        second_policy_train="all",
        capacity_factor_train=capacity_factor,
    )
    layer.gate.w_gating = nn.Parameter(router.mT.clone())
    layer.experts.w1, layer.experts.w2 = nn.Parameter(up.mT.clone()), nn.Parameter(down.mT.clone())
    return layer


def mixture_names(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries of mixture-of-experts' parameters under our names and in our layout."""
    names = {"router.weight": "gate.w_gating", "experts.up": "experts.w1", "experts.down": "experts.w2"}
    return {mine: entry[theirs].mT for mine, theirs in names.items()}


@torch.no_grad()
def st_moe(ours: Layer, capacity_factor: float) -> nn.Module:
    """st-moe-pytorch 0.1.8 with the weights of `ours` (geglu). Its biases are held at 0 and its multiplicative bias at
    1; every expert is used always (threshold 0); no gradient goes straight through the dispatch, as in ours."""
    first, down = ours.get_parameter("experts.gate_up"), ours.get_parameter("experts.down")
    F, D = down.shape[2], down.shape[1]
    layer = imported("st_moe_pytorch").MoE(
        D,
        num_experts=len(down),
        expert_hidden_mult=1.5 * (F + 0.5) / D,
        threshold_train=0.0,
        capacity_factor_train=capacity_factor,
        straight_through_dispatch_tensor=False,
    )
    layer.gate.to_gates.weight.copy_(ours.get_parameter("router.weight"))
    for e, expert in enumerate(layer.experts.experts):
        inner, act, outer = expert.net
        # It splits into (up, gate), ours is (gate, up).
        inner.weight.copy_(first[e].roll(F, 0))
        outer.weight.copy_(down[e])
        for still, value in ((inner.bias, 0.0), (outer.bias, 0.0), (act.mult_bias, 1.0)):
            still.requires_grad_(False).fill_(value)
    return layer


def st_moe_names(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries of st-moe-pytorch's parameters under our names and in our layout."""
    experts = sorted({int(name.split(".")[2]) for name in entry if name.startswith("experts.experts.")})
    first = torch.stack([entry[f"experts.experts.{e}.net.0.weight"] for e in experts])
    down = torch.stack([entry[f"experts.experts.{e}.net.2.weight"] for e in experts])
    both = {"experts.gate_up": first.roll(first.shape[1] // 2, 1), "experts.down": down}
    return {"router.weight": entry["gate.to_gates.weight"]} | both
