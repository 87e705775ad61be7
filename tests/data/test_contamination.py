import numpy as np

from sparsemix.data import contamination as module
from sparsemix.data.contamination import WINDOW, TokenFile, contamination, warning


def windows(ids, eot=0):
    """Every window of one document, one by one."""
    every = (tuple(ids[i : i + WINDOW].tolist()) for i in range(len(ids) - WINDOW + 1))
    return [w for w in every if eot not in w]


def stream(documents):
    return np.concatenate([np.append(0, d) for d in documents] + [[0]]).astype(np.uint16)


def made(seed, length):
    return np.random.default_rng(seed).integers(1, 200, length)


def test_the_share_is_that_of_counting_windows_one_by_one(monkeypatch, tmp_path):
    book = made(0, 900)
    tokens = {
        "train": stream([made(1, 500), book, made(2, 13)]),
        "validation": stream([made(3, 300)]),
        "test": stream([made(4, 250), book[100:333], made(5, 19), made(6, 20), book[:40], book[:40]]),
    }
    known = set(windows(tokens["train"]))
    want = {s: np.mean([w in known for w in windows(tokens[s])]) for s in ("validation", "test")}
    assert 0.3 < want["test"] < 0.9 and want["validation"] == 0
    # Blocks of any size give the same, and splits of no window have none in train.
    for block in (1 << 18, 64, 37):
        monkeypatch.setattr(module, "_BLOCK", block)
        found = contamination(tokens, 0)
        assert {s: found[s] for s in want} == want
        assert found["windows"]["test"] == len(windows(tokens["test"]))
    for split, ids in tokens.items():
        ids.tofile(tmp_path / split)
    assert contamination({split: TokenFile(tmp_path / split, np.uint16) for split in tokens}, 0) == found
    assert contamination({**tokens, "test": stream([made(1, 5)])}, 0)["test"] == 0.0


def test_a_large_split_is_measured_on_a_sample(monkeypatch):
    book, other = made(0, 30_000), made(1, 30_000)
    tokens = {"train": stream([book]), "validation": stream([other]), "test": stream([book[:9000], other[:9000]])}
    monkeypatch.setattr(module, "_SAMPLE", 2000)
    found = contamination(tokens, 0)
    assert 1000 <= found["windows"]["test"] <= 2000 and abs(found["test"] - 0.5) < 0.05
    assert found["validation"] == 0


def test_a_warning_names_each_split_above_a_tenth():
    measured = {"test": 0.61, "validation": 0.1, "window": WINDOW}
    [line] = warning(measured)
    assert line.startswith("61% of the test split's windows of 20 tokens stand word for word in the training text")
    assert len(list(warning({**measured, "validation": 0.11}))) == 2
