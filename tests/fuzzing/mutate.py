"""Inputs gone wrong: values that no setting wants, files cut and changed, texts and names of every kind."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

BOMB = "{a: &a [x,x,x,x,x,x,x,x,x], b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], " + (
    "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b], d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c], e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d], "
    "f: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e], g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f], h: [*g,*g,*g,*g,*g,*g,*g,*g,*g]}"
)
MERGES = "{a: &a {x: 1}, b: &b {<<: [*a,*a,*a,*a,*a,*a,*a,*a,*a]}, " + (
    "c: &c {<<: [*b,*b,*b,*b,*b,*b,*b,*b,*b]}, d: &d {<<: [*c,*c,*c,*c,*c,*c,*c,*c,*c]}, "
    "e: &e {<<: [*d,*d,*d,*d,*d,*d,*d,*d,*d]}, f: &f {<<: [*e,*e,*e,*e,*e,*e,*e,*e,*e]}, "
    "g: &g {<<: [*f,*f,*f,*f,*f,*f,*f,*f,*f]}, h: {<<: [*g,*g,*g,*g,*g,*g,*g,*g,*g]}}"
)
# YAML texts: what is read from them is no plain value, no finite one, or none at all.
WORDS = [
    *("2020-01-01", "2020-13-45", "2001-12-14t21:59:43.10-05:00", "0b_", "0x", "0o9", "1_000", "12:30", "!!int abc"),
    *(
        "!!float x",
        "!!bool maybe",
        "!!timestamp x",
        "!!binary 1",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!python/name:os.x",
    ),
    *("!x y", "&a [*a]", "&a {x: *a}", "*b", "9" * 5000, "-" + "9" * 400, "1e400", ".nan", ".inf", "-.inf", "nan"),
    *("inf", "~", "", "yes", "[]", "{}", "[1]", "{1: 2}", "{[1]: 2}", "{? {a: 1} : b}", "{a: 1, a: 2}", "'", '"', "|"),
    *("@", "%", "[" * 3000, "{a: " * 3000, "[" * 90 + "]" * 90, BOMB, MERGES, "\x00", "\x07", "é", "²", "٣", "[/x]"),
    *("-1", "0", "1", "3", "1.5", "1000000000", "10000000000000000000000", "auto", "dense", "a b", "\udce9", "𝕏" * 20),
    *("{kind: moe}", "{kind: 3}", "{count: 1000000000, each: {}}", "{count: 2, each: 3}", "- a\n- b", "--- 1\n--- 2"),
]
# The same as what JSON or Python hold.
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        1.5,
        10**9,
        10**30,
        -(10**400),
        float("nan"),
        float("inf"),
        "",
        "x",
        "2020-01-01",
    ),
    *("[/x]", "é", "\udce9", [], {}, [1], [[]], {"kind": "moe"}, {"kind": 3}, {"a": {"b": [None]}}, ["x"] * 50, "../x"),
]
LETTERS = [
    "",
    " ",
    "\n",
    "\x00",
    "\r\n",
    "\ufeff",
    "word ",
    "é",
    "日本語",
    "𝕏",
    "<|endoftext|>",
    "[/x]",
    "\u202e",
    "a" * 999,
]


def value(rng: random.Random) -> Any:
    return rng.choice(VALUES)


def word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def text(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(30)))


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in plain data."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in inner for place in _places(child, (*path, key)))]


def data(rng: random.Random, whole: Any) -> Any:
    """Plain data with one thing in it removed, renamed or another."""
    whole = json.loads(json.dumps(whole))
    *path, last = rng.choice(_places(whole)[1:] or [(None,)])
    if last is None:
        return value(rng)
    node = whole
    for key in path:
        node = node[key]
    how = rng.randrange(10)
    if how == 0:
        return value(rng)
    if how < 3:
        del node[last]
    elif how < 4 and isinstance(node, dict):
        node[rng.choice(["kind", "x", "", "[/x]", f"{last}s"])] = node.pop(last)
    else:
        node[last] = value(rng)
    return whole


def raw(rng: random.Random, held: bytes) -> bytes:
    """Bytes cut, flipped, filled, or others."""
    at = rng.randrange(len(held)) if held else 0
    filling = rng.choice(
        [b"", b"\x00", b"\xff\xfe", b"{", b"[" * 5000, b"\n", bytes(rng.randrange(256) for _ in range(40))]
    )
    made = [
        lambda: b"",
        lambda: held[:at],
        lambda: held[:at] + filling + held[at:],
        lambda: held[:at] + filling + held[at + len(filling) :],
        lambda: held[:at] + bytes([held[at] ^ (1 << rng.randrange(8))]) + held[at + 1 :] if held else b"x",
        lambda: b"\x00" * len(held),
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
    ]
    return rng.choice(made)()


def file(rng: random.Random, path: Path) -> str:
    """Change a file in place: gone, a folder, other bytes, or one other value; in words."""
    how = rng.randrange(12)
    if how == 0:
        path.unlink()
        return f"no {path.name}"
    if how == 1:
        path.unlink()
        path.mkdir()
        return f"{path.name} is a folder"
    held = path.read_bytes()
    if how < 5 or path.suffix not in (".json", ".yaml", ".jsonl"):
        path.write_bytes(raw(rng, held))
        return f"bytes of {path.name}"
    if path.suffix == ".jsonl":
        lines = held.decode().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(data(rng, json.loads(lines[at])))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(data(rng, json.loads(held))))
    elif rng.random() < 0.5:
        lines = held.decode().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = lines[at].partition(":")[0] + ": " + word(rng)
        path.write_text("\n".join(lines), errors="surrogateescape")
    else:
        path.write_text(yaml.safe_dump(data(rng, yaml.safe_load(held))))
    return f"a value of {path.name}"
