"""Whether two contenders compute the same: without that no ratio is printed."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def disagreement(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> str | None:
    """The first entry whose largest difference is more than `tolerance` times its largest value; None if all agree."""
    if ours.keys() != theirs.keys():
        return f"{', '.join(sorted(ours.keys() ^ theirs.keys()))} is only on one side"
    for name, mine in ours.items():
        other = theirs[name]
        if mine.shape != other.shape:
            return f"{name} has shape {tuple(other.shape)}, ours {tuple(mine.shape)}"
        gap = (mine.double() - other.double()).abs().max() if mine.numel() else torch.zeros(())
        size = mine.double().abs().max() if mine.numel() else torch.ones(())
        # Written so that NaN disagrees.
        if not bool(gap <= tolerance * size.clamp_min(1e-30)):
            return f"{name} differs by {float(gap / size):.1e} of its largest value; allowed {tolerance:.0e}"
    return None


def direction(like: Tensor) -> Tensor:
    """A fixed gradient for an output, different in every element."""
    return torch.linspace(-1, 1, like.numel()).view(like.shape).to(like)


def with_gradients(op: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output of op(*inputs) and the gradients of all inputs that take one, towards a fixed direction."""
    out = op(*inputs.values())
    wanted = {name: x for name, x in inputs.items() if x.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), direction(out))
    return {"output": out.detach()} | {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}


def movement(parameters: Mapping[str, Tensor], step: Callable[[], object], steps: int = 3) -> dict[str, Tensor]:
    """How far `steps` optimizer steps move every parameter."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for _ in range(steps):
        step()
    return {f"movement of {name}": p.detach() - before[name] for name, p in parameters.items()}


def trained(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that take a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
