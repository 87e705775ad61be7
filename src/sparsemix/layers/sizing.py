"""Sizes of layers, for everybody who has to choose some: comparisons, reproductions, conversions and recipes."""

import math
from typing import Any

from sparsemix.config import ConfigError, nearest
from sparsemix.layers import DenseConfig, LayerConfig
from sparsemix.layers.linear import num_matrices
from sparsemix.layers.parity import inner_width, num_experts_at_parity

# Settings below this share of the dense layer's cost, or above its inverse, are no fair comparison.
TOLERANCE = 0.10
# Adam keeps three tensors of a table's size; beyond this a laptop's memory goes to one layer.
MAX_TABLE_PARAMS = 128_000_000
# A query meets half of d_key channels on each side. With 3 or 4 of them most of 256 sub-keys lie inside the others'
# hull, where no query finds them among its best (docs/LOG.md).
MIN_KEY = 16


def key_width(d_model: int) -> int:
    """d_key of a product-key layer: d_model / 4, which is the paper's 256 at its width of 1,024, even, and no less than
    MIN_KEY."""
    return max(MIN_KEY, d_model // 8 * 2)


def predictor_width(d_model: int) -> int:
    """Inner width of Mixture-of-Depths' predictor, which then costs about 2 % of a dense block."""
    return max(8, d_model // 4)


def sized_ffn(kind: str, dense: DenseConfig, d_model: int, seq_len: int) -> dict[str, Any]:
    """Settings of a `kind` layer that costs what `dense` costs per token, within 10 %. Raises ConfigError."""
    refuse_unknown(kind)
    target = dense.cost(d_model, 1).flops
    settings = {"kind": kind, **nearest_sizes(kind, dense, d_model)}
    # Of a whole sequence: an expert that picks tokens takes at least one.
    spent = LayerConfig.model_validate(settings).cost(d_model, seq_len).flops / seq_len
    if abs(spent / target - 1) > TOLERANCE:
        raise ConfigError(
            f"kinds={kind} cannot be sized to the dense layer's {target:.3g} FLOPs per token (nearest {spent:.3g}); "
            "widen the model or its d_ff"
        )
    return settings


def refuse_unknown(kind: str) -> None:
    """Raises ConfigError where `kind` is no feed-forward that can be sized."""
    if kind not in SIZES:
        known = ["dense", "mod", *SIZES]
        raise ConfigError(f"kinds={kind} is none of {', '.join(known)}{nearest(kind, known)}")


def nearest_sizes(kind: str, dense: DenseConfig, d_model: int) -> dict[str, Any]:
    """Settings of a `kind` of SIZES that come nearest to what `dense` costs per token, however near that is."""
    return SIZES[kind](dense.cost(d_model, 1).flops, dense, d_model)


def mod_wrap(d_model: int) -> dict[str, Any]:
    """MoD around every other block, at the paper's 12.5 %."""
    return {"at": "every-2", "kind": "mod", "capacity": 0.125, "predictor_width": predictor_width(d_model)}


def _moe(target: float, dense: DenseConfig, d_model: int) -> dict[str, Any]:
    """8 experts, 2 of them a token, each of about half the dense width: 4 times the parameters."""
    E, K = 8, 2
    d_ff = (target - 2 * d_model * E) / (2 * K * num_matrices(dense.activation) * d_model)
    return {"num_experts": E, "top_k": K, "d_ff": max(1, int(d_ff)), "activation": dense.activation}


def _expert_choice(target: float, dense: DenseConfig, d_model: int) -> dict[str, Any]:
    """The experts of `moe`, each taking a quarter of the tokens: 2 a token on average."""
    moe = _moe(target, dense, d_model)
    return {"num_experts": 8, "capacity_factor": 2.0, "d_ff": moe["d_ff"], "activation": dense.activation}


def _mode(target: float, dense: DenseConfig, d_model: int) -> dict[str, Any]:
    """8 experts and 2 no-ops, 2 of the 10 a token: 1.6 experts at the balance loss's target, so wider than `moe`'s."""
    E, M, K = 8, 2, 2
    d_ff = (target - 2 * d_model * (E + M)) / (2 * K * E / (E + M) * num_matrices(dense.activation) * d_model)
    widths = {"d_ff": max(1, int(d_ff)), "activation": dense.activation}
    return {"num_experts": E, "num_noop": M, "top_k": K, **widths}


def _mh_moe(target: float, dense: DenseConfig, d_model: int) -> dict[str, Any]:
    """2 heads, 2 experts a sub-token; the inner width pays for head and merge, the number of experts matches the
    parameters of `moe` (arXiv:2411.16205, eqs. 8 and 9)."""
    if d_model % 2:
        raise ConfigError(f"kind=mh_moe needs an even d_model, not {d_model}")
    H, K, m = 2, 2, num_matrices(dense.activation)
    moe = _moe(target, dense, d_model)
    E, d_ff = 8, 1
    for _ in range(4):  # E enters the router's cost, and so the width; it settles at once
        d_ff = max(1, int(inner_width(d_model, target / (2 * m * d_model), K, m, E)))
        E = max(K, round(num_experts_at_parity(d_model, moe["d_ff"] * moe["num_experts"], H, d_ff, m)))
    inner = {"kind": "moe", "num_experts": E, "top_k": K, "d_ff": d_ff, "activation": dense.activation}
    return {"num_heads": H, "inner": inner}


def _peer(target: float, dense: DenseConfig, d_model: int) -> dict[str, Any]:
    """Two rows an expert; from width 128 on 16 experts a head."""
    n, lookup = _product_keys(target, d_model, 16, 2)
    return {"num_experts": n * n, **lookup}


def _pkm(target: float, dense: DenseConfig, d_model: int) -> dict[str, Any]:
    """One row a value; from width 128 on 32 values a head: the expert FLOPs of PEER."""
    n, lookup = _product_keys(target, d_model, 32, 1)
    return {"num_values": n * n, **lookup}


def _product_keys(target: float, d_model: int, K: int, rows: int) -> tuple[int, dict[str, Any]]:
    """Sub-keys a side, and the settings of the look-up. A pick reads `rows` rows.

    Below width 128 a head for 16 channels, the largest power of two up to 256 sub-keys that leaves K / 2 picks a head,
    and as many picks as the FLOPs allow: tables grow with the width, as in PEER's paper. From 128 on 8 heads of K picks
    (more where the tables are full) and as many sub-keys as the FLOPs allow, which meet the others there."""
    d_key = key_width(d_model)
    largest = min(1024, int((MAX_TABLE_PARAMS / (rows * d_model)) ** 0.5))
    heads = min(8, max(1, round(d_model / 16)))

    def side(heads: int) -> int:
        """Sub-keys a side that the FLOPs left after queries and looked-up rows pay for."""
        return int((target / heads - 2 * d_model * d_key - 2 * rows * K * d_model) / (2 * d_key))

    def picks(n: int) -> int:
        """Picks a head that the FLOPs left after queries and sub-keys pay for: PEER's, and PKM's of half the cost."""
        return round((target / heads - 2 * d_key * (d_model + n)) / (4 * d_model)) * (2 // rows)

    if d_model < 128:
        n = next((n for n in (256, 128, 64, 32) if picks(n) >= K // 2), 16)
        return n, {"num_heads": heads, "top_k": max(1, picks(n)), "d_key": d_key}
    while side(heads) > largest:
        heads += 1
    return max(math.isqrt(K - 1) + 1, side(heads)), {"num_heads": heads, "top_k": K, "d_key": d_key}


SIZES = {
    "moe": _moe,
    "expert_choice": _expert_choice,
    "pkm": _pkm,
    "peer": _peer,
    "mh_moe": _mh_moe,
    "mode": _mode,
}


def example(kind: str, d_model: int, seq_len: int) -> LayerConfig | None:
    """A layer of `kind` to quote costs for: feed-forwards sized to a dense one of 8/3 d_model, MoD around its block."""
    dense: dict[str, Any] = {"kind": "dense", "d_ff": d_model * 8 // 3}
    mixer = {"kind": "attention", "num_heads": 4}
    block = {"kind": "block", "mixer": mixer, "ffn": dense}
    wrapped = {**mod_wrap(d_model), "inner": block}
    del wrapped["at"]
    examples = {"dense": dense, "attention": mixer, "block": block, "mod": wrapped}
    if kind in SIZES:
        examples[kind] = sized_ffn(kind, DenseConfig(d_ff=d_model * 8 // 3), d_model, seq_len)
    return LayerConfig.model_validate(examples[kind]) if kind in examples else None
