"""How far a converted model is from the one it was made of: measured, and in words."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from sparsemix import __version__
from sparsemix.data import Batch
from sparsemix.evaluate.perplexity import context, evaluating, to_device
from sparsemix.interop.convert import Converted
from sparsemix.interop.plan import Swap
from sparsemix.layers import Cost, LayerConfig, MoDConfig
from sparsemix.model import LM, ModelConfig, token_nats
from sparsemix.ops.precision import at_least_fp32

# Two orders of one sum in fp32 differ by this share of the largest logit at most.
ROUNDING = 1e-4
# Costs are quoted at this length at most: attention over a full context would hide the rest.
COST_LEN = 2048


class Distance(NamedTuple):
    """Logits of both models under the causal rule on the same tokens. KL is that of the old from the new, nats."""

    tokens: int
    max_abs: float
    mean_abs: float
    largest: float
    kl: float
    perplexity_before: float
    perplexity_after: float

    @property
    def equal(self) -> bool:
        """Equal to rounding?"""
        return self.max_abs <= ROUNDING * self.largest


def distance(old: LM, new: LM, batches: Iterable[Batch]) -> Distance:
    """Of `batches` small enough for three tensors of logits in fp64."""
    worst = largest = 0.0
    apart, kl, before, after, entries, tokens = 0.0, 0.0, 0.0, 0.0, 0, 0
    with evaluating(old), evaluating(new):
        for batch in batches:
            batch = to_device(batch, old.embed.weight.device)
            real = batch.targets != -100
            one, two = (at_least_fp32(model(batch.tokens, context(batch, True)).logits)[real] for model in (old, new))
            gap = (one - two).abs()
            worst, largest = max(worst, float(gap.max())), max(largest, float(one.abs().max()))
            apart, entries, tokens = apart + float(gap.double().sum()), entries + gap.numel(), tokens + len(one)
            log_p, log_q = one.double().log_softmax(-1), two.double().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            targets = batch.targets[real][None]
            before += float(token_nats(one[None], targets).double().sum())
            after += float(token_nats(two[None], targets).double().sum())
    perplexities = (float(np.exp(nats / tokens)) for nats in (before, after))
    return Distance(tokens, worst, apart / entries, largest, kl / tokens, *perplexities)


def receipt(source: str, old: LM, converted: Converted, measured: Distance, text: list[str]) -> dict[str, Any]:
    """What is saved as receipt.json; `text` is empty where random tokens had to do."""
    planned, origins = converted.plan, converted.origins
    sizes = {name: tensor.numel() for name, tensor in converted.model.named_parameters()}
    copied = [name for name, said in origins.made.items() if isinstance(said, tuple)]
    kept = {"perplexity_before": measured.perplexity_before, "perplexity_after": measured.perplexity_after}
    seq_len = min(planned.model.seq_len, COST_LEN)
    return {
        "sparsemix_version": __version__,
        "source": source,
        "text": text or None,
        "tokens": measured.tokens,
        "max_abs_logit_difference": measured.max_abs,
        "mean_abs_logit_difference": measured.mean_abs,
        "largest_abs_logit": measured.largest,
        "kl_nats": measured.kl,
        "equal_to_rounding": measured.equal,
        **(kept if text else dict.fromkeys(kept)),
        "cost_seq_len": seq_len,
        "before": costs(old.config, seq_len),
        "after": costs(planned.model, seq_len),
        "feed_forwards": [described(swap) for swap in planned.swaps],
        "mod": {str(i): wrapped(planned.model.blocks[i]) for i in planned.wrapped},
        "parameters": {
            "carried": sum(size for name, size in sizes.items() if name in origins.carried),
            "copied": sum(sizes[name] for name in copied),
            "set": sum(size for name, size in sizes.items() if name in origins.made and name not in copied),
            "drawn": sum(sizes[name] for name in origins.drawn),
        },
        "made": {name: list(said) if isinstance(said, tuple) else said for name, said in origins.made.items()},
        "drawn": list(origins.drawn),
        "dropped": list(origins.dropped),
    }


def costs(config: ModelConfig, seq_len: int) -> dict[str, float]:
    cost: Cost = config.cost(seq_len)
    return {
        "params": cost.params,
        "active_params": cost.active_params,
        "flops_per_token": cost.flops / seq_len,
    }


def described(swap: Swap) -> dict[str, Any]:
    kinds = {name: getattr(config, "kind", "") for name, config in (("from", swap.old), ("to", swap.added))}
    return {"block": swap.block, **kinds, "how": swap.how, "why": swap.why}


def wrapped(block: LayerConfig) -> dict[str, Any]:
    assert isinstance(block, MoDConfig)
    return {"capacity": block.capacity, "anneal_steps": block.anneal_steps, "gate": block.gate}


def warning(said: dict[str, Any]) -> str | None:
    """One line where the logits differ; None where they are equal to rounding."""
    if said["equal_to_rounding"]:
        return None
    whys = dict.fromkeys(part["why"] for part in said["feed_forwards"] if part["how"] == "copied" and part["why"])
    fresh = [str(part["block"]) for part in said["feed_forwards"] if part["how"] == "fresh"]
    if fresh:
        whys[f"the feed-forward of block {', '.join(fresh)} is drawn anew"] = None
    reason = "; ".join(whys) or "rounding in low precision"
    return f"the converted model differs from its source: {reason}; --init keep starts equal, at more FLOPs"


def lines(said: dict[str, Any]) -> list[str]:
    """The receipt in words."""
    where = f"{', '.join(said['text'])}" if said["text"] else "random tokens: the source has no tokenizer"
    apart = "equal to rounding" if said["equal_to_rounding"] else "different"
    shown = [
        f"source: {said['source']}",
        f"logits on {said['tokens']} tokens ({where}): {apart}, max |difference| "
        f"{said['max_abs_logit_difference']:.3g}, mean {said['mean_abs_logit_difference']:.3g}, KL "
        f"{said['kl_nats']:.3g} nats; the largest logit is {said['largest_abs_logit']:.3g}",
    ]
    if said.get("read"):
        shown.append(said["read"])
    if said["perplexity_before"] is not None:
        shown.append(f"perplexity: {said['perplexity_before']:.5g} before, {said['perplexity_after']:.5g} after")
    for name, unit in (("params", "parameters"), ("active_params", "parameters a token uses")):
        shown.append(f"{unit}: {_short(said['before'][name])} before, {_short(said['after'][name])} after")
    before, after = said["before"]["flops_per_token"], said["after"]["flops_per_token"]
    goal = ", at the goal capacity" if said["mod"] else ""
    at = f"at {said['cost_seq_len']} tokens{goal}"
    shown.append(
        f"forward FLOPs a token ({at}): {_short(before)} before, {_short(after)} after, {after / before:.3g} x"
    )
    alike: dict[str, list[str]] = {}
    for part in said["feed_forwards"]:
        why = f" ({part['why']})" if part["why"] else ""
        alike.setdefault(f"{part['from']} -> {part['to']}, {HOW[part['how']]}{why}", []).append(str(part["block"]))
    shown += [f"feed-forward of block {', '.join(blocks)}: {words}" for words, blocks in alike.items()]
    if said["mod"]:
        wrap = next(iter(said["mod"].values()))
        shown.append(
            f"mod around block {', '.join(said['mod'])}: starts with every token at a gate of 1, falls to a capacity "
            f"of {wrap['capacity']:g} in {wrap['anneal_steps']} training steps"
        )
    counts = {"carried": "unchanged", "copied": "copies", "set": "set to a value", "drawn": "drawn anew"}
    parts = (f"{_short(said['parameters'][name])} {words}" for name, words in counts.items())
    shown.append(f"parameters by origin: {', '.join(parts)}")
    shown.append(f"tensors of the source that were dropped: {len(said['dropped'])}{_named(said['dropped'])}")
    return shown


HOW = {"copied": "experts are copies of it", "kept": "it stays, what is added starts at 0", "fresh": "drawn anew"}


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"


def _named(names: list[str]) -> str:
    return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
