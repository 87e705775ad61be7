"""PEER's experiments (arXiv:2407.04153): the sizes of its layers at each scale, and the arms that they make."""

from typing import Any, NamedTuple

from sparsemix.layers import DenseConfig
from sparsemix.layers.sizing import key_width
from sparsemix.report.records import Record
from sparsemix.reproduce.base import Scale
from sparsemix.sweep.arms import Arm, backbone

RECIPE = "peer-dense"


class Sizes(NamedTuple):
    """What replaces the feed-forward of the middle block. num_experts is side * side; d_key None: that of every layer
    sized here (`layers/sizing.py::key_width`); moe_experts: of the mixture, each as wide as the dense layer.

    The rule below the paper's scale: heads * top_k small enough that PEER costs 0.3 to 1.5 times the dense layer over
    the widths of the curves (laptop: 128 to 32), as it does in the paper from L13 to L4, and so few experts that each
    is picked hundreds of times in a run. The demo has fewer heads, as its widths are half as large; at the least width
    of both PEER costs 2.5 times. Whatever a layer costs, the budget pays it. The recipes' sizes have these layers."""

    side: int
    num_heads: int
    top_k: int
    d_key: int | None
    moe_experts: int


SMALL = Sizes(side=128, num_heads=4, top_k=8, d_key=None, moe_experts=16)
SIZES = {
    "demo": SMALL._replace(num_heads=2),
    "laptop": SMALL,
    "gpu": Sizes(side=512, num_heads=8, top_k=16, d_key=None, moe_experts=64),
    "paper": Sizes(side=1024, num_heads=8, top_k=16, d_key=256, moe_experts=128),
}

# Where one size is compared: at the small scales, a width near the predicted optimum of dense at the budget; in the
# paper the best PEER of its smaller budget.
ONE_SIZE = {"demo": ("30k", None), "laptop": ("300k", 48), "gpu": ("30M", None), "paper": ("L8", None)}


def sizes(scale: Scale) -> Sizes:
    return SIZES[scale.name]


def one_size(scale: Scale) -> tuple[str, tuple[str, ...]]:
    """The size of the recipe, and overrides that make its backbone narrower in proportion."""
    size, width = ONE_SIZE[scale.name]
    return size, narrowed(size, width) if width else ()


def narrowed(size: str, width: int) -> tuple[str, ...]:
    """Overrides that turn a scale's backbone into the one that curves have at `width`."""
    blocks = backbone(f"{RECIPE}:{size}", width=width)["model"]["blocks"]
    return (
        f"model.d_model={width}",
        f"model.blocks.count={blocks['count']}",
        f"model.blocks.each.mixer.num_heads={blocks['each']['mixer']['num_heads']}",
        f"model.blocks.each.ffn.d_ff={blocks['each']['ffn']['d_ff']}",
    )


def peer(name: str, own: Sizes, *changes: str) -> Arm:
    """PEER of these sizes in the middle block."""

    def sized(dense: DenseConfig, d_model: int) -> dict[str, Any]:
        return {"num_experts": own.side**2, **_look_up(own, own.top_k, d_model)}

    return Arm(name, "peer", changes, sized=sized)


def pkm(own: Sizes) -> Arm:
    """Product-key memory with as many values as PEER has experts, of which a head mixes twice as many: 8 heads of 32
    beside PEER's 8 of 16 in the paper, equal FLOPs of looked-up rows."""

    def sized(dense: DenseConfig, d_model: int) -> dict[str, Any]:
        return {"num_values": own.side**2, **_look_up(own, 2 * own.top_k, d_model)}

    return Arm("PKM", "pkm", sized=sized)


def expert_choice(own: Sizes) -> Arm:
    """Experts that choose their tokens, each as wide as the dense layer. The paper does not state the capacity; a
    factor of 1 costs what the dense layer costs."""

    def sized(dense: DenseConfig, d_model: int) -> dict[str, Any]:
        return {
            "num_experts": own.moe_experts,
            "capacity_factor": 1.0,
            "d_ff": dense.d_ff,
            "activation": dense.activation,
        }

    return Arm("MoE", "expert_choice", sized=sized)


def methods(scale: Scale) -> list[Arm]:
    """The four methods in the order of the paper's table."""
    own = sizes(scale)
    return [Arm("Dense"), expert_choice(own), pkm(own), peer("PEER", own)]


def layer(record: Record, kind: str = "peer") -> tuple[str, dict[str, Any]]:
    """(path, settings) of a run's first layer of a kind, as its settings name it."""
    for i, block in enumerate(record.settings["model"]["blocks"]):
        if block.get("ffn", {}).get("kind") == kind:
            return f"blocks.{i}.ffn", block["ffn"]
    raise AssertionError(f"{record.folder.name} has no {kind}")


def _look_up(own: Sizes, top_k: int, d_model: int) -> dict[str, Any]:
    d_key = own.d_key or key_width(d_model)
    return {"num_heads": own.num_heads, "top_k": top_k, "d_key": d_key}
