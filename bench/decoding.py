"""Tokens a second of two trained runs, in turn: `python -m bench.decoding DENSE MOD TEXT`. With `compiled` in place of
them, the untrained pair of `sparsemix bench --only decoding` at batch 1, eager and with its feed-forwards compiled."""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sparsemix import trained
from sparsemix.bench.works.decoding import MOD, Stepping, built, route_as_trained, text, weight_bound
from sparsemix.config import ConfigError
from sparsemix.data import read_documents
from sparsemix.data.tokenizer import encode_batch
from sparsemix.layers import Cache, Ctx
from sparsemix.layers.dense import Dense
from sparsemix.model import LM

PROMPT, LENGTH, ROUNDS = 64, 256, 12


@torch.inference_mode()
def decode(model: LM, tokens: Tensor) -> tuple[float, float]:
    """(Seconds of the steps after the prompt, share of tokens that passed a routed layer.)"""
    cache, passed = Cache(len(tokens)), []
    model(tokens[:, :PROMPT], Ctx(causal=True, cache=cache))
    began = time.perf_counter()
    for token in tokens[:, PROMPT:].split(1, dim=1):
        stats = model(token, Ctx(causal=True, cache=cache)).aux.stats
        passed += [mask for name, mask in stats.items() if name.endswith("routed")]
    seconds = time.perf_counter() - began
    return seconds, float(torch.cat(passed).float().mean()) if passed else 1.0


def pair(dense: Path, mod: Path, texts: str) -> None:
    models, tokenizer = (
        {"dense": trained.load(dense).model, "mod": trained.load(mod).model},
        trained.load(mod).tokenizer,
    )
    assert tokenizer is not None
    encoded = encode_batch(tokenizer, [document.text for document in read_documents([texts])])
    rows = [torch.from_numpy(ids[:LENGTH]) for ids in encoded if len(ids) >= LENGTH]
    for batch in (1, 4, 16):
        if len(rows) < batch:
            raise ConfigError(f"text={texts} has {len(rows)} documents of {LENGTH} tokens, {batch} are needed")
        tokens, best, routed = torch.stack(rows[:batch]), dict.fromkeys(models, float("inf")), 1.0
        for _ in range(ROUNDS):
            for name, model in models.items():
                seconds, routed = decode(model, tokens)
                best[name] = min(best[name], seconds)
        rates = ", ".join(f"{name} {batch * (LENGTH - PROMPT) / s:,.0f} tokens/s" for name, s in best.items())
        print(f"batch {batch}: {rates}; {best['dense'] / best['mod']:.2f}, {routed:.1%} passed a routed layer")


def compiled() -> None:
    steppings: dict[tuple[str, str], Stepping] = {}
    for kind, more in (("dense", {}), ("mod", MOD)):
        for how in ("eager", "compiled"):
            model, tokens = built(weight_bound(False, **more)), text(1)
            route_as_trained(model, tokens)
            for layer in model.modules():
                if how == "compiled" and isinstance(layer, Dense):
                    layer.compile()
            steppings[kind, how] = Stepping(model, tokens)
    best = dict.fromkeys(steppings, float("inf"))
    for _ in range(4):
        for name, stepping in steppings.items():
            began = time.perf_counter()
            stepping.run()
            best[name] = min(best[name], time.perf_counter() - began)
    for how in ("eager", "compiled"):
        print(f"{how}: Mixture-of-Depths {best['dense', how] / best['mod', how]:.2f} times dense")
    print(f"dense compiled: {best['dense', 'eager'] / best['dense', 'compiled']:.2f} times eager")


def main() -> None:
    torch.set_num_threads(2)
    if sys.argv[1:] == ["compiled"]:
        compiled()
    elif len(sys.argv) == 4:
        pair(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
