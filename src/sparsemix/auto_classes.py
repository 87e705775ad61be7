"""Registers sparsemix models with Hugging Face's Auto classes as these are imported."""

import sys

# Whatever is imported here delays the first line of a command that can answer Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import importlib.abc
    import importlib.machinery
    import types
    from collections.abc import Sequence

# What registers our class with the Auto class that a module of transformers defines. Files side by side: the first is
# imported while transformers is in the middle of the second, so no package may import both.
_REGISTERING = {
    "transformers.models.auto.configuration_auto": "sparsemix.interop.hf_config",
    "transformers.models.auto.modeling_auto": "sparsemix.interop.hf_headless",
    "transformers.models.auto.tokenization_auto": "sparsemix.interop.hf_tokenizer",
}


def _register(module: str) -> None:
    import importlib
    import warnings

    try:
        importlib.import_module(_REGISTERING[module])
    except ImportError as error:
        # The importer asked for transformers, not for us.
        warnings.warn(f"sparsemix models are not registered with transformers (5.13 or later): {error}", stacklevel=2)


class _AutoClasses:
    """Registers when an Auto class is imported. Registering needs torch and transformers, seconds of imports, which
    `import sparsemix` must not cost those who want neither; and sorted imports put sparsemix before transformers."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None", target: "types.ModuleType | None" = None
    ) -> "importlib.machinery.ModuleSpec | None":
        if fullname not in _REGISTERING:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)  # pyright: ignore[reportAttributeAccessIssue]
        return spec


class _ThenRegister:
    def __init__(self, loader: "importlib.abc.Loader") -> None:
        self.loader = loader

    def create_module(self, spec: "importlib.machinery.ModuleSpec") -> "types.ModuleType | None":
        return self.loader.create_module(spec)

    def exec_module(self, module: "types.ModuleType") -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module.__name__)


def register_when_imported() -> None:
    """From now on whoever imports an Auto class finds our models known to it; classes that are there already are told
    at once."""
    sys.meta_path.insert(0, _AutoClasses())
    for module in _REGISTERING.keys() & sys.modules.keys():
        _register(module)
