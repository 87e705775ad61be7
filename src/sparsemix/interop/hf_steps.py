"""Running state (batch statistics, thresholds, balance biases) of a model whose training loop knows nothing of it."""

import torch
from torch import Tensor, nn

from sparsemix.layers import Layer, rank_means
from sparsemix.layers.query_norm import QueryBatchNorm
from sparsemix.layers.token_selection import Annealing


class RunningState:
    """Moves running state once per optimizer step, by the mean over the step's micro-batches and over the ranks.

    No loop tells a model when its optimizer steps. Before a training forward, a step is over if a trainable parameter
    was written to since the one before, or if no gradient is left; in whichever order a loop steps, clears and calls,
    one of the two shows. (An optimizer that keeps both to itself makes every micro-batch a step.) All of a step runs
    with the state from before it, blocks that the backward pass recomputes too, as in the library's own loop.
    Who looks in between, to evaluate or to save, sees the state as if the step ended there."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.micro_batches = 0
        self.written = 0
        # What held before the step under way, where somebody looked.
        self.before: dict[str, Tensor] | None = None

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Before a training forward."""
        learning = [p for p in model.parameters() if p.requires_grad]
        written = sum(p._version for p in learning)
        if written != self.written or all(p.grad is None for p in learning):
            self.show(model)
            self.sums, self.micro_batches = {}, 0
        elif self.before is not None:
            for name, buffer in model.named_buffers():
                buffer.copy_(self.before[name])
            settle(model)
        self.written, self.before = written, None

    def take(self, model: nn.Module, stats: dict[str, Tensor]) -> None:
        """After it: what it observed."""
        own = {key: stats[key].detach() for keys in observed(model).values() for key in keys.values() if key in stats}
        self.micro_batches += 1
        for key, value in rank_means(own).items():
            self.sums[key] = self.sums.get(key, 0) + value

    @torch.no_grad()
    def show(self, model: nn.Module) -> None:
        """Move the state as if the step ended here."""
        if not self.micro_batches or self.before is not None:
            return
        self.before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # The ranks' means are in the sums: one rank alone may save.
        for layer, keys in observed(model).items():
            layer.update({e: self.sums[key] / self.micro_batches for e, key in keys.items() if key in self.sums})


def observed(model: nn.Module) -> dict[Layer, dict[str, str]]:
    """Every layer, and under which key of the statistics each of its observations comes."""
    layers = [layer for layer in model.modules() if isinstance(layer, Layer)]
    # Not the module's name, to which an adapter around a layer adds its own.
    return {layer: {entry: f"{layer.path}.{entry}" for entry in layer.observes} for layer in layers}


def settle(model: nn.Module) -> None:
    """Let every layer whose state is more than its buffers, or was written with others, read them anew: they were
    written from outside."""
    for module in model.modules():
        if isinstance(module, Annealing):
            module.set_slack()
        elif isinstance(module, QueryBatchNorm):
            module.settle()
