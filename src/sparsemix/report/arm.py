"""What a run is called in tables, from its settings alone."""

import json
from typing import Any


def arm_of(settings: dict[str, Any]) -> str:
    """A name from a run's settings: `dense`, a feed-forward's kind, `mod`, `mod+KIND`, each perhaps `@precision`."""
    found: dict[str, None] = {}

    def look(node: Any) -> None:
        if isinstance(node, list):
            for part in node:
                look(part)
        elif isinstance(node, dict):
            if "kind" in node:
                found[node["kind"]] = None
            for name, value in node.items():
                # What mh_moe or beside hold is part of them, what MoD wraps is a layer of its own.
                if node.get("kind") != "mh_moe" or name != "inner":
                    look(value)

    model = settings["model"]
    look(model["blocks"])
    plain = {"attention", "block", "dense", "beside", "rms", "layer", "float", "ternary"}
    kinds = [kind for kind in found if kind not in plain and kind != "mod"]
    name = "+".join([*(["mod"] if "mod" in found else []), *kinds]) or "dense"
    return f"{name}@ternary" if "ternary" in json.dumps(model["blocks"]) else name
