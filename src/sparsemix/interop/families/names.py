"""One parameter, two names: this library's, and that of Llama and its relatives."""

TOP = {"embed": "embed_tokens", "norm": "norm"}
INSIDE = {
    "mixer_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"mixer.{name}": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"mixer.{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")},
    **{f"ffn.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "ffn.router": "mlp.gate",
}
# Parameters of the experts' bank have no module of their own.
BANK = {"ffn.experts.gate_up": "mlp.experts.gate_up_proj", "ffn.experts.down": "mlp.experts.down_proj"}


def llama_name(name: str) -> str:
    """blocks.3.mixer.q.weight -> model.layers.3.self_attn.q_proj.weight. Raises KeyError for what has no equal."""
    if name == "lm_head.weight":
        return name
    owner, _, kind = name.rpartition(".")
    if owner in TOP:
        return f"model.{TOP[owner]}.{kind}"
    _, layer, inside = name.split(".", 2)
    if inside in BANK:
        return f"model.layers.{layer}.{BANK[inside]}"
    return f"model.layers.{layer}.{INSIDE[inside.rpartition('.')[0]]}.{kind}"
