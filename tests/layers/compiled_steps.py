"""A program: compiles a training step of every layer named on the command line (JSON: name -> settings) as one graph
and compares it with the eager one. Prints name -> null, or the error. Its own process, because the tests' checks of
shapes are code that no compiler takes."""

import json
import sys

import torch
from cases import build, contexts, tokens
from torch._dynamo.testing import CompileCounterWithBackend


def step(layer, run, x, ctx):
    x = x.clone().requires_grad_()
    y, aux = run(x, ctx)
    loss = y.square().sum() + sum(aux.losses.values())
    grads = torch.autograd.grad(loss, [x, *layer.parameters()])
    return {"y": y, **aux.losses, **aux.stats, **{f"grad_{i}": grad for i, grad in enumerate(grads)}}


def check(config):
    for ctx in (contexts()["plain"], contexts()["all"]):
        torch._dynamo.reset()
        layer, counter = build(config), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for _ in range(3):
            x = tokens()
            mine, eager = step(layer, compiled, x, ctx), step(layer, layer, x, ctx)
            assert mine.keys() == eager.keys()
            for name, value in eager.items():
                torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-11, msg=name)
        assert counter.frame_count == 1, f"{counter.frame_count} graphs"


if __name__ == "__main__":
    torch.set_num_threads(1)
    said = {}
    for name, config in json.loads(sys.argv[1]).items():
        try:
            check(config)
            said[name] = None
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
