"""The prepared corpus that the tests of the data pipeline share."""

import pytest
from texts import config_of, make_texts, write_corpus

from sparsemix.data import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(seed=4)
    config = config_of(write_corpus(folder / "a.jsonl", texts))
    return texts, config, prepare(config, folder / "shards")
