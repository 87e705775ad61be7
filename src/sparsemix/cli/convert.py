"""`sparsemix convert`. Heavy imports are inside: the command line answers at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemix.cli.early import refuse_misfit, refuse_texts, trained_folder
from sparsemix.cli.options import Text, TextAs
from sparsemix.cli.output import interruptible
from sparsemix.errors import ConfigError
from sparsemix.inputs import expanded, refuse_used, tried
from sparsemix.terminal import say


def convert(
    model: Annotated[str, typer.Argument(help="A Hugging Face decoder's folder, a run's, or hf:ORG/NAME.")],
    to: Annotated[Path, typer.Option(help="Folder of the converted model: a new one.")],
    ffn: Annotated[str | None, typer.Option(help="Kind that takes the feed-forwards' places: moe, peer, ...")] = None,
    ffn_set: Annotated[
        list[str] | None, typer.Option("--ffn-set", help="A setting of it, such as num_experts=8. Repeatable.")
    ] = None,
    layers: Annotated[str, typer.Option(help="Which blocks: middle, every, every-2, or numbers: 1,3.")] = "every",
    init: Annotated[
        str,
        typer.Option(help="upcycle: copies of the feed-forward; keep: it stays, the new layer starts at 0; fresh."),
    ] = "upcycle",
    noise: Annotated[float, typer.Option(help="Added to copied weights, as a share of their deviation.")] = 0.0,
    mod: Annotated[str | None, typer.Option(help="Wrap blocks in Mixture-of-Depths: capacity=0.125,every=2.")] = None,
    text: Text = None,
    text_as: TextAs = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to compare both models on.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of routers, noise and what is drawn anew.")] = 0,
) -> None:
    """Give a pre-trained decoder conditional layers, with a receipt of how far its logits moved."""
    refuse_used(expanded(to))
    tried(to, "to", folder=True)
    if not model.startswith("hf:"):
        trained_folder(expanded(model))

    if ffn is None and ffn_set:
        raise ConfigError(f"ffn-set={ffn_set[0]} needs --ffn KIND, whose setting it is")
    raw: dict[str, Any] = {"layers": layers, "init": init, "noise": noise, "seed": seed}
    raw["ffn"] = None if ffn is None else _settings(ffn_set or []) | {"kind": ffn}
    raw["mod"] = None if mod is None else _settings(mod.split(","))
    refuse_misfit("interop/plan", "ConvertConfig", raw, ("interop/copies",))
    refuse_texts(text or (), text_as or ())

    from sparsemix.config import parse
    from sparsemix.interop.conversion import convert_folder
    from sparsemix.interop.plan import ConvertConfig
    from sparsemix.interop.receipt import lines, warning
    from sparsemix.sweep.watch import Stages

    settings = parse(ConvertConfig, raw)
    with interruptible("nothing is half-written; the same command starts anew"), Stages("convert", say) as stages:
        said = convert_folder(model, to, settings, text or ["stdlib"], tokens, stages, text_as or ())
    print("\n".join(lines(said)))
    if (warns := warning(said)) is not None:
        say(f"warning: {warns}")
    print(f"model: {to}")


def _settings(pairs: list[str]) -> dict[str, Any]:
    from sparsemix.config import apply_overrides

    return apply_overrides({}, pairs)
