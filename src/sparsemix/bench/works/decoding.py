"""Decoding a token at a time: Mixture-of-Depths and ternary weights beside dense, and dense beside transformers."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsemix import saved
from sparsemix.bench import peers
from sparsemix.bench.agreement import disagreement
from sparsemix.bench.work import OURS, Case, Contender, Number, Work, number_row
from sparsemix.config import parse
from sparsemix.layers import Cache, Ctx
from sparsemix.layers.mod import MoD
from sparsemix.layers.packed import pack_ternary
from sparsemix.model import LM, ModelConfig, after

CAPACITY, VOCAB, SMALL_VOCAB, PROMPT, STRETCH = 0.125, 8192, 4096, 64, 32
MOD = {"wrap": {"at": "every-2", "kind": "mod", "capacity": CAPACITY, "predictor_width": 64}}
DENSE, BF16, LLAMA = "dense", "dense in bf16", "transformers Llama"


def shape(d_model: int, kv_heads: int, d_ff: int, count: int, **more: Any) -> dict[str, Any]:
    """Settings of `count` blocks with heads of 64 or 128 channels; `more` adds to their pattern."""
    heads = d_model // (128 if d_model > 1024 else 64)
    mixer = {"kind": "attention", "num_heads": heads, "num_kv_heads": kv_heads}
    block = {"kind": "block", "mixer": mixer, "ffn": {"kind": "dense", "d_ff": d_ff}}
    pattern = {"count": count, "each": block} | more
    return {"d_model": d_model, "vocab_size": VOCAB, "seq_len": 512, "blocks": pattern}


def weight_bound(quick: bool, **more: Any) -> dict[str, Any]:
    """Sixteen blocks whose weights lie far beyond any cache of the processor."""
    return shape(128, 2, 344, 4, **more) if quick else shape(1024, 16, 2752, 16, **more)


def built(raw: dict[str, Any]) -> LM:
    return parse(ModelConfig, raw).build(0).eval().requires_grad_(False)


def text(batch: int) -> Tensor:
    """A prompt and the tokens that follow it (B, PROMPT + STRETCH)."""
    return torch.randint(VOCAB, (batch, PROMPT + STRETCH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def route_as_trained(model: LM, tokens: Tensor) -> None:
    """Moves the predictors' biases so that `CAPACITY` of the tokens after the prompt pass in every routed block, as
    training has it: an untrained one may let any share pass. Which tokens pass is for the predictor to say."""
    x = model.embed(tokens)
    for block in model.blocks:
        if isinstance(block, MoD):
            guess = block.predictor(x)[:, PROMPT:].flatten().sort(descending=True).values
            passing = round(CAPACITY * len(guess))
            block.predictor.down.get_parameter("bias").sub_(guess[passing - 1 : passing + 1].mean())
        x, _ = after(block, x, Ctx(causal=True))


class Stepping:
    """A model behind a prompt; `run` decodes the stretch after it, token by token, and takes it back.

    Raises RuntimeError if the logits are not those of one forward over everything."""

    def __init__(self, model: LM, tokens: Tensor) -> None:
        self.model, self.following, self.cache = model, tokens[:, PROMPT:].split(1, dim=1), Cache(len(tokens))
        with torch.inference_mode():
            model(tokens[:, :PROMPT], Ctx(causal=True, cache=self.cache))
            output = model(tokens, Ctx(causal=True))
        self.logits = self.run()
        # bf16 rounds a product of one row and one of many differently.
        tolerance = 1e-4 if self.logits.dtype == torch.float32 else 5e-2
        if wrong := disagreement({"logits": output.logits[:, PROMPT:]}, {"logits": self.logits}, tolerance):
            raise RuntimeError(f"decoding is not the full forward: {wrong}")
        passing = [value.float().mean() for name, value in output.aux.stats.items() if name.endswith("routed")]
        self.routed = float(torch.stack(passing).mean()) if passing else 1.0

    @torch.inference_mode()
    def run(self) -> Tensor:
        logits = [self.model(token, Ctx(causal=True, cache=self.cache)).logits for token in self.following]
        self.kv_bytes = self.cache.bytes()
        self.cache.rollback(STRETCH)
        return torch.cat(logits, dim=1)

    def contender(self) -> Contender:
        return Contender(self.run, lambda: {"logits": self.logits})


@dataclass(frozen=True)
class RoutedCase:
    """A model whose every other block takes 12.5 % of the tokens beside the dense one: time and cached bytes."""

    batch: int
    name: str

    def measure(self, quick: bool) -> dict[str, Any]:
        tokens, kept = text(self.batch), dict[str, Stepping]()

        def stepping(name: str, **more: Any) -> Callable[[], Contender]:
            def make() -> Contender:
                model = built(weight_bound(quick, **more))
                route_as_trained(model, tokens)
                kept[name] = Stepping(model, tokens)
                return Contender(kept[name].run)

            return make

        passing = 1 - (1 - CAPACITY) ** self.batch
        speed = Number(
            f"decoding/mod batch {self.batch}",
            f"times the tokens/s of {DENSE}; {2 / (1 + passing):.2f} if reading the blocks' weights were all",
            (DENSE,),
            same=False,
        )
        contenders = {OURS: stepping(OURS, **MOD), DENSE: stepping(DENSE)}
        read = parse(ModelConfig, weight_bound(quick, **MOD)).cost().bytes
        amounts = {"sequential_read": STRETCH * read} if self.batch == 1 else {}
        settings = {"batch": self.batch, "prompt": PROMPT}
        case = Case(self.name, contenders, [speed], settings, amounts, budget_s=12, gib=4)
        record = case.measure(quick)
        routed, kv = kept[OURS].routed, kept[OURS].kv_bytes / kept[DENSE].kv_bytes
        record["settings"] |= {"routed share": routed, "kv bytes, dense": kept[DENSE].kv_bytes}
        about = f"of the bytes that a routed share of {routed:.3f} says; {kv:.3f} of {DENSE}'s"
        record["numbers"].append(number_row(f"decoding/kv batch {self.batch}", about, kv / ((1 + routed) / 2)))
        return record


@dataclass(frozen=True)
class TernaryCase:
    """Packed ternary weights beside bf16 ones of the same shape: time, and bytes in memory and on disk."""

    name: str = "ternary weights"

    def measure(self, quick: bool) -> dict[str, Any]:
        # Four of the thirty blocks of BitNet b1.58 2B4T (arXiv:2504.12285) and a vocabulary in proportion: its 128,256
        # float rows would take more bytes than all thirty ternary blocks.
        raw, tokens = shape(256, 1, 512, 2) if quick else shape(2560, 5, 6912, 4), text(1) % SMALL_VOCAB
        raw = raw | {"vocab_size": SMALL_VOCAB}
        sizes = dict[str, dict[str, int]]()

        def stepping(name: str, **more: Any) -> Callable[[], Contender]:
            def make() -> Contender:
                model = built(raw | more)
                if more:
                    # In fp32 a packed model is the one that was trained.
                    wanted = model(tokens).logits
                    pack_ternary(model)
                    if wrong := disagreement({"logits": wanted}, {"logits": model(tokens).logits}, 1e-4):
                        raise RuntimeError(f"the packed model is not the one that was trained: {wrong}")
                sizes[name] = stored(model.bfloat16())
                return Contender(Stepping(model, tokens).run)

            return make

        contenders = {OURS: stepping(OURS, precision="ternary"), BF16: stepping(BF16)}
        speed = Number("decoding/ternary", f"times the tokens/s of {BF16}", (BF16,), same=False)
        record = Case(self.name, contenders, [speed], {"shape": raw["blocks"]}, budget_s=12, gib=6).measure(quick)
        record["settings"] |= {f"bytes, {name}": size for name, size in sizes.items()}
        for where in ("memory", "disk"):
            ratio = sizes[BF16][where] / sizes[OURS][where]
            about = f"times fewer bytes of weights than {BF16}, the embedding (in bf16 in both) counted"
            record["numbers"].append(number_row(f"decoding/ternary {where}", about, ratio))
        return record


def stored(model: LM) -> dict[str, int]:
    """Bytes of a model's numbers in memory and in the file that `saved` writes; and of the embedding alone."""
    with tempfile.TemporaryDirectory() as folder:
        saved.write(model, Path(folder))
        disk = (Path(folder) / saved.WEIGHTS).stat().st_size
    memory = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return {"memory": memory, "disk": disk, "embedding": model.embed.weight.nbytes}


def generate_case(quick: bool, batch: int, dtype: torch.dtype) -> Case:
    """The same weights behind the same prompt, through transformers' own `generate`, greedily, prefill included."""
    named, prompt = str(dtype).removeprefix("torch."), text(batch)[:, :PROMPT]
    exact = dtype == torch.float32
    model = built(weight_bound(quick)).to(dtype)

    # In bf16 a near tie may be decided by rounding, and the text then differs: logits are compared instead.
    def said(tokens: Tensor, logits: Tensor) -> dict[str, Tensor]:
        return {"logits": logits} | ({"tokens": tokens} if exact else {})

    def generating(make: Callable[[LM], Any]) -> Callable[[], Contender]:
        def contender() -> Contender:
            generator = make(model)
            new = {"max_new_tokens": STRETCH, "min_new_tokens": STRETCH, "do_sample": False}

            def run() -> Tensor:
                return generator.generate(prompt, attention_mask=torch.ones_like(prompt), **new)

            @torch.inference_mode()
            def probe() -> dict[str, Tensor]:
                return said(run(), generator(prompt).logits)

            return Contender(run, probe)

        return contender

    from sparsemix.interop.hf import SparsemixForCausalLM

    return Case(
        f"generate, batch {batch}, {named}",
        {OURS: generating(SparsemixForCausalLM.wrap), LLAMA: generating(peers.transformers_llama)},
        [Number(f"decoding/generate batch {batch} {named}", f"times as fast as {LLAMA}'s generate", (LLAMA,))],
        {"batch": batch, "prompt": PROMPT, "new tokens": STRETCH},
        budget_s=10,
        tolerance=1e-4 if exact else 5e-2,
        gib=3,
    )


def mod_cases(quick: bool) -> Iterator[RoutedCase]:
    for batch in (1, 4, 16):
        yield RoutedCase(batch, f"every other block at 12.5 %, batch {batch}")


def ternary_cases(quick: bool) -> Iterator[TernaryCase]:
    yield TernaryCase()


def generate_cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 4):
            yield generate_case(quick, batch, dtype)


WORKS = (
    Work(
        "decoding",
        "decoding with Mixture-of-Depths, with ternary weights, and dense beside transformers",
        lambda quick: (*mod_cases(quick), *ternary_cases(quick), *generate_cases(quick)),
        (
            "decoding/mod batch 1",
            "decoding/kv batch 1",
            *(f"decoding/ternary{of}" for of in ("", " memory", " disk")),
            *(f"decoding/generate batch {batch} {of}" for batch in (1, 4) for of in ("float32", "bfloat16")),
        ),
    ),
)
