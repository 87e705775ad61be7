"""Which commit of sparsemix runs: of the checkout that the package lies in, or of what pip installed."""

import json
import os
import subprocess
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
GIT_WAITS_S = 20.0


@cache
def commit() -> str | None:
    """The commit's hash, with ` (changed)` where files of the package differ from it; `unknown (why)` where git cannot
    tell; None where nothing is recorded, as in a wheel from a package index: its version is all there is.

    It is asked for once a process, at the start: later the checkout may hold other code than what runs."""
    top = checkout(PACKAGE)
    return installed(PACKAGE) if top is None else at_head(top)


def checkout(package: Path) -> Path | None:
    """The root of sparsemix's own checkout, if the package lies in one. A package in somebody's environment may lie in
    a checkout too: of another project, whose commit says nothing of this code."""
    top = package.parent.parent
    if package != top / "src" / package.name or not (top / ".git").exists():
        return None
    try:
        project = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, tomllib.TOMLDecodeError):
        return None
    return top if project.get("name") == package.name else None


def at_head(top: Path) -> str:
    """The commit of a checkout, and whether what lies in `src` and says how to build it was changed."""
    try:
        head = _git(top, "rev-parse", "--verify", "HEAD").strip()
        changed = _git(top, "status", "--porcelain", "--", "src", "pyproject.toml").strip()
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"unknown ({lines[0] if lines else 'git failed'})"
    return f"{head} (changed)" if changed else head


def _git(top: Path, *words: str) -> str:
    # A hook's variables name its own repository. Whoever owns the checkout owns the code that runs here already.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    given = ("-c", f"safe.directory={top}", "-c", "core.fsmonitor=false", "--no-optional-locks")
    command = ["git", "-C", str(top), *given, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=GIT_WAITS_S).stdout


def installed(package: Path) -> str | None:
    """The commit that pip recorded of an installation from a repository; None of any other, and of one that is not
    what was imported."""
    for found in metadata.distributions(name=package.name):
        if Path(str(found.locate_file(package.name))).resolve() == package:
            try:
                recorded = json.loads(found.read_text("direct_url.json") or "{}")
            except json.JSONDecodeError:
                return None
            return recorded.get("vcs_info", {}).get("commit_id")
    return None
