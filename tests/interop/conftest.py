"""Nothing here asks a hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
