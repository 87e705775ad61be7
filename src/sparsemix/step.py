"""One training step: losses and gradients of its micro-batches, through blocks that may be compiled or recomputed."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sparsemix.data import Batch
from sparsemix.layers import Aux, Ctx, rank_means
from sparsemix.model import LM, BlockRunner, Loss, after

aten, ours = torch.ops.aten, torch.ops.sparsemix
# What decides where a token goes, and the noise that it may be decided by. Recomputed scores may differ in their last
# bits (other kernels, other sums), so picks are kept; all of them are small.
DECISIONS = frozenset(
    {
        aten.topk.default,
        aten.sort.default,
        aten.sort.stable,
        *(getattr(getattr(aten, name), kind) for name in ("gt", "ge", "lt", "le") for kind in ("Scalar", "Tensor")),
        aten.randn_like.default,
        ours.product_key_topk.default,
    }
)


def keep_decisions(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in DECISIONS else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(block: nn.Module, x: Float[Tensor, "B T D"], ctx: Ctx) -> tuple[Float[Tensor, "B T D"], Aux]:
    """As `after`, but what is inside the block is computed again for the backward pass, except for routing decisions.

    What the block says is that of the first time: statistics count once."""
    contexts = partial(create_selective_checkpoint_contexts, keep_decisions)
    return checkpoint(after, block, x, ctx, use_reentrant=False, context_fn=contexts)


def block_runner(model: LM, compiled: bool, recompute: bool, backend: Any = "inductor") -> BlockRunner:
    """How the training step runs the blocks of `model`. Blocks of equal settings share their compiled graphs.

    Parameters keep their names: functions are compiled, not modules. Evaluation, whose causal rule depends on the data,
    runs the blocks plainly."""
    run = recomputed if recompute else after
    if not compiled:
        return run
    configs = model.config.blocks
    # torch.compile counts graphs by code object and gives up at its ninth, over all models of a process: a copy counts
    # those of one kind of block in one model.
    graphs = {
        config: torch.compile(
            FunctionType(run.__code__.replace(), run.__globals__, run.__name__),
            fullgraph=True,
            dynamic=False,
            backend=backend,
        )
        for config in set(configs)
    }
    graph_of = {block: graphs[config] for block, config in zip(model.blocks, configs, strict=True)}
    return lambda block, x, ctx: graph_of[block](block, x, ctx)


class Step(NamedTuple):
    """What a step saw: scalars by name (losses, then statistics of one number), and all statistics."""

    scalars: dict[str, Tensor]
    stats: dict[str, Tensor]


def accumulate(model: LM, batches: Sequence[Batch], dtype: torch.dtype, run: BlockRunner) -> Step:
    """Adds the gradients of the mean loss over `batches`; reads nothing back from the device."""
    losses: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}
    share = 1.0 / len(batches)
    for batch in batches:
        loss = _loss(model, batch, dtype, run)
        (share * (loss.mean + sum(loss.aux.losses.values()))).backward()
        said = {"loss": loss.mean, **loss.aux.losses}
        losses = {name: losses.get(name, 0) + share * value.detach() for name, value in said.items()}
        stats = {name: stats.get(name, 0) + share * value for name, value in loss.aux.stats.items()}
    return Step(losses | {name: value for name, value in stats.items() if value.numel() == 1}, stats)


def _loss(model: LM, batch: Batch, dtype: torch.dtype, run: BlockRunner) -> Loss:
    # Positions count from 0 in every row, which is the default, and costs less than one set a row.
    ctx = Ctx(doc_ids=batch.doc_ids, valid=batch.valid)
    device = model.embed.weight.device.type
    with torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext():
        return model.loss(batch.tokens, batch.targets, ctx, run)


def activation_bytes(model: LM, batch: Batch, dtype: torch.dtype, run: BlockRunner) -> float:
    """Bytes a token that autograd keeps of a forward pass for the backward pass, a storage once.

    What does not grow with the batch (parameters, their casts, gradients made early) is left out: it is the growth from
    one row of the batch to all of them. With a single row it is that row's, parameters and inputs aside. The routing
    decisions that recomputed blocks keep are not seen."""
    rows, T = batch.tokens.shape
    whole = _kept(model, batch, dtype, run)
    if rows == 1:
        return whole / T
    valid = None if batch.valid is None else batch.valid[:1]
    first = Batch(batch.tokens[:1], batch.targets[:1], batch.positions[:1], batch.doc_ids[:1], valid)
    return (whole - _kept(model, first, dtype, run)) / ((rows - 1) * T)


def _kept(model: LM, batch: Batch, dtype: torch.dtype, run: BlockRunner) -> int:
    given = [*model.parameters(), *model.buffers(), *(part for part in batch if part is not None)]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    held: WeakSet[_Saved] = WeakSet()

    def keep(tensor: Tensor) -> _Saved:
        # Detached: a result that knows its node would keep the node alive.
        saved = _Saved(tensor.detach())
        held.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        loss = _loss(model, batch, dtype, run)
    # What branches that lead to no loss saved went with them, and where that lay may be another's by now.
    storages = [saved.tensor.untyped_storage() for saved in held]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
    # Until here the loss held the graph, so that no address is of two tensors.
    del loss
    return sum(size for address, size in kept.items() if address not in known)


class _Saved:
    """A tensor that a node of the graph holds; it goes when the node goes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def read(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Their means over the ranks, as numbers, in one transfer. A rank's NaN is every rank's, so that all decide alike
    whether a step can be taken."""
    means = rank_means(scalars)
    flat = torch.stack([value.detach().double().reshape(()) for value in means.values()])
    return dict(zip(means, flat.tolist(), strict=True))
