"""Text from a model, a token at a time: the prompt once, then steps of one token through ragged caches."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from sparsemix.config import Config, ConfigError
from sparsemix.layers import Ctx
from sparsemix.layers.attention import Attention
from sparsemix.layers.cache import Cache
from sparsemix.model import LM
from sparsemix.ops.precision import at_least_fp32

# Stands for no token in a row whose text has ended.
ENDED = -1


class Sampling(Config):
    """How the next token is drawn: the likeliest at temperature 0, else from softmax(logits / temperature), cut first
    to the top_k likeliest tokens, then to the fewest likeliest that hold at least top_p of what is left."""

    temperature: float = Field(default=1.0, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0


class Read(NamedTuple):
    """Tokens that the model has read in one call, and what its layers said of them."""

    tokens: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    stats: dict[str, Tensor]


class Step(NamedTuple):
    """The next token of every row (ENDED after its end), its log-probability in nats under the model's own
    distribution whatever the sampling (0 after the end), and what was read to find it: the prompt for the first step,
    the token before for every other."""

    token_ids: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]
    read: tuple[Read, ...]


def generate(
    model: LM,
    prompt_ids: Int[Tensor, "B T"],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    stop: Collection[int] = (),
    valid: Bool[Tensor, "B T"] | None = None,
    cache: Cache | None = None,
    chunk: int = 512,
    picks: bool = False,
) -> Iterator[Step]:
    """Steps until max_new_tokens, or until every row has drawn a token of `stop`, which is its last.

    Routing follows the causal rule throughout, so the text does not depend on `chunk` (tokens of the prompt read at a
    time), on padding (`valid`, on either side), or on the other rows, but for the random numbers drawn for them.
    `cache` goes on from what it has seen; `picks` as in Ctx. Positions from the model's seq_len on were never trained.
    Raises ConfigError if a row has no token, or if what the model says is no number."""
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1")
    cache = Cache(len(prompt_ids)) if cache is None else cache
    logits, read = _prefill(model, prompt_ids, valid, cache, chunk, picks)
    generator = torch.Generator().manual_seed(sampling.seed)
    stops = torch.tensor(list(stop), dtype=torch.long, device=logits.device)
    ended = torch.zeros(len(prompt_ids), dtype=torch.bool, device=logits.device)
    for left in reversed(range(max_new_tokens)):
        if bool(logits.isnan().any()):
            raise ConfigError(
                "the model's next-token scores are not numbers: its activations overflow; load it in a wider dtype, or "
                "train it anew with a lower train.lr"
            )
        token_ids = draw(logits, sampling, generator)
        logprobs = at_least_fp32(logits).log_softmax(dim=-1).gather(1, token_ids[:, None])[:, 0]
        yield Step(torch.where(ended, ENDED, token_ids), torch.where(ended, 0.0, logprobs), read)
        ended = ended | torch.isin(token_ids, stops)
        if not left or bool(ended.all()):
            return
        going = ~ended[:, None] if bool(ended.any()) else None
        logits, last = _read(model, token_ids[:, None], going, cache, picks)
        logits, read = logits[:, 0], (last,)


@torch.no_grad()
def _read(
    model: LM, tokens: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None, cache: Cache, picks: bool
) -> tuple[Float[Tensor, "B T V"], Read]:
    output = model(tokens, Ctx(valid=valid, causal=True, cache=cache, picks=picks))
    return output.logits, Read(tokens, valid, output.aux.stats)


def _prefill(
    model: LM, prompt_ids: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None, cache: Cache, chunk: int, picks: bool
) -> tuple[Float[Tensor, "B V"], tuple[Read, ...]]:
    """Logits behind the last real token of every row, and what was read."""
    B, T = prompt_ids.shape
    if not T or (valid is not None and not bool(valid.any(dim=1).all())):
        raise ConfigError("the prompt is empty: every row needs at least one token")
    reads, last = [], None
    for start in range(0, T, chunk):
        tokens = prompt_ids[:, start : start + chunk]
        real = None if valid is None else valid[:, start : start + chunk]
        logits, read = _read(model, tokens, real, cache, picks)
        reads.append(read)
        if real is None:
            last = logits[:, -1]
            continue
        places = torch.where(real, torch.arange(tokens.shape[1], dtype=torch.long, device=real.device), -1).amax(
            dim=1
        )  # (B,)
        found = logits[torch.arange(B, dtype=torch.long, device=real.device), places]
        # A row padded on the right had its last token in an earlier chunk.
        last = found if last is None else torch.where(places[:, None] < 0, last, found)
    assert last is not None
    return last, tuple(reads)


def draw(logits: Float[Tensor, "B V"], sampling: Sampling, generator: torch.Generator) -> Int[Tensor, " B"]:
    """The next token of every row; ties at temperature 0 go to the smaller id."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(chances(logits, sampling).cpu(), 1, generator=generator)[:, 0].to(logits.device)


def chances(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Probability of every token at a temperature above 0, in fp64: a small temperature overflows fp32."""
    exact = logits.double()
    if sampling.top_k is not None and sampling.top_k < exact.shape[1]:
        kept = exact.topk(sampling.top_k).indices
        exact = torch.full_like(exact, -torch.inf).scatter(1, kept, exact.gather(1, kept))
    probs = ((exact - exact.amax(dim=1, keepdim=True)) / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ranked, order = probs.sort(dim=1, descending=True, stable=True)
        # What comes before a token decides, so that the token which reaches top_p is kept.
        dropped = ranked.cumsum(dim=1) - ranked >= sampling.top_p
        probs = probs.scatter(1, order, ranked.masked_fill(dropped, 0.0))
        probs = probs / probs.sum(dim=1, keepdim=True)
    return probs


def dense_cache_bytes(model: LM, cache: Cache) -> int:
    """What `cache` would hold if every attention layer had taken every token; a layer that has taken none so far counts
    as the widest of the others."""
    widths = {path: store.token_bytes for path, store in cache.stores.items()}
    widest = max(widths.values(), default=0)
    paths = [layer.path for layer in model.modules() if isinstance(layer, Attention)]
    return int(cache.seen.sum()) * sum(widths.get(path, widest) for path in paths)
