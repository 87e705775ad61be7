"""Precision and memory of product-key layers, against a gather of the picked rows."""

import pytest
import torch
from cases import PEER, PKM
from memory import allocated
from torch.nn import functional as F

from sparsemix.config import parse
from sparsemix.layers import LayerConfig

SIZE = {"peer": "num_experts", "pkm": "num_values"}
KINDS = {"peer": PEER, "pkm": PKM}


def naive(layer, x):
    """The layer by gather and einsum, in the dtype of its parameters; scores and picks in at least fp32."""
    c, exact = layer.config, torch.promote_types(x.dtype, torch.float32)
    query = F.linear(x.to(exact), layer.query.weight.to(exact), layer.query.bias.to(exact))
    halves = layer.query_norm(query.view(-1, c.num_heads, c.d_key), None)[0].unflatten(2, (2, -1))
    keys = (
        layer.sub_keys.to(exact)
        if layer.sub_keys.ndim == 4
        else layer.sub_keys.to(exact)[None].expand(c.num_heads, -1, -1, -1)
    )
    left, right = (torch.einsum("nhc,hic->nhi", halves[:, :, p], keys[:, p]) for p in (0, 1))
    best, ids = (left[..., :, None] + right[..., None, :]).flatten(2).topk(c.top_k)
    gates, ids = best.softmax(-1).flatten(1).to(x.dtype), ids.flatten(1)
    if c.kind == "pkm":
        return torch.einsum("nr,nrd->nd", gates, layer.value_vectors[ids])
    hidden = F.gelu(torch.einsum("nd,nrd->nr", x, layer.w_in[ids]))
    return torch.einsum("nr,nrd->nd", gates * hidden, layer.w_out[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_low_precision_errs_no_more_than_twice_a_gather_in_that_precision(config, query_norm, dtype):
    torch.manual_seed(0)
    settings = {SIZE[config["kind"]]: 256, "num_heads": 4, "top_k": 16, "d_key": 16, "query_norm": query_norm}
    layer = parse(LayerConfig, config | settings).build(64).to(dtype).train()
    x = torch.randn(1, 200, 64).to(dtype)
    y, baseline = layer(x)[0][0], naive(layer, x[0])
    assert y.dtype == baseline.dtype == dtype
    exact = naive(layer.double(), x[0].double())
    mine, theirs = ((out.double() - exact).norm() / exact.norm() for out in (y, baseline))
    # Sums of 64 terms in fp32, rounded to the type: what that explains, if it is more than twice a gather's own luck.
    limit = 9 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    assert mine <= max(2 * theirs, limit)
    assert mine < (1e-5 if dtype == torch.float32 else 1e-2)


# One unit is a token's d_model + num_heads * top_k numbers of 4 bytes.
HEADS, TOP_K, WIDTH = 8, 16, 64
UNIT = 4 * (WIDTH + HEADS * TOP_K)
LARGEST, PEAK = 3, 26
CHUNK = 4 * 2**22


def training_step(kind, n, T, through=None):
    config = parse(LayerConfig, {"kind": kind, SIZE[kind]: n * n, "num_heads": HEADS, "top_k": TOP_K, "d_key": 8})
    layer, x = config.build(WIDTH), torch.randn(1, T, WIDTH, requires_grad=True)

    def step():
        y = layer(x)[0] if through is None else through(layer, x[0])
        y.square().sum().backward()

    return allocated(step)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_a_training_step_is_larger_than_tokens_times_width_plus_picks(kind):
    T = 12_000
    assert training_step(kind, 64, T).largest <= max(LARGEST * UNIT * T, CHUNK)
    # All scores, (T, heads, 2 * 64), would be.
    assert max(LARGEST * UNIT * T, CHUNK) < 4 * T * HEADS * 2 * 64


def per_token(kind, n, T, through=None):
    """Peak bytes that each further token adds: tables and chunks, which do not grow, fall out."""
    return (training_step(kind, n, 2 * T, through).peak - training_step(kind, n, T, through).peak) / T


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_tokens_times_width_plus_picks_whatever_the_number_of_experts(kind):
    # From 4,096 tokens on the scores of 64 sub-keys a side fill a chunk.
    few, many = per_token(kind, 64, 4096), per_token(kind, 128, 4096)
    assert many <= PEAK * UNIT
    assert many <= 1.01 * few


@pytest.mark.parametrize("kind", KINDS)
def test_a_gather_of_the_picked_rows_would_not_fit_that_bound(kind):
    assert per_token(kind, 32, 64, naive) > PEAK * UNIT
    assert training_step(kind, 32, 512, naive).largest > LARGEST * UNIT * 512
