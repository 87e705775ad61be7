"""Small corpora in the layout of a data folder, and a tokenizer trained on them."""

import gzip
import json
import random

from sparsemix.data.tokenizer import train_tokenizer
from tiny import sentence


def texts(count, seed, sentences=6):
    rng = random.Random(seed)
    return ["".join(sentence(rng) for _ in range(rng.randrange(1, sentences))).strip() for _ in range(count)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def write_papers(folder):
    """Every corpus of the papers' suite, the Curation Corpus with the fields of its own release."""
    write_rows(folder / "c4/validation.jsonl.gz", [{"text": t} for t in texts(9, 1)])
    write_rows(folder / "wikitext/test.jsonl.gz", [{"text": f" = {t} = \n \n {t} \n"} for t in texts(5, 2)])
    write_rows(folder / "wikitext/validation.jsonl.gz", [{"text": "not this split"}])
    passages = [t.removesuffix(".").rpartition(" ") for t in texts(12, 3)]
    rows = [{"text": f"{c} {w}", "context": c, "target": w} for c, _, w in passages]
    write_rows(folder / "lambada/test.jsonl.gz", rows)
    for i, source in enumerate(("github", "uspto", "cc")):
        rows = [{"source": f"pile/test/{source}", "text": t} for t in texts(4 + i, 4 + i)]
        write_rows(folder / f"pile/{source}.jsonl.gz", rows)
    articles = [{"title": "a", "summary": "short", "url": "x", "article_content": t} for t in texts(7, 8)]
    write_rows(folder / "curation-corpus/articles.jsonl", [*articles, {"article_content": "  \n"}])
    write_rows(folder / "redpajama/arxiv.jsonl.gz", [{"source": "redpajama/arxiv", "text": t} for t in texts(6, 9)])


def small_tokenizer(vocab_size=300):
    return train_tokenizer(texts(60, 10), vocab_size)
