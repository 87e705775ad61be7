"""The files that a saved model brings along for trust_remote_code=True: they find the package, or say it is needed."""

from sparsemix import __version__

AUTO_MAP = {
    "AutoConfig": "configuration_sparsemix.SparsemixConfig",
    "AutoModel": "modeling_sparsemix.SparsemixModel",
    "AutoModelForCausalLM": "modeling_sparsemix.SparsemixForCausalLM",
}

CONFIGURATION = f'''"""Settings of a sparsemix model. The code is in the package; this file finds it."""

try:
    from sparsemix.interop.hf import SparsemixConfig as Packaged
except ImportError as error:
    needed = "this model needs the Python package sparsemix, version {__version__} or later: pip install sparsemix"
    raise ImportError(f"{{needed}} ({{error}})") from None


class SparsemixConfig(Packaged):
    pass
'''

# A subclass, not the class itself: transformers copies the file of the class that it found here when it saves again.
MODELING = '''"""A sparsemix model. The code is in the package; this file finds it."""

from .configuration_sparsemix import SparsemixConfig

from sparsemix.interop.hf import SparsemixForCausalLM as Packaged
from sparsemix.interop.hf import SparsemixModel as Headless


class SparsemixForCausalLM(Packaged):
    config_class = SparsemixConfig


class SparsemixModel(Headless):
    config_class = SparsemixConfig
'''

FILES = {"configuration_sparsemix.py": CONFIGURATION, "modeling_sparsemix.py": MODELING}
