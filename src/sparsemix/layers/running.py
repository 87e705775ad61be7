"""The step of running state: every layer takes up what it observed, and nothing is left over or missing."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsemix.config import ConfigError
from sparsemix.layers.base import Layer


def update(module: nn.Module, stats: Mapping[str, Tensor]) -> None:
    """Let every layer inside `module` take up its own entries of `stats`; call once per optimizer step.

    Where torch.distributed runs, they are averaged over the ranks first, with equal weights: every rank calls this,
    with the same entries, and all ranks keep the same running state. Raises ConfigError for an entry of no layer
    inside, and where one that a training layer observes is missing."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}
    keys = {name: {entry: _key(name, entry) for entry in layer.observes} for name, layer in layers.items()}
    _check(module, layers, keys, stats)
    seen = rank_means({key: stats[key] for own in keys.values() for key in own.values() if key in stats})
    for name, layer in layers.items():
        layer.update({entry: seen[key] for entry, key in keys[name].items() if key in seen})


def rank_means(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every entry's mean over the ranks of torch.distributed, in one exchange; the entries themselves without it."""
    if not stats or not dist.is_available() or not dist.is_initialized():
        return stats
    flat = torch.cat([value.detach().double().flatten() for value in stats.values()])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([value.numel() for value in stats.values()])
    return {key: part.view_as(stats[key]).to(stats[key]) for key, part in zip(stats, parts, strict=True)}


def _key(path: str, entry: str) -> str:
    return f"{path}.{entry}" if path else entry


def _check(
    module: nn.Module, layers: dict[str, Layer], keys: dict[str, dict[str, str]], stats: Mapping[str, Tensor]
) -> None:
    unknown = [key for key in stats if key.rpartition(".")[0] not in layers]
    # A layer in evaluation mode (a frozen part of a training model) observes nothing.
    missing = [key for name, own in keys.items() if layers[name].training for key in own.values() if key not in stats]
    if not unknown and not missing:
        return
    kind = type(module).__name__
    wrong = [f"has an entry of no layer inside this {kind}: {unknown[0]}"] if unknown else []
    wrong += [f"lacks {missing[0]}, which a layer inside this {kind} observes"] if missing else []
    raise ConfigError(f"stats {' and '.join(wrong)}; {_way_out(module, layers, stats, unknown)}")


def _way_out(module: nn.Module, layers: Iterable[str], stats: Mapping[str, Tensor], unknown: list[str]) -> str:
    owners = {key.rpartition(".")[0] for key in stats}
    for path, _ in module.named_modules():
        if unknown and path and all(_key(path, owner).rstrip(".") in layers for owner in owners):
            part = f"module.get_submodule({path!r})"
            return f"call sparsemix.update({part}, aux.stats), or update(module, aux.under({path!r}).stats)"
    parts = unknown[0].split(".")[:-1] if unknown else []
    for i in range(1, len(parts) + 1):
        prefix = ".".join(parts[:i]) + "."
        if all(f"{owner}.".startswith(prefix) and f"{owner}."[len(prefix) :].rstrip(".") in layers for owner in owners):
            return (
                f"call sparsemix.update on the module that holds this one as {prefix[:-1]}, or pass its own aux.stats"
            )
    return (
        "pass together what the layers inside returned in this training step, each under its own path: "
        "sparsemix.update(module, (aux_a.under('a') | aux_b.under('b')).stats)"
    )
