"""A training step of every kind at equal FLOPs per token: whose rate is what share of dense's?"""

from collections.abc import Callable, Iterator

from sparsemix.bench.training import our_optimizer
from sparsemix.bench.work import OURS, Case, Contender, Number, Work
from sparsemix.bench.works.depth import loss_of, stepping
from sparsemix.config import parse
from sparsemix.data import DataConfig
from sparsemix.model import ModelConfig
from sparsemix.recipes import settings_of
from sparsemix.sweep.compare import CompareConfig, kind_config


def cases(quick: bool) -> Iterator[Case]:
    """The kinds of a comparison on the smallest recipe."""
    settings = parse(CompareConfig, {"recipe": "tiny"})
    data = DataConfig(vocab_size=settings_of("tiny")["model"]["vocab_size"])
    configs = {kind: kind_config(settings, kind, data, 1e30) for kind in settings.kinds}

    def contender(model: ModelConfig, batch_size: int) -> Callable[[], Contender]:
        def make() -> Contender:
            import torch

            built = model.build(0)
            tokens = torch.randint(model.vocab_size, (batch_size, model.seq_len + 1))
            return Contender(stepping(loss_of(built, tokens), our_optimizer(built)))

        return make

    dense = configs["dense"]
    numbers = [
        Number(
            f"kinds/{kind}",
            "of the FLOP rate of dense",
            (OURS,),
            kind,
            factor=config.step_flops / dense.step_flops,
            same=False,
        )
        for kind, config in configs.items()
        if kind != "dense"
    ]
    steps = {kind if kind != "dense" else OURS: contender(c.model, c.batch_size) for kind, c in configs.items()}
    yield Case("training step", steps, numbers, {"recipe": "tiny", "ours": "dense"})


WORKS = (Work("kinds", "training step of every kind, not compiled", cases),)
