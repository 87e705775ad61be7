"""Training steps of whole models: Mixture-of-Depths beside compiled dense, and dense beside plain PyTorch."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsemix.bench import peers
from sparsemix.bench.agreement import trained
from sparsemix.bench.training import our_optimizer
from sparsemix.bench.work import OURS, Case, Contender, Number, Unavailable, Work
from sparsemix.config import parse
from sparsemix.layers.sizing import mod_wrap
from sparsemix.model import LM, ModelConfig, token_nats
from sparsemix.step import block_runner

D, NUM_HEADS, D_FF, VOCAB = 256, 4, 684, 1024
DENSE = "dense, compiled"


def model_config(num_blocks: int, seq_len: int, wrap: bool = False) -> ModelConfig:
    block = {
        "kind": "block",
        "mixer": {"kind": "attention", "num_heads": NUM_HEADS},
        "ffn": {"kind": "dense", "d_ff": D_FF},
    }
    pattern = {"count": num_blocks, "each": block} | ({"wrap": mod_wrap(D)} if wrap else {})
    return parse(ModelConfig, {"d_model": D, "vocab_size": VOCAB, "seq_len": seq_len, "blocks": pattern})


def compiled(config: ModelConfig, tokens: Tensor) -> tuple[LM, Callable[[], Tensor]]:
    """The model, and its loss through compiled blocks, as `sparsemix train` runs them."""
    model = config.build(0).train()
    runner = block_runner(model, True, False)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss() -> Tensor:
        found = model.loss(inputs, targets, None, runner)
        return found.mean + sum(found.aux.losses.values())

    return model, loss


def stepping(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def gradients(loss: Callable[[], Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    value = loss()
    value.backward()
    grads = {f"gradient of {n}": p.grad.clone() for n, p in trained(model).items() if p.grad is not None}
    return {"loss": value.detach()} | grads


def loss_of(model: LM, tokens: Tensor) -> Callable[[], Tensor]:
    """Mean nats of next tokens and the layers' own losses."""

    def loss() -> Tensor:
        output = model(tokens[:, :-1])
        return token_nats(output.logits, tokens[:, 1:]).mean() + sum(output.aux.losses.values())

    return loss


def sized(quick: bool) -> tuple[int, int, Tensor]:
    """Blocks, sequence length and tokens (B, T + 1)."""
    num_blocks, seq_len, batch = (2, 128, 2) if quick else (6, 512, 4)
    generator = torch.Generator().manual_seed(0)
    return num_blocks, seq_len, torch.randint(VOCAB, (batch, seq_len + 1), generator=generator)


def our_contender(config: ModelConfig, tokens: Tensor, probed: bool) -> Callable[[], Contender]:
    def make() -> Contender:
        model, loss = compiled(config, tokens)
        # Gradients are compared before the steps move the weights.
        seen = gradients(loss, model) if probed else {}
        step = stepping(loss, our_optimizer(model))
        return Contender(step, (lambda: seen) if probed else None)

    return make


def mod_cases(quick: bool) -> Iterator[Case]:
    """Every other block at a capacity of 12.5 %: is the time saved with the FLOPs?"""
    num_blocks, seq_len, tokens = sized(quick)
    dense, mod = model_config(num_blocks, seq_len), model_config(num_blocks, seq_len, wrap=True)
    saved = dense.cost().flops / mod.cost().flops
    yield Case(
        "every other block at 12.5 %",
        {OURS: our_contender(mod, tokens, False), DENSE: our_contender(dense, tokens, False)},
        [
            Number(
                "mod_step/share of the FLOP ratio",
                f"of the FLOP ratio {saved:.2f}, as speed-up over {DENSE}",
                (DENSE,),
                factor=1 / saved,
                same=False,
            )
        ],
        {"num_blocks": num_blocks, "seq_len": seq_len, "batch": len(tokens), "d_model": D},
        {"gemm_fp32": 3 * len(tokens) * mod.cost().flops},
        budget_s=12,
    )


def dense_cases(quick: bool) -> Iterator[Case]:
    """A dense model's step beside the same in plain PyTorch, compiled as a whole."""
    num_blocks, seq_len, tokens = sized(quick)
    config = model_config(num_blocks, seq_len)

    def plain() -> Contender:
        if not Path("bench/plain.py").is_file():
            raise Unavailable("bench/plain.py is in a checkout of sparsemix; run there")
        module = peers.imported("bench.plain")
        model = module.Plain(D, VOCAB, seq_len, num_blocks, NUM_HEADS, D_FF)
        model.load_state_dict(module.plain_weights(config.build(0).state_dict()))
        forward = torch.compile(model)

        def loss() -> Tensor:
            return forward(tokens[:, :-1], tokens[:, 1:])

        seen = module.plain_weights(gradients(loss, model))
        return Contender(stepping(loss, peers.adam(model, 1e-3)), lambda: seen)

    def ours() -> Contender:
        made = our_contender(config, tokens, True)()
        probe = made.probe
        assert probe is not None
        names = {n: n.replace(".mixer.", ".").replace(".ffn.", ".") for n in probe()}
        return Contender(made.run, lambda: {names[n]: value for n, value in probe().items()})

    other = "plain PyTorch, compiled"
    yield Case(
        "training step",
        {OURS: ours, other: plain},
        [Number("dense_step/training step", f"times as fast as {other}", (other,))],
        {"num_blocks": num_blocks, "seq_len": seq_len, "batch": len(tokens), "d_model": D},
        {"gemm_fp32": 3 * len(tokens) * config.cost().flops},
        budget_s=12,
        tolerance=1e-3,
    )


WORKS = (
    Work("mod_step", "Mixture-of-Depths training step", mod_cases, ("mod_step/share of the FLOP ratio",)),
    Work("dense_step", "dense training step", dense_cases, ("dense_step/training step",)),
)
