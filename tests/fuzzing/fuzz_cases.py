"""What is asked of the command line: a folder of whole things, made once, and cases that spoil a copy of one."""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import mutate
import yaml

from sparsemix.config import config_hash
from sparsemix.data import prepare
from sparsemix.durable import SEAL, delete
from sparsemix.recipes import FOLDER
from sparsemix.train import train
from tiny import run_config, write_corpus

Call = tuple[list[str], str]
PATHS = [
    *("model.d_model", "model.seq_len", "model.vocab_size", "model.blocks", "model.blocks.count", "model.blocks.each"),
    *("model.blocks.1.ffn", "model.blocks.²", "model.blocks.each.ffn.d_ff", "model.blocks.each.mixer.num_heads"),
    *("model.norm", "model.precision", "model", "model.", ".model", "data", "data.text", "data.vocab_size", "train"),
    *("train.lr", "train.budget_flops", "train.batch_tokens", "train.evals", "train.dtype", "train.threads", "seed"),
    *("init", "init.folder", "x", "", "model.blocks.ffn", "model.blocks.wrap", "data.tokenizer"),
    *("data.test_fraction", "train.test_tokens", "train.warmup", "kind", "base", "sizes"),
]  # fmt: skip


def build(place: Path) -> None:
    """A text, a finished run beside its data, its model, a study and a comparison of such runs."""
    (place / "runs").mkdir(parents=True)
    data = write_corpus(place)
    shards = prepare(data, place / "runs" / "data")
    config = run_config(data.replace(fingerprint=shards.manifest["fingerprint"]), "moe", steps=3)
    for seed in range(2):
        train(config.replace(seed=seed), place / "runs" / f"moe-{seed}", shards)
    dense = run_config(config.data, "dense", steps=3)
    train(dense, place / "runs" / "dense-0", shards)
    study = place / "study"
    cells = []
    for arm, seed, run in (("dense", 0, dense), ("moe", 0, config), ("moe", 1, config.replace(seed=1))):
        name = config_hash(run.replace(seed=seed))
        shutil.copytree(place / "runs" / f"{arm}-{seed}", study / "runs" / name)
        about = {"budget": run.train.budget_flops, "width": run.model.d_model, "seed": seed, "lr": run.train.lr}
        cells.append({"run": name, "arm": arm, "role": "grid", **about})
    (study / "plan.yaml").write_text(yaml.safe_dump({"cells": cells}))


def call(place: Path, copy: Path, rng: random.Random) -> Call:
    """(words of a command, what is wrong with it); `copy` is an empty folder for what it spoils."""
    kinds: list[Callable[[Path, Path, random.Random], Call]] = [
        settings,
        recipe,
        options,
        texts,
        runs,
        runs,
        models,
        prompts,
    ]
    return rng.choice(kinds)(place, copy, rng)


def settings(place: Path, copy: Path, rng: random.Random) -> Call:
    pairs = [f"{rng.choice(PATHS)}={mutate.word(rng)}" for _ in range(rng.randrange(1, 3))]
    name = rng.choice(["tiny", "tiny-mod", "tiny-peer", "peer:30k"])
    where = ["--out", str(copy / "out"), "--text", str(copy / "none.txt")]
    if rng.random() < 0.3:
        return ["compare", "--recipe", name, *(word for pair in pairs for word in ("--set", pair)), *where], "settings"
    return ["train", name, *pairs, *where], "settings"


def recipe(place: Path, copy: Path, rng: random.Random) -> Call:
    source = rng.choice(sorted(FOLDER.glob("*.yaml")))
    path = copy / "recipe.yaml"
    path.write_bytes(source.read_bytes())
    said = mutate.file(rng, path)
    if rng.random() < 0.2 and path.is_file():
        extra = [
            "base: recipe.yaml",
            "base: 3",
            "base: [x]",
            "sizes: [1]",
            "sizes: 3",
            "sizes: {a: 1}",
            "model: 3",
            "train: x",
        ]
        path.write_bytes(path.read_bytes() + f"\n{rng.choice(extra)}\n".encode())
    name = str(path) if rng.random() < 0.8 else f"{path}:30k"
    where = ["--out", str(copy / "out"), "--text", str(copy / "none.txt")]
    return (["train", name, *where] if rng.random() < 0.6 else ["compare", "--recipe", name, *where]), said


def options(place: Path, copy: Path, rng: random.Random) -> Call:
    out, text, odd = (
        ["--out", str(copy / "out")],
        ["--text", str(copy / "none.txt")],
        mutate.word(rng).replace("\x00", ""),
    )
    model, numbers = (
        str(place / "runs" / "moe-0" / "model"),
        rng.choice(["nan", "inf", "-1", "0", "1e400", "x", "", odd]),
    )
    asked = [
        ["compare", *out, *text, "--kinds", rng.choice([odd, f"dense,{odd}", f"dense@{odd}", "dense,mod+mod"])],
        ["compare", *out, *text, "--budget", rng.choice([numbers, f"auto:{numbers}", "auto:3m", "auto:9999999999h"])],
        ["compare", *out, *text, "--lr", numbers],
        ["compare", *out, *text, "--seeds", numbers],
        ["compare", *out, *text, "--launcher", odd],
        ["compare", *out, *text, "--launch", odd],
        ["isoflop", *out, *text, "--budgets", rng.choice([numbers, f"1e12,{odd}"])],
        ["isoflop", *out, *text, "--budgets", "1e12", "--sizes", rng.choice([odd, "1", "²", "48,48", "9" * 5000])],
        ["reproduce", odd, *out, *text],
        ["reproduce", "peer-table2", *out, *text, "--scale", odd],
        ["reproduce", "peer-table2", *out, *text, "--budget", numbers],
        ["generate", model, "--prompt", "the", "--max-tokens", "2", "--temperature", numbers],
        ["generate", model, "--prompt", "the", "--max-tokens", "2", "--top-k", numbers],
        ["generate", model, "--prompt", "the", "--max-tokens", "2", "--seed", rng.choice([numbers, "9" * 30])],
        ["generate", model, "--prompt", "the", "--max-tokens", "2", "--html", rng.choice([odd, str(copy), "/proc/x"])],
        ["convert", model, "--to", str(copy / "c"), "--ffn", odd],
        ["convert", model, "--to", str(copy / "c"), "--ffn", "moe", "--ffn-set", f"num_experts={odd}"],
        ["convert", model, "--to", str(copy / "c"), "--mod", odd],
        ["convert", model, "--to", str(copy / "c"), "--ffn", "moe", "--layers", odd],
        ["convert", model, "--to", str(copy / "c"), "--ffn", "moe", "--noise", numbers],
        ["export", model, "--to", str(copy / "e"), "--layout", odd],
        ["eval", model, "--out", str(copy / "e.json"), "--suite", odd],
        ["eval", model, "--out", str(copy / "e.json"), "--only", odd],
        ["inspect", str(place / "runs" / "moe-0"), *out, "--tokens", numbers],
        ["report", str(place / "study"), *out, "--baseline", odd],
        ["train", "--init-from", rng.choice([odd, "~nobody-here/x", model]), odd, *out, *text],
        ["train", "tiny", *out, *text, "--track", odd],
        ["parity", rng.choice(["--heads", "--d-model", "--d-ff", "--top-k"]), rng.choice([numbers, "9" * 30])],
        ["kinds", odd],
        ["kinds", "--d-model", numbers],
        [odd],
        [rng.choice(["train", "status", "report", "eval", "inspect"]), odd],
    ]  # fmt: skip
    words = rng.choice(asked)
    return [word for word in words if word != "\x00"], "options"


def texts(place: Path, copy: Path, rng: random.Random) -> Call:
    name = rng.choice(
        ["a.txt", "a.md", "a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "a.html", "a", "a.zst", "é.txt"]
    )
    path = copy / name
    whole = mutate.text(rng) * rng.randrange(1, 200)
    held = whole.encode("utf-8", "surrogateescape")
    if ".json" in name:
        rows = [json.dumps(mutate.data(rng, {"text": mutate.text(rng), "id": i})) for i in range(rng.randrange(60))]
        held = "\n".join(rows).encode()
    if rng.random() < 0.5:
        held = mutate.raw(rng, held)
    path.write_bytes(gzip.compress(held) if name.endswith(".gz") else held)
    shown = path if rng.random() < 0.6 else copy
    out = ["--out", str(copy.with_name(f"{copy.name}-out") / "run")]
    # Prepared whole, and then too short for a window: nothing trains.
    return [
        "train",
        "tiny",
        "model.seq_len=9000000",
        "train.budget_flops=1e30",
        *out,
        "--text",
        str(shown),
    ], f"text {name}"


def runs(place: Path, copy: Path, rng: random.Random) -> Call:
    source = place / rng.choice(["runs", "study"])
    held = copy / source.name
    shutil.copytree(source, held, ignore=shutil.ignore_patterns("checkpoints"))
    files = [path for path in held.rglob("*") if path.is_file() and path.name[0] != "." and path.parent.name != "data"]
    spoiled = rng.choice(
        [path for path in files if path.suffix in (".json", ".yaml", ".jsonl", ".npz", ".safetensors")]
    )
    said = mutate.file(rng, spoiled)
    of = spoiled.parent if spoiled.parent.name != "model" else spoiled.parent.parent
    run = str(of) if of != held else str(next(held.rglob("config.yaml"), held).parent)
    unsealed(held, rng)
    commands = [
        ["status", str(held)],
        ["report", str(held), "--out", str(copy / "page")],
        ["status", run],
        ["report", run, "--out", str(copy / "page")],
        ["inspect", run, "--out", str(copy / "inspect"), "--tokens", "100"],
        ["generate", run, "--prompt", "the cat", "--max-tokens", "2"],
        [
            "train",
            "--init-from",
            run,
            "--out",
            str(copy / "out"),
            "--text",
            str(copy / "none.txt"),
            "train.budget_flops=1e9",
        ],
    ]
    return commands[min(rng.randrange(10), rng.randrange(len(commands)))], f"{said} in {spoiled.parent.name}"


def unsealed(folder: Path, rng: random.Random) -> None:
    """Often as earlier versions and other tools left it: what checksums do not tell must be seen in the values."""
    if rng.random() < 0.7:
        for path in list(folder.rglob(SEAL)):
            delete(path)


def models(place: Path, copy: Path, rng: random.Random) -> Call:
    held = copy / "model"
    shutil.copytree(place / "runs" / "moe-0" / "model", held)
    if rng.random() < 0.2:
        index = {"metadata": {}, "weight_map": {"embed.weight": "model.safetensors"}}
        (held / "model.safetensors.index.json").write_text(json.dumps(index))
    spoiled = rng.choice(sorted(path for path in held.iterdir() if path.is_file()))
    said = mutate.file(rng, spoiled)
    unsealed(held, rng)
    commands = [
        ["generate", str(held), "--prompt", "the cat", "--max-tokens", "2"],
        ["export", str(held), "--to", str(copy / "exported")],
        ["convert", str(held), "--to", str(copy / "converted"), "--ffn", "moe", "--text", str(place / "corpus.jsonl")],
        ["eval", str(held), "--suite", str(copy / "none.yaml")],
        ["train", "--init-from", str(held), "--out", str(copy / "out"), "--text", str(copy / "none.txt")],
    ]
    return commands[min(rng.randrange(8), rng.randrange(len(commands)))], said


def prompts(place: Path, copy: Path, rng: random.Random) -> Call:
    model = str(place / "runs" / "moe-0")
    asked = mutate.text(rng) + rng.choice(["", "\udce9", "\ud800"])
    if rng.random() < 0.5:
        return ["generate", model, "--max-tokens", "2", "--prompt", asked.replace("\x00", "")], "prompt"
    path = copy / rng.choice(["prompt.txt", "[x].txt", "\udce9.txt"])
    path.write_bytes(mutate.raw(rng, asked.encode("utf-8", "replace")))
    return ["generate", model, "--max-tokens", "2", "--prompt-file", str(path)], "prompt"
