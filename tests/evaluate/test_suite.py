"""The papers' suite on made corpora: what is scored, what the numbers are, what is kept, what is said of the absent."""

import json
import math

import numpy as np
import pytest
import torch

from made_corpora import small_tokenizer, texts, write_papers, write_rows
from sparsemix.api import build_model
from sparsemix.config import ConfigError
from sparsemix.data import hub
from sparsemix.evaluate import suite
from sparsemix.evaluate.corpora import corpora, find, passages, read_suite, suites
from sparsemix.evaluate.suite import SuiteOptions, collect, fingerprint, run_suite
from sparsemix.inputs import read_mapping
from sparsemix.layers import Ctx
from tiny import BLOCKS, D, V

SEQ_LEN = 16
PAPERS = ["c4", "wikitext", "lambada", "pile", "curation", "redpajama"]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_papers(folder)
    return folder


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def model_of(blocks="mod", seed=0):
    model = build_model({"d_model": D, "vocab_size": V, "seq_len": SEQ_LEN, "blocks": BLOCKS[blocks]}, seed).double()
    for name, parameter in model.named_parameters():
        if name.endswith("predictor.down.weight"):
            parameter.data *= 40
    return model.eval()


def measured(model, tokenizer, data, out, only=(), said=None, **options):
    say = (lambda _: None) if said is None else said.append
    asked = read_suite("papers", only)
    return run_suite(model, tokenizer, asked, data, SuiteOptions(**options), out, lambda *_: None, say)


def test_the_papers_suite_has_every_corpus_with_a_hub_files_and_a_licence():
    assert suites() == ["papers"]
    found = read_suite("papers")
    assert list(found) == PAPERS and sorted(PAPERS) == corpora()
    for corpus in found.values():
        assert corpus.files and corpus.hub and corpus.licence and corpus.about


def test_every_corpus_gets_its_row_and_the_file_says_how_it_was_made(tmp_path, tokenizer, data):
    model, out = model_of(), tmp_path / "eval.json"
    result = measured(model, tokenizer, data, out)
    assert read_mapping(out) == result
    assert list(result["corpora"]) == PAPERS
    documents = {name: corpus["rows"][0]["documents"] for name, corpus in result["corpora"].items()}
    assert documents == {"c4": 9, "wikitext": 5, "lambada": 12, "pile": 15, "curation": 7, "redpajama": 6}
    assert [row["name"] for row in result["corpora"]["pile"]["rows"]] == [
        "pile",
        *(f"pile/test/{s}" for s in ("cc", "github", "uspto")),
    ]
    assert result["model_sha256"] == fingerprint(model, tokenizer)
    for corpus in result["corpora"].values():
        total, *sources = corpus["rows"]
        assert 0 < corpus["routed"]["blocks.1"] < 1 and corpus["routed_share"] == corpus["routed"]["blocks.1"]
        for row in corpus["rows"]:
            for name in ("bits_per_byte", "perplexity"):
                assert row[name]["value"] > 0 and row[name]["error"] > 0
        for name in ("documents", "tokens", "bytes") if sources else ():
            assert total[name] == sum(row[name] for row in sources)
        assert {"context", "stride", "max_documents", "max_tokens", "corpus", "origin", "versions"} == set(
            corpus["asked"]
        )
        assert len(corpus["documents_sha256"]) == 64
    assert list(result["corpora"]["c4"]["asked"]["origin"]["files"]) == ["c4/validation.jsonl.gz"]


def test_the_numbers_are_those_of_each_document_alone(tmp_path, tokenizer, data):
    model = model_of("dense")
    result = measured(model, tokenizer, data, tmp_path / "e.json", ["wikitext", "lambada"], stride=SEQ_LEN)
    nats, counts = [], []
    rows = list(find(read_suite("wikitext")["wikitext"], data).rows)
    for row in rows:
        text = row.fields["text"]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        tokens, total = torch.tensor([0, *ids]), 0.0
        ends = [*range(SEQ_LEN, len(ids), SEQ_LEN), len(ids)]
        for before, end in zip([0, *ends], ends, strict=False):
            begin = max(0, end - SEQ_LEN)
            with torch.no_grad():
                log_p = model(tokens[None, begin:end], Ctx(causal=True)).logits[0].log_softmax(-1)
            picked = log_p.gather(1, tokens[begin + 1 : end + 1, None])
            total -= float(picked[before - begin :].sum())
        nats.append(total)
        counts.append((len(ids), len(text.encode()), len(text.split())))
    tokens, num_bytes, words = np.sum(counts, axis=0)
    (row,) = result["corpora"]["wikitext"]["rows"]
    assert (row["tokens"], row["bytes"], row["words"]) == (tokens, num_bytes, words)
    assert row["perplexity"]["value"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-11)
    assert row["bits_per_byte"]["value"] == pytest.approx(sum(nats) / math.log(2) / num_bytes, rel=1e-11)
    assert row["word_perplexity"]["value"] == pytest.approx(math.exp(sum(nats) / words), rel=1e-11)


def test_the_last_word_is_scored_given_all_before_it(tmp_path, tokenizer, data):
    model, nats, right = model_of("dense"), [], []
    result = measured(model, tokenizer, data, tmp_path / "e.json", ["lambada"], stride=3)
    for row in find(read_suite("lambada")["lambada"], data).rows:
        context, target = row.fields["context"], row.fields["target"]
        before = tokenizer.encode(context, add_special_tokens=False).ids
        word = tokenizer.encode(f" {target}", add_special_tokens=False).ids
        tokens = torch.tensor([0, *before, *word])
        with torch.no_grad():
            log_p = model(tokens[None, :-1][:, -SEQ_LEN:], Ctx(causal=True)).logits[0, -len(word) :].log_softmax(-1)
        nats.append(-float(log_p.gather(1, tokens[-len(word) :, None]).sum()))
        right.append(bool((log_p.argmax(-1) == tokens[-len(word) :]).all()))
    last = result["corpora"]["lambada"]["rows"][0]["last_word"]
    assert last["perplexity"]["value"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-11)
    assert last["perplexity"]["error"] == pytest.approx(
        math.exp(np.mean(nats)) * np.std(nats, ddof=1) / np.sqrt(12), rel=1e-9
    )
    assert last["accuracy"]["value"] == np.mean(right)


def test_a_passage_without_a_context_ends_with_the_word_after_its_last_space(tmp_path, tokenizer):
    write_rows(tmp_path / "lambada/test.jsonl", [{"text": "the cat sees one red hat"}, {"text": "one dog "}])
    corpus = read_suite("lambada")["lambada"]
    found = collect(
        tokenizer, passages("lambada", corpus, find(corpus, tmp_path).rows), None, None, True, lambda _: None
    )
    for ids, first, word in zip(found.ids, found.word_from, (" hat", " dog "), strict=True):
        assert tokenizer.decode(ids[first:].tolist()) == word
    for text, context in (("word", None), ("a b c", "x y"), ("a b ", "a b ")):
        row = {"text": text} | ({} if context is None else {"context": context})
        write_rows(tmp_path / "lambada/test.jsonl", [row])
        with pytest.raises(ConfigError, match=r"test.jsonl:1: the text must be a context and a last word"):
            list(passages("lambada", corpus, find(corpus, tmp_path).rows))


def test_a_corpus_that_is_not_there_says_why_and_the_others_are_measured(tmp_path, tokenizer, data, offline):
    folder = tmp_path / "data"
    write_rows(folder / "c4/validation.jsonl", [{"text": t} for t in texts(3, 1)])
    (folder / "pile").mkdir()
    (folder / "pile/cut.jsonl.gz").write_bytes((data / "pile/cc.jsonl.gz").read_bytes()[:40])
    write_rows(folder / "redpajama/a.jsonl", [{"content": "no text"}])
    write_rows(folder / "curation/a.jsonl", [{"text": "   "}])
    write_rows(folder / "wikitext/test.jsonl", [{"text": "a lone \ud800 surrogate"}])
    result = measured(model_of(), tokenizer, folder, tmp_path / "e.json")["corpora"]
    assert result["c4"]["rows"][0]["documents"] == 3
    why = {name: corpus["not_available"] for name, corpus in result.items() if "not_available" in corpus}
    assert list(why) == PAPERS[1:]
    for name, said in {
        "lambada": "no file lambada/test* below",
        "pile": "truncated or corrupt",
        "redpajama": "no field `text` (fields: content)",
        "curation": "no document holds text",
        "wikitext": "lone surrogate at character 7",
    }.items():
        assert said in why[name] and "\n" not in why[name]
    assert "HF_HUB_OFFLINE is set" in why["lambada"]


def test_without_a_folder_the_hub_is_read_by_its_full_name_and_no_further_than_asked(tmp_path, tokenizer, monkeypatch):
    import datasets

    read, asked = [], {}

    def rows(name):
        for text in texts(500, 3):
            read.append(name)
            yield {
                "text": text,
                "page": text,
                "article_content": text,
                "meta": {"pile_set_name": f"Set {len(text) % 2}"},
            }

    def fake(name, config, *, split, revision, streaming, **files):
        asked[name] = config, split, revision, streaming, files
        return rows(name)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(hub, "_reach", lambda: None)
    result = measured(model_of("dense"), tokenizer, None, tmp_path / "e.json", max_documents=4)["corpora"]
    assert asked["allenai/c4"] == ("en", "validation", None, True, {})
    assert asked["togethercomputer/RedPajama-Data-1T-Sample"][4] == {"data_files": {"train": "**/*.parquet"}}
    assert sorted(row["name"] for row in result["pile"]["rows"]) == ["Set 0", "Set 1", "pile"]
    assert {row["documents"] for row in result["pile"]["rows"][1:]} == {4}
    assert read.count("allenai/c4") <= 5 and read.count("EleutherAI/pile_val_test") == 500
    assert result["wikitext"]["asked"]["origin"] == {
        "hub": "hf:EleutherAI/wikitext_document_level/wikitext-2-raw-v1:test"
    }


def test_only_whole_documents_within_the_limits_are_scored(tmp_path, tokenizer, data):
    corpus = read_suite("c4")["c4"]
    lengths = [len(tokenizer.encode(row.fields["text"]).ids) for row in find(corpus, data).rows]
    for options, count in (({"max_documents": 4}, 4), ({"max_tokens": sum(lengths[:3])}, 3), ({"max_tokens": 1}, 1)):
        result = measured(model_of("dense"), tokenizer, data, tmp_path / "e.json", ["c4"], **options)
        assert result["corpora"]["c4"]["rows"][0]["tokens"] == sum(lengths[:count])


def test_what_is_measured_is_kept_until_model_settings_or_text_change(tmp_path, tokenizer, data, monkeypatch):
    out, model, measures = tmp_path / "e.json", model_of("dense"), []
    real = suite.measure
    monkeypatch.setattr(suite, "measure", lambda *a, **k: (measures.append(a[2]), real(*a, **k))[1])
    folder = tmp_path / "data"
    write_papers(folder)
    first = measured(model, tokenizer, folder, out, ["c4", "wikitext"])
    said: list[str] = []
    assert measured(model, tokenizer, folder, out, ["c4", "wikitext"], said) == first
    assert measures == ["c4", "wikitext"] and said == [f"c4: kept from {out}", f"wikitext: kept from {out}"]
    measured(model, tokenizer, folder, out, ["c4"], stride=2)
    assert measures[2:] == ["c4"]
    # The other corpus stays in the file; another model's results do not.
    assert list(json.loads(out.read_text())["corpora"]) == ["c4", "wikitext"]
    write_rows(folder / "c4/validation.jsonl.gz", [{"text": "another text"}])
    measured(model, tokenizer, folder, out, ["c4"], stride=2)
    measured(model_of("dense", seed=1), tokenizer, folder, out, ["c4"])
    assert measures[3:] == ["c4", "c4"]
    assert list(json.loads(out.read_text())["corpora"]) == ["c4"]


def test_a_corpus_that_has_gone_leaves_its_earlier_result_in_the_file(tmp_path, tokenizer, data, offline):
    out, said = tmp_path / "e.json", []
    measured(model_of(), tokenizer, data, out, ["c4"])
    before = json.loads(out.read_text())["corpora"]["c4"]
    result = measured(model_of(), tokenizer, None, out, ["c4"], said)
    assert "no data folder was named" in result["corpora"]["c4"]["not_available"]
    assert json.loads(out.read_text())["corpora"]["c4"] == before
    assert said == [f"c4: not available now; an earlier result stays in {out}"]


def test_a_diverged_model_has_no_numbers_and_the_file_is_json(tmp_path, tokenizer, data):
    model = model_of("dense")
    model.norm.weight.data.fill_(math.nan)
    result = measured(model, tokenizer, data, tmp_path / "e.json", ["wikitext"])
    assert result["corpora"]["wikitext"]["rows"][0]["perplexity"] == {"value": None, "error": None}
    assert "NaN" not in (tmp_path / "e.json").read_text()


def test_an_interruption_keeps_the_corpora_that_were_finished(tmp_path, tokenizer, data):
    out = tmp_path / "e.json"

    def interrupt(stage, done, total):
        if stage.startswith("lambada"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(model_of(), tokenizer, read_suite("papers"), data, SuiteOptions(), out, interrupt, lambda _: None)
    assert list(json.loads(out.read_text())["corpora"]) == ["c4", "wikitext"]
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_a_file_of_something_else_is_not_overwritten(tmp_path, tokenizer, data):
    out = tmp_path / "e.json"
    for held in ("[1]", "no json", '{"a": 1}'):
        out.write_text(held)
        with pytest.raises(ConfigError, match=r"is no result of an evaluation|must hold settings|is not valid JSON"):
            measured(model_of(), tokenizer, data, out, ["c4"])
        assert out.read_text() == held
    with pytest.raises(ConfigError, match="there is no folder"):
        measured(model_of(), tokenizer, data, tmp_path / "none" / "e.json", ["c4"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"context": 17}, "context=17 must be at most the model's seq_len=16"),
        ({"stride": 17}, "stride=17 must be at most context=16"),
        ({"context": 8, "stride": 9}, "stride=9 must be at most context=8"),
    ],
)
def test_windows_that_do_not_fit_are_refused(tmp_path, tokenizer, data, options, says):
    with pytest.raises(ConfigError, match=says):
        measured(model_of(), tokenizer, data, tmp_path / "e.json", **options)
    assert not list(tmp_path.iterdir())


def test_a_context_too_short_for_a_last_word_is_said(tmp_path, tokenizer):
    write_rows(tmp_path / "lambada/test.jsonl", [{"text": "one xqzvwkjxqzvwkj"}])
    result = measured(model_of(), tokenizer, tmp_path, tmp_path / "e.json", ["lambada"], context=3)
    assert "context=3 is shorter than a last word of" in result["corpora"]["lambada"]["not_available"]


def test_a_suite_may_be_a_file_of_packaged_and_own_corpora_or_one_corpus(tmp_path):
    (tmp_path / "mine.yaml").write_text("about: notes\nlicence: mine\nfiles: ['notes/*']\ntext: [body]\n")
    (tmp_path / "both.yaml").write_text("corpora: [wikitext, mine.yaml]\n")
    assert list(read_suite(str(tmp_path / "both.yaml"))) == ["wikitext", "mine"]
    assert list(read_suite(str(tmp_path / "both.yaml"), ["mine"])) == ["mine"]
    assert list(read_suite(str(tmp_path / "mine.yaml"))) == ["mine"]
    assert list(read_suite("c4")) == ["c4"]
    write_rows(tmp_path / "notes/a.jsonl", [{"body": "a text"}])
    corpus = read_suite(str(tmp_path / "mine.yaml"))["mine"]
    assert [p.text for p in passages("mine", corpus, find(corpus, tmp_path).rows)] == ["a text"]
    with pytest.raises(ConfigError, match="no file notes/"):
        find(corpus, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("corpora: [wikitxt]", "corpora=wikitxt is none of c4, .*; did you mean 'wikitext'"),
        ("corpora: [gone.yaml]", "gone.yaml: no such file"),
        ("corpora: [c4, c4]", "c4 is there twice"),
        ("corpora: []", "corpora"),
        ("about: x\nlicence: y", "there is no hub"),
        ("about: x\nlicence: y\nfile: [a]", "did you mean 'files'"),
        ("- a", "must hold settings"),
    ],
)
def test_a_wrong_suite_file_is_one_line(tmp_path, content, says):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ConfigError, match=says) as error:
        read_suite(str(tmp_path / "s.yaml"))
    assert "\n" not in str(error.value)


def test_an_unknown_suite_or_corpus_names_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"suite=papres is none of papers.*did you mean 'papers'"):
        read_suite("papres")
    with pytest.raises(ConfigError, match=r"only=pille is none of c4, .*did you mean 'pile'"):
        read_suite("papers", ["pille"])
    with pytest.raises(ConfigError, match="no such file"):
        read_suite(str(tmp_path / "none.yaml"))


def test_the_fingerprint_depends_on_weights_and_tokenizer_alone(tokenizer):
    assert fingerprint(model_of(), tokenizer) == fingerprint(model_of().train(), tokenizer)
    assert fingerprint(model_of(), tokenizer) != fingerprint(model_of(seed=1), tokenizer)
    assert fingerprint(model_of(), tokenizer) != fingerprint(model_of(), small_tokenizer(280))


def test_a_host_that_does_not_answer_is_said_at_once(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"^hf:o/n:test cannot be streamed \(127.0.0.1 cannot be reached: "):
        next(hub.stream("o/n", "test"))
