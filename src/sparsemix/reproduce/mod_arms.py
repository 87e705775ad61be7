"""The models that the reproductions of Mixture-of-Depths compare, and a run's settings from a scale alone."""

from sparsemix.config import parse
from sparsemix.data.shards import DataConfig
from sparsemix.layers import DenseConfig
from sparsemix.layers.linear import num_matrices
from sparsemix.layers.sizing import sized_ffn
from sparsemix.recipes import settings_of
from sparsemix.reproduce.base import Design, Scale
from sparsemix.settings import RunConfig
from sparsemix.sweep.arms import Arm, backbone, run_config

FAMILY = "mod-dense"
# The paper lists no shapes: these stand for its 60 M to 3 B parameters, smallest first.
PUBLISHED = ("512x12", "1024x14", "768x28", "1280x22", "1792x24", "2560x36")
CAPACITY = 0.125


def routed_name(capacity: float) -> str:
    return f"MoD {100 * capacity:g} %"


def routed(capacity: float = CAPACITY, *changes: str, name: str | None = None) -> Arm:
    """Mixture-of-Depths around every other block at a capacity; `changes` are settings of the wrapper."""
    own = (f"capacity={capacity}", *changes)
    return Arm(name or routed_name(capacity), "mod", tuple(f"model.blocks.wrap.{change}" for change in own))


DENSE = Arm("dense")
MOD = routed()
RANDOM_HALF = routed(0.5, "selector=random", name="random 50 %")
TOKEN_CHOICE = routed(CAPACITY, "selector=token_choice", name="token choice 12.5 %")
RANDOM = routed(CAPACITY, "selector=random", name="random 12.5 %")
STRIDED = routed(CAPACITY, "selector=strided", name="strided 12.5 %")
EVERY_BLOCK = routed(CAPACITY, "at=every", name="MoD 12.5 %, every block")
# Experts stand in the blocks that are routed in `mod+moe`, whatever else is compared with it.
MOE = Arm("MoE", "moe", placement="every-2")
STAGED = Arm("staged MoDE", "mod+moe", placement="every-2")
INTEGRATED = Arm("integrated MoDE", "mode", placement="every-2")


def size_of(scale: Scale) -> str:
    """The size of the family that runs without a ladder have: 220 M parameters in the paper."""
    return "1024x14" if scale.name == "paper" else scale.size


def single(scale: Scale, *arms: Arm, seeds: int | None = None) -> Design:
    """All seeds of the arms at one size and budget."""
    return Design(FAMILY, arms, size=size_of(scale), seeds=seeds)


def planned(scale: Scale, arm: Arm) -> RunConfig:
    """The settings that a run of the arm has without a ladder, but for its text. Raises ConfigError."""
    raw = backbone(f"{FAMILY}:{size_of(scale)}", scale.overrides)
    data = parse(DataConfig, {"vocab_size": raw["model"]["vocab_size"]})
    return run_config(arm, raw, data, scale.budget)


def feed_forward(scale: Scale) -> DenseConfig:
    """The backbone's own feed-forward."""
    blocks = settings_of(f"{FAMILY}:{size_of(scale)}", scale.overrides)["model"]["blocks"]
    return parse(DenseConfig, blocks["each"]["ffn"])


def forward_flops(config: RunConfig) -> float:
    """FLOPs of a forward pass per token."""
    return config.model.cost().flops / config.model.seq_len


def shallower(scale: Scale) -> Arm:
    """The dense model that costs per token what MoD does: as many blocks as come nearest, then a feed-forward width
    that takes up the rest."""
    target, dense = planned(scale, MOD), planned(scale, DENSE)
    full, outside = dense.model.cost().flops, dense.model.cost().items["logits"]
    count = len(dense.model.blocks)
    depth = max(1, round((target.model.cost().flops - outside) / (full - outside) * count))
    ffn = feed_forward(scale)
    cut = planned(scale, Arm("cut", changes=(f"model.blocks.count={depth}",)))
    per_channel = 2 * num_matrices(ffn.activation) * dense.model.d_model * depth
    missing = forward_flops(target) - forward_flops(cut)
    d_ff = max(1, ffn.d_ff + round(missing / per_channel))
    return Arm("shallower dense", changes=(f"model.blocks.count={depth}", f"model.blocks.each.ffn.d_ff={d_ff}"))


def dropping(scale: Scale) -> Arm:
    """The MoE with the experts of the integrated MoDE and so few seats that its picks cost the same: what finds no seat
    is dropped, where the integrated router chooses to skip."""
    dense = planned(scale, DENSE).model
    mode = sized_ffn("mode", feed_forward(scale), dense.d_model, dense.seq_len)
    seats = mode["num_experts"] / (mode["num_experts"] + mode["num_noop"])
    changes = (f"model.blocks.ffn.d_ff={mode['d_ff']}", f"model.blocks.ffn.capacity_factor={seats:g}")
    return Arm("MoE, reduced capacity", "moe", changes, placement="every-2")


def without_predictor(scale: Scale) -> Arm:
    """MoD whose causal rule is a running threshold, for exactly as many steps as with the predictor, which costs FLOPs:
    so the learning rates of both are the same at every step."""
    arm = routed(CAPACITY, "sampling=threshold", name="MoD 12.5 %, no predictor")
    steps = planned(scale, MOD).steps
    # Half a step more than whole steps: the budget buys exactly so many.
    budget = (steps + 0.5) * planned(scale, arm).step_flops
    return arm._replace(changes=(*arm.changes, f"train.budget_flops={budget!r}"))


def router_bce(weight: float) -> Arm:
    """MoD whose router learns, by a cross-entropy of this weight, to say by its sign what the top-k will take."""
    changes = ("sampling=router_bce", f"router_loss_weight={weight:g}")
    return routed(CAPACITY, *changes, name=f"MoD 12.5 %, router BCE x {weight:g}")
