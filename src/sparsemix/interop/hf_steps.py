"""Running state (batch statistics, thresholds, balance biases) of a model whose training loop knows nothing of it."""

import torch
from torch import Tensor, nn

from sparsemix.layers import Layer, update
from sparsemix.layers.token_selection import Annealing


class RunningState:
    """Before every training forward `begin`, after it `take`: the running state is then as if the optimizer's step
    under way ended here, that is, what held before the step, moved once by the mean over its micro-batches.

    No loop tells a model when its optimizer steps. A step is over when a trainable parameter was written to since, or
    when no gradient is left; in whichever order a loop steps, clears and calls, one of the two shows. (An optimizer
    that keeps both to itself makes every micro-batch a step.) All micro-batches of a step run with the state from
    before it, as in the library's own loop."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.micro_batches = 0
        self.written = 0

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        learning = [p for p in model.parameters() if p.requires_grad]
        written = sum(p._version for p in learning)
        under_way = self.micro_batches and written == self.written and any(p.grad is not None for p in learning)
        state = dict(model.named_buffers())
        if under_way:
            for name, buffer in state.items():
                buffer.copy_(self.before[name])
            settle(model)
        else:
            self.before = {name: buffer.clone() for name, buffer in state.items()}
            self.sums, self.micro_batches = {}, 0
        self.written = written

    @torch.no_grad()
    def take(self, model: nn.Module, stats: dict[str, Tensor]) -> None:
        self.micro_batches += 1
        for name, layer in model.named_modules():
            for entry in layer.observes if isinstance(layer, Layer) else ():
                if (key := f"{name}.{entry}") in stats:
                    self.sums[key] = self.sums.get(key, 0) + stats[key].detach()
        update(model, {key: total / self.micro_batches for key, total in self.sums.items()})


def settle(model: nn.Module) -> None:
    """Let every layer that keeps a buffer's value as a plain number read it anew: it was written from outside."""
    for module in model.modules():
        if isinstance(module, Annealing):
            module.set_slack()
