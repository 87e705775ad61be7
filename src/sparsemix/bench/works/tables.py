"""PKM beside product-key-memory, and the optimizer of tables beside SparseAdam and dense AdamW."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sparsemix.bench import peers
from sparsemix.bench.agreement import direction, movement
from sparsemix.bench.training import Training, our_optimizer, twin_input
from sparsemix.bench.work import OURS, Case, Contender, Number, Work
from sparsemix.layers import Layer
from sparsemix.ops.row_mix import row_mix

D, HEADS, K, D_KEY = 256, 4, 32, 256


def pkm_cases(quick: bool) -> Iterator[Case]:
    """A memory of n * n values, forward and backward, dense gradients on both sides; then with the optimizers."""
    num_values, num_tokens = (64**2, 128) if quick else (512**2, 512)
    peer = "product-key-memory"

    def layer_of(values: int) -> Layer:
        torch.manual_seed(0)
        return peers.our_pkm(values, D, HEADS, K, D_KEY).train()

    def as_ours(entry: dict[str, Tensor]) -> dict[str, Tensor]:
        return peers.pkm_names(entry, HEADS)

    def ours(values: int, tokens: int, optimize: bool, catch_up: bool = False) -> Training:
        layer = layer_of(values)
        return Training(layer, twin_input(tokens, D), our_optimizer(layer, catch_up=catch_up) if optimize else None)

    def theirs(values: int, tokens: int, optimize: bool) -> Training:
        layer = peers.product_key_memory(layer_of(values))
        return Training(layer, twin_input(tokens, D), peers.adam(layer, 1e-3) if optimize else None, as_ours)

    small = (64**2, 32)
    for name, optimize in (("forward and backward", False), ("training step", True)):

        def mine(optimize: bool = optimize) -> Contender:
            run = ours(num_values, num_tokens, optimize)
            moved = ours(*small, True, catch_up=True).moved if optimize else None
            return Contender(run.step if optimize else run.backward, ours(*small, False).probe, moved)

        def other(optimize: bool = optimize) -> Contender:
            run = theirs(num_values, num_tokens, optimize)
            moved = theirs(*small, True).moved if optimize else None
            return Contender(run.step if optimize else run.backward, theirs(*small, False).probe, moved)

        yield Case(
            name,
            {OURS: mine, peer: other},
            [Number(f"pkm_step/{name}", f"times as fast as {peer}", (peer,))],
            {"num_values": num_values, "num_heads": HEADS, "top_k": K, "num_tokens": num_tokens},
        )


class Mix(Layer):
    """y_n = sum_r coef_r rows[ids_nr]: a table and nothing else, so that its optimizer is what is measured."""

    tables = ("rows",)

    def __init__(self, num_rows: int, d_model: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(num_rows, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.rows)

    def mix(self, coef: Float[Tensor, "N R"], ids: Int[Tensor, "N R"]) -> Float[Tensor, "N D"]:
        return row_mix(coef, ids, self.rows, self.row_grads)


Stepping = tuple[Mix, Callable[[], None]]


def optimizer_cases(quick: bool) -> Iterator[Case]:
    """Look-up, backward and step of one table; 512 tokens, 128 rows each."""
    N, R, M = 512, 128, (2**12 if quick else 2**18)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(N, R, generator=generator), torch.randint(M, (N, R), generator=generator)) for _ in "abc"]

    def made(optimizer_of: Callable[[Mix], torch.optim.Optimizer], bag: str | None) -> Stepping:
        torch.manual_seed(0)
        layer = Mix(M, D)
        optimizer, done = optimizer_of(layer), [0]

        def step() -> None:
            coef, ids = batches[done[0] % len(batches)]
            done[0] += 1
            optimizer.zero_grad()
            if bag is None:
                y = layer.mix(coef, ids)
            else:
                table = layer.rows
                y = F.embedding_bag(ids, table, mode="sum", per_sample_weights=coef, sparse=bag == "sparse")
            y.backward(direction(y))
            optimizer.step()

        return layer, step

    def moved(made: Stepping) -> dict[str, Tensor]:
        layer, step = made
        return movement({"values": layer.rows}, step)

    def ours(catch_up: bool) -> Contender:
        # Compared with catch-up on: without it rows that a step leaves out move less, by design.
        run = made(lambda layer: our_optimizer(layer, catch_up=catch_up), None)[1]
        return Contender(run, lambda: moved(made(lambda layer: our_optimizer(layer, catch_up=True), None)))

    def dense_adam() -> Contender:
        def peer() -> Stepping:
            return made(lambda layer: peers.adam(layer, 1e-3), "dense")

        return Contender(peer()[1], lambda: moved(peer()))

    def sparse_adam() -> Contender:
        def optimizer(layer: Mix) -> torch.optim.Optimizer:
            return torch.optim.SparseAdam(layer.parameters(), lr=1e-3, betas=(0.9, 0.95))

        return Contender(made(optimizer, "sparse")[1])

    caught_up, sparse, dense = "ours, exact catch-up", "SparseAdam", "embedding_bag and fused AdamW"
    yield Case(
        "one table",
        {OURS: lambda: ours(False), caught_up: lambda: ours(True), sparse: sparse_adam, dense: dense_adam},
        [
            Number("table_optimizer/AdamW", f"times as fast as {dense}", (dense,)),
            Number("table_optimizer/AdamW, exact", f"times as fast as {dense}", (dense,), caught_up),
            Number("table_optimizer/SparseAdam", f"times as fast as {sparse}, other steps", (sparse,), same=False),
        ],
        {"rows": M, "d_model": D, "picks": N * R},
        tolerance=1e-2,
    )


WORKS = (
    Work("pkm_step", "product-key memory", pkm_cases),
    Work("table_optimizer", "optimizer of a table", optimizer_cases),
)
