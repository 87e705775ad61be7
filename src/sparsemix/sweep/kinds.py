"""What `sparsemix kinds` shows of a kind: its settings, and what an example of it costs."""

from typing import Literal, get_args, get_origin

from pydantic_core import PydanticUndefined
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsemix.config import Config, ConfigError, nearest
from sparsemix.layers import Cost, LayerConfig
from sparsemix.layers.sizing import example
from sparsemix.layers.ternary import PRECISIONS, PrecisionConfig


def described(kind: str | None, d_model: int, seq_len: int) -> Group:
    """Every kind, or one, with its settings and an example's cost at this width and length. Raises ConfigError."""
    known = LayerConfig.family or {}
    if kind is not None and kind not in known:
        raise ConfigError(f"kind={kind} is none of {', '.join(sorted(known))}{nearest(kind, known)}")
    parts: list[RenderableType] = []
    for name in [kind] if kind else sorted(known):
        config_type = known[name]
        assert issubclass(config_type, LayerConfig)
        parts.append(Text.assemble((name, "bold"), f": {' '.join((config_type.__doc__ or '').split())}"))
        parts.append(settings_table(config_type))
        if (config := example(name, d_model, seq_len)) is not None:
            cost = cost_line(config.cost(d_model, seq_len), seq_len)
            parts.append(Text(f"  example at width {d_model}, {cost}"))
        parts.append(Text(""))
    return Group(*parts)


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
