"""Works of a few multiplications, to test the harness with."""

import torch

from sparsemix.bench.agreement import with_gradients
from sparsemix.bench.work import OURS, Case, Contender, Number, Unavailable, Work

X = torch.arange(1.0, 7.0).view(2, 3)


def squaring(factor=1.0, gradient=1.0):
    """x^2 times `factor`, with a gradient that is `gradient` times the right one."""

    def op(x):
        y = factor * x * x
        return gradient * y + (y - gradient * y).detach()

    leaf = X.clone().requires_grad_()
    return lambda: Contender(lambda: op(X), lambda: with_gradients(op, {"x": leaf}))


def absent():
    raise Unavailable("No module named 'peer'; pip install 'sparsemix[bench]'")


def moving(distance):
    """Agrees in outputs; its optimizer moves a parameter by `distance`."""
    return lambda: Contender(
        lambda: None, lambda: {"output": X}, lambda: {"movement of w": torch.full((3,), float(distance))}
    )


def case(name="squares", other="peer", same=True, ours=None, **contenders):
    number = Number(f"fake/{name}", "times as fast as {best}", tuple(contenders) or (other,), same=same)
    return Case(name, {OURS: ours or squaring(), **contenders}, [number], budget_s=0.02)


FAKE = Work("fake", "squares", lambda quick: [case(peer=squaring())])
