"""Use of experts over enough tokens to tell, measured anew where a run's own test was too short."""

import json

import pytest

from sparsemix.config import config_hash
from sparsemix.report.records import read_run
from sparsemix.reproduce import peer_usage
from sparsemix.train import train
from tiny import prepared, run_config, unchecked_shapes

# 10 * 64 experts / (2 heads * 4).
NEEDED = 80


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run tested on few and on enough tokens, with its prepared text."""
    folder = tmp_path_factory.mktemp("usage")
    data, shards = prepared(folder)
    found = []
    with unchecked_shapes():
        for tokens in (20, 150):
            config = run_config(data, "peer", test_tokens=tokens)
            path = folder / "runs" / config_hash(config)
            train(config, path, shards)
            found.append(read_run(path, "PEER"))
    return *found, folder / "shards", len(shards.tokens("test")) + len(shards.tokens("validation"))


def test_a_long_enough_test_of_the_run_is_taken(runs, monkeypatch):
    _, long, data, _ = runs
    monkeypatch.setattr(peer_usage, "_measure", lambda *_: pytest.fail("measured anew"))
    found = peer_usage.usage(long, data, lambda _: None)
    own = long.result["routing"]["experts"]["blocks.1.ffn"]
    assert own["tokens"] >= NEEDED == found.needed and found.enough
    assert found[:3] == (own["usage"], own["unevenness"], own["tokens"])


def test_a_short_one_is_made_longer_once(runs, monkeypatch):
    short, long, data, _ = runs
    said = []
    with unchecked_shapes():
        found = peer_usage.usage(short, data, said.append)
    assert short.result["routing"]["experts"]["blocks.1.ffn"]["tokens"] < NEEDED == found.tokens
    assert found.enough and len(said) == 1
    # Both runs have the same weights, so more tokens use at least as many experts.
    of_fewer = short.result["routing"]["experts"]["blocks.1.ffn"]["usage"]
    of_more = long.result["routing"]["experts"]["blocks.1.ffn"]["usage"]
    assert of_fewer <= found.usage <= of_more
    assert json.loads((short.folder / "usage.json").read_text())["tokens"] == NEEDED
    monkeypatch.setattr(peer_usage, "_measure", lambda *_: pytest.fail("measured again"))
    assert peer_usage.usage(short, data, said.append) == found and len(said) == 1


def test_a_text_that_is_too_short_gives_a_lower_bound(runs, monkeypatch):
    short, _, data, tokens = runs
    monkeypatch.setattr(peer_usage, "VISITS", 10**6)
    with unchecked_shapes():
        found = peer_usage.usage(short, data, lambda _: None)
    # The last token of a split predicts nothing.
    assert tokens - 2 <= found.tokens <= tokens and not found.enough
