"""Causal losses per document, and what routing did while they were measured."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsemix.data import Batch
from sparsemix.evaluate.per_token import on_tokens
from sparsemix.layers import Ctx, Layer, update
from sparsemix.model import LM, token_nats
from sparsemix.ops.flop_counter import count_flops
from sparsemix.ops.precision import at_least_fp32

SUMMED = ("counts", "gate_mass", "gate_histogram", "confusion", "taken")


@dataclass
class Losses:
    """Nats per document, or per part of one (its id -> sum over its tokens), and the tokens scored."""

    nats: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    passes: np.ndarray | None = None
    rows_per_token: dict[str, int] = field(default_factory=dict)
    parts: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def total(self) -> float:
        return float(sum(self.nats.values()))

    def bits_per_byte(self, num_bytes: int) -> float:
        return self.total / np.log(2) / num_bytes

    def series(self) -> dict[str, np.ndarray]:
        """One value per scored token and name, in the order of the text: `doc`, `nats`, `entropy` (of the prediction,
        nats), `depth` (Mixture-of-Depths layers that processed the token) and every per-token statistic, NaN where
        its layer did not see the token. Empty unless `per_token` was asked for."""
        names = dict.fromkeys(name for part in self.parts for name in part)
        missing = [np.full(len(part["doc"]), np.nan, np.float32) for part in self.parts]
        return {
            name: np.concatenate([part.get(name, nan) for part, nan in zip(self.parts, missing, strict=True)])
            for name in names
        }


@contextmanager
def evaluating(model: nn.Module, causal: bool = True) -> Iterator[None]:
    """No gradients, and evaluation mode (training mode if not `causal`); the former mode afterwards."""
    training = model.training
    model.train(not causal)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def to_device(batch: Batch, device: torch.device) -> Batch:
    valid, part_ids = (None if t is None else t.to(device) for t in (batch.valid, batch.part_ids))
    return Batch(*(t.to(device) for t in batch[:4]), valid=valid, part_ids=part_ids)


def context(batch: Batch, causal: bool) -> Ctx:
    return Ctx(positions=batch.positions, doc_ids=batch.doc_ids, valid=batch.valid, causal=causal)


def document_losses(model: LM, batches: Iterable[Batch], causal: bool = True, per_token: bool = False) -> Losses:
    """Losses under the causal rule, or, with `causal` False, under the routing and batch statistics of training (which
    may see later tokens: not a valid likelihood, reported only as a leak). `per_token` keeps `Losses.series` too."""
    losses = Losses()
    device = model.embed.weight.device
    with evaluating(model, causal):
        for batch in batches:
            batch = to_device(batch, device)
            output = model(batch.tokens, context(batch, causal))
            nats = token_nats(output.logits, batch.targets)
            entropy = prediction_entropy(output.logits) if per_token else None
            _add(losses, batch, nats, output.aux.stats, entropy)
    return losses


def prediction_entropy(logits: Float[Tensor, "B T V"]) -> Float[Tensor, "B T"]:
    """-sum_v p_v ln p_v in nats, at least fp32."""
    log_p = at_least_fp32(logits).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def _add(losses: Losses, batch: Batch, nats: Tensor, stats: dict[str, Tensor], entropy: Tensor | None) -> None:
    scored = batch.targets != -100
    owner = batch.doc_ids if batch.part_ids is None else batch.part_ids
    docs, where = torch.unique(owner[scored], return_inverse=True)
    sums = torch.zeros(len(docs), dtype=torch.float64).index_add_(0, where.cpu(), nats[scored].double().cpu())
    for doc, value in zip(docs.tolist(), sums.tolist(), strict=True):
        losses.nats[doc] = losses.nats.get(doc, 0.0) + value
    losses.tokens += int(scored.sum())
    for name, value in stats.items():
        if name.rpartition(".")[2] in SUMMED:
            losses.stats[name] = losses.stats.get(name, 0) + value.double().cpu().numpy()
    routed = {name: value for name, value in stats.items() if name.endswith(".routed")}
    tokens, rows_per_token = on_tokens(stats if entropy is not None else routed, batch.tokens.shape)
    masks = [value == 1 for name, value in tokens.items() if name.endswith(".routed")]
    if masks:
        tokens["depth"] = torch.stack(masks).sum(dim=0)
        histogram = np.bincount(tokens["depth"][scored].cpu().numpy(), minlength=len(masks) + 1)
        losses.passes = histogram if losses.passes is None else _sum(losses.passes, histogram)
    if entropy is not None:
        tokens |= {"doc": batch.doc_ids, "nats": nats, "entropy": entropy}
        losses.parts.append({name: value[scored].cpu().numpy() for name, value in tokens.items()})
        losses.rows_per_token |= rows_per_token


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A batch that routed nothing never reached the layers inside, and its histogram is shorter."""
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))


def flops_spent(model: LM, batches: Iterable[Batch]) -> float:
    """FLOPs per token that the causal forward really ran on these batches (padding to the fullest row included)."""
    spent, tokens = 0, 0
    with evaluating(model):
        for batch in batches:
            batch = to_device(batch, model.embed.weight.device)
            spent += count_flops(lambda batch=batch: model(batch.tokens, context(batch, True)))
            tokens += batch.tokens.numel()
    return spent / max(1, tokens)


def has_running_state(model: nn.Module) -> bool:
    """True if some layer keeps statistics or thresholds that evaluation uses."""
    return any(isinstance(m, Layer) and any(True for _ in m.buffers(recurse=False)) for m in model.modules())


def reestimate(model: LM, batches: Iterable[Batch]) -> None:
    """Replace running statistics by their mean over `batches` of training text, at the final weights."""
    if not has_running_state(model):
        return
    totals: dict[str, Tensor] = {}
    count = 0
    model.train()
    with torch.no_grad():
        for batch in batches:
            batch = to_device(batch, model.embed.weight.device)
            stats = model(batch.tokens, context(batch, False)).aux.stats
            totals = {name: totals.get(name, 0) + value for name, value in stats.items()}
            count += 1
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.forget()
    update(model, {name: value / count for name, value in totals.items()})
