"""What `sparsemix kinds` shows of a kind: its settings, and what an example of it costs."""

from typing import Literal, get_args, get_origin

from pydantic_core import PydanticUndefined
from rich.table import Table

from sparsemix.config import Config
from sparsemix.layers import Cost
from sparsemix.layers.ternary import PRECISIONS, PrecisionConfig


def settings_table(config_type: type[Config]) -> Table:
    """Name, default, type and bounds of every setting."""
    table = Table("  setting", "default", "values", box=None, pad_edge=False)
    for name, info in config_type.model_fields.items():
        if name != "kind":
            annotation = info.annotation
            values = getattr(annotation, "__name__", str(annotation))
            if get_origin(annotation) is Literal:
                values = ", ".join(get_args(annotation))
            if annotation is PrecisionConfig:
                values = ", ".join(PRECISIONS)
            bounds = [str(rule).split("(")[1].rstrip(")") for rule in info.metadata if "(" in str(rule)]
            default = "required" if info.default is PydanticUndefined else str(info.default)
            table.add_row(f"  {name}", default, ", ".join([values, *bounds]))
    return table


def cost_line(cost: Cost, seq_len: int) -> str:
    """FLOPs, parameters and bytes of one token."""
    return (
        f"per token: {cost.flops / seq_len / 1e6:.3g} MFLOPs; {cost.active_params / 1e6:.3g} M of "
        f"{cost.params / 1e6:.3g} M parameters and {cost.bytes / 1e6:.3g} MB touched"
    )
