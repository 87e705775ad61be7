"""Perplexity of trained runs on the corpora of PEER's Table 1, from local files, kept in the runs' folders."""

from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any, NamedTuple

from sparsemix.durable import write_atomic
from sparsemix.inputs import checked_json, read_mapping
from sparsemix.report.records import Record

# Tokens of each source of a corpus; None: the corpora's own number of documents.
MAX_TOKENS = {"demo": 20_000, "laptop": 50_000, "gpu": None, "paper": None}


class Measured(NamedTuple):
    """What one run reads on one corpus: perplexity per token, bits per byte, and perplexity under the routing of
    training where it was asked for (it may see later tokens)."""

    perplexity: float
    bpb: float
    lookahead: float | None


class Corpora:
    """The corpora that are at hand below a folder; `missing` says why another is not."""

    def __init__(self, names: list[str], folder: Path | None, max_tokens: int | None) -> None:
        """Raises ConfigError where a file cannot be read."""
        from sparsemix.config import ConfigError
        from sparsemix.evaluate.corpora import find, read_suite
        from sparsemix.evaluate.suite import SuiteOptions

        self.folder = folder
        self.options = SuiteOptions(max_tokens=max_tokens)
        # A table that waits for a download of each of its corpora is no table: local files alone.
        wanted = {name: c.replace(hub=None) for name, c in read_suite("papers", names).items()}
        self.found, self.missing = {}, {}
        for name in names:
            try:
                find(wanted[name], folder)
                self.found[name] = wanted[name]
            except ConfigError as error:
                self.missing[name] = str(error).removesuffix(", and the corpus has no hub")

    def measure(self, record: Record, lookahead: bool, say: Callable[[str], None]) -> dict[str, Measured]:
        """Every corpus at hand by one run's model; what the run's folder holds already is not measured again."""
        if not self.found:
            return {}
        from sparsemix.evaluate.suite import run_suite
        from sparsemix.trained import load

        trained = load(record.folder)
        assert trained.tokenizer is not None
        causal = run_suite(
            trained.model,
            trained.tokenizer,
            self.found,
            self.folder,
            self.options,
            record.folder / "corpora.json",
            lambda *_: None,
            lambda _: None,
        )["corpora"]
        ahead = self._lookahead(record, trained, say) if lookahead else {}
        measured = {}
        for name, corpus in causal.items():
            if "rows" not in corpus:
                self.missing[name] = corpus["not_available"]
                continue
            row = corpus["rows"][0]
            measured[name] = Measured(row["perplexity"]["value"], row["bits_per_byte"]["value"], ahead.get(name))
        return measured

    def _lookahead(self, record: Record, trained: Any, say: Callable[[str], None]) -> dict[str, float]:
        """Perplexity under the routing of training on the same documents and windows."""
        from sparsemix.evaluate.corpora import find

        path = record.folder / "corpora-lookahead.json"
        held: dict[str, Any] = read_mapping(path, "delete it to have it measured again") if path.is_file() else {}
        for name, corpus in self.found.items():
            found = find(corpus, self.folder)
            asked = {"origin": found.origin, "options": self.options.model_dump(mode="json")}
            if held.get(name, {}).get("asked") != asked:
                say(f"{record.arm}, seed {record.seed}: {name} under the routing of training")
                held[name] = {"asked": asked, "perplexity": self._score(name, corpus, found.rows, trained)}
                write_atomic(path, checked_json(held))
        return {name: held[name]["perplexity"] for name in self.found}

    def _score(self, name: str, corpus: Any, rows: Any, trained: Any) -> float:
        from sparsemix.data.tokenizer import end_of_text
        from sparsemix.evaluate.corpora import passages
        from sparsemix.evaluate.sliding import score
        from sparsemix.evaluate.suite import collect

        model, tokenizer, options = trained.model, trained.tokenizer, self.options
        limit = options.max_documents or corpus.max_documents
        texts = passages(name, corpus, rows)
        documents = collect(tokenizer, texts, limit, options.max_tokens, not corpus.source, lambda _: None)
        context, stride = options.windows(model.config.seq_len)
        scores = score(model, documents.ids, end_of_text(tokenizer), context, stride, causal=False)
        return exp(float(scores.nats.sum() / scores.tokens.sum()))
