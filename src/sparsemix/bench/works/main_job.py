"""The main job: training steps of `sparsemix compare` as `sparsemix train` takes them, from width 32 to 512.

Seconds per FLOP of every kind over dense's, and dense's seconds over those of its own matrix products alone."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsemix.bench.floors import FLOORS
from sparsemix.bench.work import OURS, Case, Contender, Number, Work
from sparsemix.data import Batch, DataConfig
from sparsemix.layers import AttentionConfig, BlockConfig, DenseConfig
from sparsemix.layers.linear import num_matrices
from sparsemix.settings import RunConfig
from sparsemix.sweep.arms import Arm, backbone, run_config
from sparsemix.train import train_step

RECIPE = "tiny"
KINDS = ("moe", "mh_moe", "mode", "expert_choice", "mod", "peer", "pkm")
WIDTHS, THREADS = (32, 64, 128, 256, 512), (1, 2)
PRODUCTS = "its products"
# Steps of different text in turn: a step that sees the same rows again finds them in the caches.
BATCHES = 8
# A document ends every so many tokens, as attention's mask wants to know.
DOCUMENT = 100


def run_of(kind: str, width: int) -> RunConfig:
    """The run of `kind` in a comparison at this width."""
    raw = backbone(RECIPE, (), width)
    return run_config(Arm(kind, kind), raw, DataConfig(vocab_size=raw["model"]["vocab_size"]), 1e30)


def texts(config: RunConfig) -> list[Batch]:
    """Batches of drawn tokens, the same for all kinds."""
    generator = torch.Generator().manual_seed(0)
    B, T = config.batch_size, config.model.seq_len
    found = []
    for _ in range(BATCHES):
        tokens = torch.randint(config.model.vocab_size, (B, T + 1), generator=generator)
        doc_ids = (torch.rand(B, T, generator=generator) < 1 / DOCUMENT).long().cumsum(1)
        positions = torch.arange(T, dtype=torch.long).expand(B, T)
        found.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, doc_ids))
    return found


def training(config: RunConfig, threads: int) -> Callable[[], Contender]:
    """Whole steps: gradients, their norm and clipping, running state and the optimizer."""

    def make() -> Contender:
        model = config.model.build(0).train()
        optimizer = config.train.build_optimizer(model)
        batches, done = texts(config), 0

        def step() -> None:
            nonlocal done
            torch.set_num_threads(threads)
            train_step(config, model, optimizer, [batches[done % BATCHES]], torch.float32)
            optimizer.step()
            done += 1

        return Contender(step)

    return make


def shapes(config: RunConfig) -> list[tuple[int, int, int, int, int]]:
    """(how often, matrices in a stack, rows, inner width, columns) of the forward products of a dense model."""
    B, T, D = config.batch_size, config.model.seq_len, config.model.d_model
    block, L = config.model.blocks[0], len(config.model.blocks)
    assert isinstance(block, BlockConfig) and isinstance(block.mixer, AttentionConfig)
    assert isinstance(block.ffn, DenseConfig)
    H, d_ff = block.mixer.num_heads, block.ffn.d_ff
    feed = [(L * (num_matrices(block.ffn.activation) - 1), 1, B * T, D, d_ff), (L, 1, B * T, d_ff, D)]
    scores = [(L, B * H, T, D // H, T), (L, B * H, T, T, D // H)]
    return [(4 * L, 1, B * T, D, D), *feed, *scores, (1, 1, B * T, D, config.model.vocab_size)]


def products(config: RunConfig, threads: int) -> Callable[[], Contender]:
    """x W, dy W^T and x^T dy of every product of a step, into memory that is there."""

    def make() -> Contender:
        calls: list[tuple[int, tuple[Tensor, ...]]] = []
        for times, stack, rows, inner, columns in shapes(config):
            x, w, y = (torch.randn(stack, *size) for size in ((rows, inner), (inner, columns), (rows, columns)))
            calls.append((times, (x, w, y, torch.empty_like(x), torch.empty_like(w), torch.empty_like(y))))

        def run() -> None:
            torch.set_num_threads(threads)
            for times, (x, w, y, d_x, d_w, out) in calls:
                for _ in range(times):
                    torch.bmm(x, w, out=out)
                    torch.bmm(y, w.mT, out=d_x)
                    torch.bmm(x.mT, y, out=d_w)

        return Contender(run)

    return make


def cases(quick: bool) -> Iterator[Case]:
    """Every kind beside dense, and dense beside its products, at every width and number of threads."""
    for width in WIDTHS[:1] if quick else WIDTHS:
        dense = run_of("dense", width)
        for threads in THREADS:
            at = f"width {width}, {threads} thread{'s' * (threads > 1)}"
            settings = {"recipe": RECIPE, "width": width, "threads": threads, "ours": "dense"}
            ours = training(dense, threads)
            over = f"main_job/dense over its products, {at}"
            numbers = [Number(over, "times the seconds of its products", (OURS,), PRODUCTS, same=False)]
            yield Case(f"dense, {at}", {OURS: ours, PRODUCTS: products(dense, threads)}, numbers, settings, budget_s=3)
            for kind in KINDS:
                run = run_of(kind, width)
                spent = dense.step_flops / run.step_flops
                what = "times the seconds per FLOP of dense"
                numbers = [Number(f"main_job/{kind}, {at}", what, (kind,), factor=spent, same=False)]
                yield Case(f"{kind}, {at}", {OURS: ours, kind: training(run, threads)}, numbers, settings, budget_s=4)


WORKS = (
    Work(
        "main_job",
        "training steps of a comparison's models: seconds per FLOP over dense's",
        cases,
        tuple(id for id in FLOORS if id.startswith("main_job/")),
    ),
)
