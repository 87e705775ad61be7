"""sparsemix: conditional-computation transformers, compared at equal FLOPs.

`build_layer`, `build_model`, `build_optimizer`, `layer_cost`, `load_model`, `pack_ternary`, `tune_cpu_allocator` and
`update` are the entry points; torch is imported only when one of them is first used, so the command line answers at
once.

Hugging Face's Auto classes know sparsemix models from now on, whichever of the two is imported first."""

from sparsemix import auto_classes

# As typing's, which takes 10 ms to import: what Python does before a command can answer Ctrl-C is kept short.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sparsemix.api import (
        build_layer,
        build_model,
        build_optimizer,
        layer_cost,
        load_model,
        pack_ternary,
        tune_cpu_allocator,
        update,
    )

__version__ = "0.1.0"
__all__ = [
    "build_layer",
    "build_model",
    "build_optimizer",
    "layer_cost",
    "load_model",
    "pack_ternary",
    "tune_cpu_allocator",
    "update",
]


def __getattr__(name: str) -> "Any":
    if name not in __all__:
        raise AttributeError(f"module 'sparsemix' has no attribute {name!r}")
    from sparsemix import api

    return getattr(api, name)


auto_classes.register_when_imported()
