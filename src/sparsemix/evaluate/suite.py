"""A suite of corpora -> causal perplexity, bits per byte and their standard errors, kept in one file."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer

from sparsemix.config import Config, ConfigError
from sparsemix.data.corpus import sha256
from sparsemix.data.tokenizer import end_of_text
from sparsemix.durable import write_atomic
from sparsemix.evaluate.corpora import CorpusConfig, Found, Passage, find, passages
from sparsemix.evaluate.estimate import Estimate, exponential, ratio, share
from sparsemix.evaluate.sliding import Scores, score
from sparsemix.inputs import checked_json, read_mapping
from sparsemix.model import LM
from sparsemix.provenance import hardware, versions

Progress = Callable[[str, int, int | None], None]
CONVENTION = (
    "Causal routing alone. Every document stands alone after an end-of-text token, and each of its own tokens is "
    "scored once (the end is not). Windows hold `context` tokens: the first is scored entirely, each further one ends "
    "`stride` tokens on and is scored there. Perplexity is exp(nats / tokens); bits per byte are nats / ln 2 / UTF-8 "
    "bytes of the raw text; perplexity per word divides by the raw text's white-space-separated words. Standard "
    "errors are over documents: of a ratio of sums (stratified by source in a total), to first order for exp; "
    "binomial for accuracy."
)


class SuiteOptions(Config):
    """How documents are scored. context: tokens in a window, by default and at most the model's seq_len. stride: by
    default half of it; stride = context overlaps nothing but the last window of a document. max_documents, max_tokens:
    of each source, the first whole documents; max_documents in place of the corpora's own."""

    context: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)
    max_documents: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)

    def windows(self, seq_len: int) -> tuple[int, int]:
        """(context, stride) for a model. Raises ConfigError."""
        context = self.context or seq_len
        if context > seq_len:
            raise ConfigError(f"context={context} must be at most the model's seq_len={seq_len}")
        stride = self.stride or max(1, context // 2)
        if stride > context:
            raise ConfigError(f"stride={stride} must be at most context={context}, or tokens would be left out")
        return context, stride


@dataclass
class Documents:
    """What is scored of a corpus, in order: token ids and what normalises their losses."""

    sources: list[str] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    word_from: list[int] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)


def collect(
    tokenizer: Tokenizer,
    found: Iterable[Passage],
    max_documents: int | None,
    max_tokens: int | None,
    one_source: bool,
    on_documents: Callable[[int], None],
) -> Documents:
    """The first documents of each source, tokenized: at most max_documents, and as many whole ones as fit max_tokens
    (at least one). With one_source, nothing is read beyond them."""
    documents, taken, full = Documents(), {}, set()
    for passage in found:
        count, tokens = taken.get(passage.source, (0, 0))
        if passage.source not in full and count == max_documents:
            full.add(passage.source)
        if passage.source not in full:
            encoded = tokenizer.encode(passage.text, add_special_tokens=False)
            if max_tokens and count and tokens + len(encoded.ids) > max_tokens:
                full.add(passage.source)
            else:
                taken[passage.source] = count + 1, tokens + len(encoded.ids)
                documents.sources.append(passage.source)
                documents.ids.append(np.array(encoded.ids, np.int32))
                documents.num_bytes.append(len(passage.text.encode()))
                documents.words.append(len(passage.text.split()))
                documents.marks.append(sha256(passage.text))
                if passage.word_at is not None:
                    documents.word_from.append(word_token(encoded.offsets, passage))
                on_documents(len(documents.ids))
        if one_source and full:
            break
    if not any(len(ids) for ids in documents.ids):
        raise ConfigError("no document holds text")
    return documents


def word_token(offsets: list[tuple[int, int]], passage: Passage) -> int:
    """The first token of the last word: a token that reaches into it belongs to it. Raises ConfigError."""
    for i, (_, end) in enumerate(offsets):
        if passage.word_at is not None and end > passage.word_at:
            return i
    raise ConfigError(f"the tokenizer leaves out the last word of {passage.text[-40:]!r}; use one that loses nothing")


def measure(
    model: LM,
    tokenizer: Tokenizer,
    name: str,
    corpus: CorpusConfig,
    found: Found,
    options: SuiteOptions,
    progress: Progress,
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """The rows of one corpus (its total, then its sources where it has several), the share of tokens that each
    Mixture-of-Depths layer took, and the fingerprint of the documents. Raises ConfigError."""
    context, stride = options.windows(model.config.seq_len)
    limit = options.max_documents or corpus.max_documents
    began = time.perf_counter()
    documents = collect(
        tokenizer,
        passages(name, corpus, found.rows, found.tally),
        limit,
        options.max_tokens,
        not corpus.source,
        lambda n: progress(f"{name}, reading", n, None),
    )
    longest = max((len(ids) - at for ids, at in zip(documents.ids, documents.word_from, strict=False)), default=0)
    if longest > context:
        raise ConfigError(f"context={context} is shorter than a last word of {longest} tokens")
    scores = score(
        model,
        documents.ids,
        end_of_text(tokenizer),
        context,
        stride,
        documents.word_from,
        batch_tokens,
        lambda done, total: progress(f"{name}, windows", done, total),
    )
    routed = scores.routed
    return {
        "about": corpus.about,
        "licence": corpus.licence,
        "rows": rows(name, corpus, documents, scores),
        "routed": {path: float(n[0] / max(1, n[1])) for path, n in sorted(routed.items())},
        "routed_share": float(sum(n[0] for n in routed.values()) / sum(n[1] for n in routed.values()))
        if routed
        else None,
        "read": found.tally.as_dict(),
        "documents_sha256": hashlib.sha256("".join(sorted(documents.marks)).encode()).hexdigest(),
        "seconds": time.perf_counter() - began,
    }


def rows(name: str, corpus: CorpusConfig, documents: Documents, scores: Scores) -> list[dict[str, Any]]:
    """The numbers of all documents, then of each source if there are several."""
    everything = np.ones(len(documents.ids), bool)
    sources = list(dict.fromkeys(documents.sources))
    table = [{"name": name, **_row(corpus, documents, scores, everything)}]
    if len(sources) > 1:
        labels = np.array(documents.sources)
        table += [{"name": s, **_row(corpus, documents, scores, labels == s)} for s in sources]
    return table


def _row(corpus: CorpusConfig, documents: Documents, scores: Scores, chosen: np.ndarray) -> dict[str, Any]:
    nats, tokens = scores.nats[chosen], scores.tokens[chosen]
    strata = [s for s, kept in zip(documents.sources, chosen, strict=True) if kept]
    num_bytes, words = (np.array(of)[chosen] for of in (documents.num_bytes, documents.words))
    row: dict[str, Any] = {
        "documents": len(nats),
        "tokens": int(tokens.sum()),
        "bytes": int(num_bytes.sum()),
        "bits_per_byte": _json(ratio(nats / np.log(2), num_bytes, strata)),
        "perplexity": _json(exponential(ratio(nats, tokens, strata))),
    }
    if corpus.words:
        row |= {"words": int(words.sum()), "word_perplexity": _json(exponential(ratio(nats, words, strata)))}
    if corpus.last_word:
        last = ratio(scores.word_nats[chosen], np.ones(len(nats)), strata)
        right = share(scores.word_right[chosen])
        row["last_word"] = {"perplexity": _json(exponential(last)), "accuracy": _json(right)}
    return row


def _json(estimate: Estimate) -> dict[str, float | None]:
    """JSON has no word for what is not finite."""
    return {name: v if v is not None and np.isfinite(v) else None for name, v in estimate._asdict().items()}


def fingerprint(model: LM, tokenizer: Tokenizer) -> str:
    """SHA-256 over settings, weights and tokenizer: names the model wherever it lies."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(tokenizer.to_str().encode())
    return digest.hexdigest()


def run_suite(
    model: LM,
    tokenizer: Tokenizer,
    corpora: Mapping[str, CorpusConfig],
    data_dir: Path | None,
    options: SuiteOptions,
    out: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the corpora one by one and write `out` after each, so that an interruption loses at most one. Returns
    what `out` says, of these corpora alone.

    What `out` holds of the same model, documents, settings and versions is kept; what it holds of another model is
    dropped. A corpus that cannot be had is `{"not_available": why}`; an earlier result of it stays in `out`. Raises
    ConfigError for what `options` ask."""
    context, stride = options.windows(model.config.seq_len)
    result = opened(out, fingerprint(model, tokenizer))
    result |= {"convention": CONVENTION, "hardware": hardware()}
    held, asked_for = result["corpora"], {}
    for name, corpus in corpora.items():
        try:
            found = find(corpus, data_dir)
            asked = {
                "context": context,
                "stride": stride,
                "max_documents": options.max_documents or corpus.max_documents,
                "max_tokens": options.max_tokens,
                "corpus": corpus.model_dump(mode="json"),
                "origin": found.origin,
                "versions": versions(),
            }
            # What the Hub holds may have changed since; files are known by their content.
            if "files" in found.origin and held.get(name, {}).get("asked") == asked:
                asked_for[name] = held[name]
                say(f"{name}: kept from {out}")
                continue
            measured = {"asked": asked, **measure(model, tokenizer, name, corpus, found, options, progress)}
            say(f"{name}: {found.tally.line()}")
        except ConfigError as error:
            measured = {"not_available": str(error)}
        asked_for[name] = measured
        if "rows" in measured or "rows" not in held.get(name, {}):
            held[name] = measured
            write_atomic(out, checked_json(result))
        else:
            say(f"{name}: not available now; an earlier result stays in {out}")
    return result | {"corpora": asked_for}


def opened(out: Path, model: str) -> dict[str, Any]:
    """What the file says of the model with this fingerprint; an empty result if it is of another, or not there."""
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.parent}; make it, or name another file")
    if out.is_file():
        held = read_mapping(out, "delete it to have it measured again, or name another file with --out")
        if not {"model_sha256", "corpora"} <= held.keys():
            raise ConfigError(f"{out} is no result of an evaluation; name another file with --out")
        if held["model_sha256"] == model:
            return held
    return {"model_sha256": model, "corpora": {}}
