"""Made-up documents for the tests of the data pipeline."""

import hashlib
import itertools
import json
import random

from sparsemix.data import DataConfig

SPLITS = ("train", "validation", "test")


def make_texts(n=60, seed=0):
    rng = random.Random(seed)
    vocabulary = [f"{rng.choice('bcdfgh')}{rng.choice('aeiou')}{rng.choice('klmnä€')}{i}" for i in range(400)]
    return [" ".join(rng.choices(vocabulary, k=rng.randrange(1, 120))) + "\n" for _ in range(n)]


def write_corpus(path, texts):
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    return str(path)


def config_of(path, **changes):
    return DataConfig(text=(path,), vocab_size=300, validation_fraction=0.2, test_fraction=0.2, **changes)


def documents_of(s, split):
    tokens, starts = s.tokens(split), s.starts(split)
    decode = s.tokenizer().decode
    return [decode(tokens[a + 1 : b].tolist(), skip_special_tokens=False) for a, b in itertools.pairwise(starts)]


def side_by_hash(text, validation_fraction=0.2, test_fraction=0.2):
    """The split of a document by the hash of its text alone."""
    u = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
    return "test" if u < test_fraction else "validation" if u < test_fraction + validation_fraction else "train"
