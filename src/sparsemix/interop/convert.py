"""A decoder with other layers: settings and weights from those it has."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsemix.data import Batch
from sparsemix.evaluate.perplexity import context, to_device
from sparsemix.interop.plan import ConvertConfig, Plan, Swap, ffn_path, plan
from sparsemix.interop.upcycle import Made, copy, open_gates, silence
from sparsemix.layers import DenseConfig, MoDConfig
from sparsemix.layers.mod import MoD
from sparsemix.layers.query_norm import QueryBatchNorm
from sparsemix.layers.threshold import RunningThreshold
from sparsemix.model import LM


@dataclass(frozen=True)
class Origins:
    """Where every tensor comes from. carried: unchanged, new name -> old name. made: new name -> the old names that it
    copies, or a sentence. drawn: parameters as a new layer starts. dropped: old names that nothing was made from."""

    carried: dict[str, str]
    made: Made
    drawn: tuple[str, ...]
    dropped: tuple[str, ...]


class Converted(NamedTuple):
    """The new model in evaluation mode, in the old one's dtype; what was changed; where its tensors come from."""

    model: LM
    plan: Plan
    origins: Origins


@torch.no_grad()
def convert(model: LM, settings: ConvertConfig) -> Converted:
    """The model that `settings` make of `model`, which stays as it is. New layers' running statistics are not observed
    yet: `observe` before an evaluation. Raises ConfigError."""
    planned = plan(model.config, settings)
    old = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    new = planned.model.build(settings.seed).to(model.embed.weight.device, model.embed.weight.dtype).eval()
    carried = _carried(new, model, planned)
    new.load_state_dict({name: old[source] for name, source in carried.items()}, strict=False)
    made: Made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for swap in planned.swaps:
            made |= _fill(new, old, planned, swap, settings.noise)
    for i in planned.wrapped:
        layer, config = new.blocks[i], planned.model.blocks[i]
        assert isinstance(layer, MoD) and isinstance(config, MoDConfig)
        made |= _under(f"blocks.{i}", open_gates(layer, config))
    used = {*carried.values(), *(name for names in made.values() if isinstance(names, tuple) for name in names)}
    drawn = tuple(name for name, _ in new.named_parameters() if name not in carried and name not in made)
    return Converted(new, planned, Origins(carried, made, drawn, tuple(name for name in old if name not in used)))


def _under(prefix: str, made: Made) -> Made:
    return {f"{prefix}.{name}": said for name, said in made.items()}


def feed_paths(planned: Plan, swap: Swap) -> tuple[str, str]:
    """The module of a swapped feed-forward before and after."""
    after = ffn_path(planned.model.blocks[swap.block])
    before = after.removeprefix("inner.") if swap.block in planned.wrapped else after
    return f"blocks.{swap.block}.{before}", f"blocks.{swap.block}.{after}"


def new_path(planned: Plan, swap: Swap) -> str:
    """The module of the layer that a swap adds, without what it keeps."""
    after = feed_paths(planned, swap)[1]
    return after if swap.added is swap.new else f"{after}.added"


def _carried(new: LM, old: LM, planned: Plan) -> dict[str, str]:
    """New name -> old name of every tensor outside swapped feed-forwards, and of those that are kept."""
    names: dict[str, str] = {}
    for name in old.state_dict():
        part, _, rest = name.partition(".")
        number, _, below = rest.partition(".")
        wrapped = part == "blocks" and int(number) in planned.wrapped
        names[f"blocks.{number}.inner.{below}" if wrapped else name] = name
    for swap in planned.swaps:
        before, after = feed_paths(planned, swap)
        inside = [name for name in names if name.startswith(f"{after}.")]
        where = "shared" if swap.added is swap.new else "kept"
        for name in inside:
            source = names.pop(name)
            if swap.how == "kept":
                names[f"{after}.{where}.{source.removeprefix(f'{before}.')}"] = source
    there = new.state_dict()
    missing = [name for name in names if name not in there]
    assert not missing, f"the converted model lacks {missing}"
    return names


def _fill(new: LM, old: dict[str, Tensor], planned: Plan, swap: Swap, noise: float) -> Made:
    """Give the layer of a swap its first weights; what they were made from, by full names."""
    before, after = feed_paths(planned, swap)
    layer = new.get_submodule(after)
    if swap.how == "fresh":
        return {}
    if swap.how == "kept":
        path = new_path(planned, swap)
        return _under(path, silence(new.get_submodule(path), shared=path != after))
    assert isinstance(swap.old, DenseConfig)
    source = {name.removeprefix(f"{before}."): t for name, t in old.items() if name.startswith(f"{before}.")}
    made = copy(layer, swap.new, swap.old, source, noise)
    full: Made = {
        name: tuple(f"{before}.{part}" for part in said) if isinstance(said, tuple) else said
        for name, said in made.items()
    }
    return _under(after, full)


@torch.no_grad()
def observe(converted: Converted, batches: Iterable[Batch]) -> bool:
    """Give new layers' running statistics and thresholds their mean over `batches`, routed as in training; False if no
    new layer has any."""
    model, planned = converted.model, converted.plan
    paths = tuple(f"{new_path(planned, swap)}." for swap in planned.swaps)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith(paths) and isinstance(layer, (RunningThreshold, QueryBatchNorm))
    }
    keys = [f"{name}.{entry}" for name, layer in layers.items() for entry in layer.observes]
    if not layers:
        return False
    totals: dict[str, Tensor] = {}
    count = 0
    model.train()
    for batch in batches:
        batch = to_device(batch, model.embed.weight.device)
        stats = model(batch.tokens, context(batch, False)).aux.stats
        totals = {key: totals.get(key, 0) + stats[key] for key in keys}
        count += 1
    model.eval()
    for name, layer in layers.items():
        layer.forget()
        layer.update({entry: totals[f"{name}.{entry}"] / count for entry in layer.observes})
    return True
