"""Which commit made a result: sparsemix's own, never that of the repository that somebody works in."""

import json
import subprocess
import sys

import pytest

from sparsemix import __version__, commit
from sparsemix.provenance import joined, versions

OURS = '[project]\nname = "sparsemix"\n'


def git(folder, *words):
    person = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    return subprocess.run(["git", "-C", folder, *person, *words], capture_output=True, text=True, check=True).stdout


def repository(top, files):
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text, encoding="utf-8")
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-q", "-m", "all")
    return git(top, "rev-parse", "HEAD").strip()


@pytest.fixture
def ours(tmp_path):
    """(root, package, commit) of a checkout of sparsemix."""
    top = tmp_path / "ours"
    files = {"pyproject.toml": OURS, "src/sparsemix/__init__.py": "", "README.md": "", ".gitignore": "*.pyc\n"}
    return top, top / "src" / "sparsemix", repository(top, files)


def test_a_checkout_tells_its_commit_and_whether_what_runs_was_changed(ours):
    top, package, head = ours
    assert commit.checkout(package) == top and commit.at_head(top) == head
    (top / "README.md").write_text("other words", encoding="utf-8")
    (package / "kept.pyc").touch()
    assert commit.at_head(top) == head
    (package / "new.py").touch()
    assert commit.at_head(top) == f"{head} (changed)"
    (package / "new.py").unlink()
    (package / "__init__.py").write_text("x = 1", encoding="utf-8")
    assert commit.at_head(top) == f"{head} (changed)"


def test_the_repository_around_an_environment_is_not_taken_for_ours(tmp_path, monkeypatch):
    site = tmp_path / "theirs" / ".venv" / "lib" / "site-packages"
    files = {"src/theirs/__init__.py": "", "pyproject.toml": '[project]\nname = "them"'}
    repository(tmp_path / "theirs", files)
    package = site / "sparsemix"
    package.mkdir(parents=True)
    # Even if their project has our layout, or a copy of our package in its own.
    for folder in (package, tmp_path / "theirs" / "src" / "sparsemix"):
        folder.mkdir(exist_ok=True)
        assert commit.checkout(folder) is None
    monkeypatch.setattr(commit, "PACKAGE", package)
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    assert commit.commit.__wrapped__() is None


def test_variables_of_a_git_hook_name_another_repository_and_change_nothing(ours, tmp_path, monkeypatch):
    top, _, head = ours
    other = repository(tmp_path / "other", {"a": "b"})
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert commit.at_head(top) == head != other


def test_a_commit_that_git_cannot_tell_is_unknown_and_says_why(ours, monkeypatch):
    top, _, _ = ours
    (top / ".git" / "HEAD").write_text("ref: refs/heads/none\n", encoding="utf-8")
    assert commit.at_head(top).startswith("unknown (fatal: ")
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit.at_head(top).startswith("unknown (") and "git" in commit.at_head(top)


@pytest.mark.parametrize(
    ("recorded", "said"), [({"vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}, "c0ffee"), ({}, None)]
)
def test_an_installation_tells_the_commit_that_pip_recorded(tmp_path, monkeypatch, recorded, said):
    about = tmp_path / "site" / "sparsemix-9.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsemix\nVersion: 9.9\n", encoding="utf-8")
    if recorded:
        (about / "direct_url.json").write_text(json.dumps({"url": "https://x", **recorded}), encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert commit.installed(tmp_path / "site" / "sparsemix") == said
    # What is imported is another copy than what pip knows of.
    assert commit.installed(tmp_path / "elsewhere" / "sparsemix") is None


def test_versions_are_of_what_is_imported():
    assert versions()["sparsemix"] == __version__
    assert ("commit" in versions()) == (commit.commit() is not None)


def test_versions_of_several_runs_are_all_told():
    assert joined({"torch": "1", "a": "x"}, {"torch": "2"}, {"torch": "1; 3"}) == {"torch": "1; 2; 3", "a": "x"}
