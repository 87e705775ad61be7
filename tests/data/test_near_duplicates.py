import random
from contextlib import ExitStack

import numpy as np
import pytest

from sparsemix.data.near_duplicates import Index, keep
from sparsemix.data.shingles import BLOCK, shingles
from sparsemix.data.spool import Spool

SCRIPTS = {
    "Latin": [f"w{i}" for i in range(3000)],
    "Chinese": [chr(0x4E00 + i) for i in range(2500)],
    "Japanese": [chr(0x3041 + i) for i in range(86)] + [chr(0x5000 + i) for i in range(500)],
    "Thai": [chr(0x0E01 + i) for i in range(46)],
    "Devanagari": [
        f"{chr(0x0915 + i)}{chr(0x093E + j)}{chr(0x0915 + k)}" for i in range(30) for j in (0, 2) for k in (1, 5)
    ],
    "Khmer": [chr(0x1780 + i) for i in range(35)],
}
SPACED = ("Latin", "Devanagari")


def words(seed, n):
    return [f"w{random.Random(seed * 100003 + i).randrange(5000)}" for i in range(n)]


def indexed(texts, files):
    spool, index = Spool(files), Index(files)
    # Whatever the batches are, the texts are the same.
    for start in range(0, len(texts), 7):
        spool.add(texts[start : start + 7])
        index.add(texts[start : start + 7])
    return spool, index


def kept(texts):
    with ExitStack() as files:
        return np.flatnonzero(keep(*indexed(texts, files), lambda *_: None)).tolist()


def clusters(texts):
    with ExitStack() as files:
        _, index = indexed(texts, files)
        return index.clusters(np.ones(len(texts), bool), np.arange(len(texts))).tolist()


def shingle_set(text):
    return {h for block in shingles([text]) for h in block.hashes.tolist()}


def written(script, seed, length):
    rng = random.Random(f"{script}{seed}")
    return [rng.choice(SCRIPTS[script]) for _ in range(length)]


def joined(script, signs):
    return (" " if script in SPACED else "").join(signs)


def test_exact_and_edited_copies_are_dropped_and_the_first_stays():
    original = words(1, 600)
    edited = [*original[:300], "edited", *original[301:], "appended"]
    other, short = words(2, 600), ["only", "three", "words"]
    texts = [" ".join(w) for w in (original, other, edited, short, other, short)]
    assert kept(texts) == [0, 1, 3]
    assert kept([texts[0], texts[0].replace(" ", "\n  ")]) == [0]


def test_texts_that_share_half_their_shingles_are_kept_and_are_one_cluster():
    # Jaccard 1/3 for every pair: the same first half, another second half.
    head = words(3, 500)
    texts = [" ".join(head + words(10 + i, 500)) for i in range(12)]
    assert kept(texts) == list(range(12))
    assert clusters([*texts, " ".join(words(50, 500))]) == [0] * 12 + [12]


def test_word_order_and_short_texts_count_in_deduplication():
    a = words(4, 400)
    texts = [" ".join(a), " ".join(reversed(a)), "one", "two", "one two", "two one", "one two three four"]
    assert kept(texts) == list(range(7))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_with_another_last_sign_is_dropped_in_every_script(script):
    length = 100 if script in SPACED else 300
    texts = [joined(script, [*written(script, i, length), end]) for i in range(20) for end in SCRIPTS[script][:2]]
    assert kept(texts) == list(range(0, 40, 2))
    assert clusters([texts[0], texts[2], texts[4]]) == [0, 1, 2]


def test_a_copy_of_minified_code_without_spaces_is_dropped():
    def code(seed):
        rng = random.Random(seed)
        return "".join(
            f"function {rng.choice('abcdef')}{i}({rng.choice('xyz')}){{return this.v{rng.randrange(999)}+{i}}}"
            for i in range(60)
        ).replace("function ", "$=")

    texts = [code(i) + end for i in range(10) for end in (";a()", ";b()")]
    assert kept(texts) == list(range(0, 20, 2))
    # As are keys, base 64 and DNA: one long run of letters and digits.
    runs = ["".join(random.Random(i).choices("acgt", k=2000)) + end for i in range(10) for end in "ac"]
    assert kept(runs) == list(range(0, 20, 2))


def test_a_poem_of_short_lines_is_dropped_where_it_is_set_anew_and_its_versions_stay_together():
    poem = [words(i, 5) for i in range(8)]
    lines = "\n".join(" ".join(line) for line in poem)
    anew = "\n\n".join("   ".join(line) for line in poem)
    last = "\n".join(" ".join(line) for line in [*poem[:-1], [*poem[-1][:-1], "end"]])
    assert kept([lines, anew, last]) == [0]
    # Where every line ends otherwise, too little is left to drop it, yet both go to one side.
    other = "\n".join(" ".join([*line, "oh"]) for line in [*poem[:6], words(90, 5)])
    short = [
        f"green hills, red sun, cold sea, white sand, a boat far out, and on the pier stands one who {end}"
        for end in ("who waits", "that goes")
    ]
    assert kept(short) == [0, 1] and clusters(short) == [0, 0]
    assert clusters(["\n".join(" ".join(line) for line in poem[:2] * 4), other])[0] == 0


def test_a_chapter_inside_a_book_and_two_editions_of_it_are_one_cluster():
    chapter, rng = words(5, 800), random.Random(0)
    edition = [word if rng.random() < 0.9 else f"new{i}" for i, word in enumerate(chapter)]
    book = words(6, 4000) + chapter + words(7, 4000)
    found = clusters([" ".join(text) for text in (chapter, words(8, 800), edition, book)])
    assert found == [0, 1, 0, 0]


def test_what_very_many_texts_have_in_common_binds_nobody():
    licence = words(9, 60)
    texts = [" ".join(licence + words(20 + i, 60)) for i in range(40)]
    assert clusters(texts) == list(range(40))
    assert clusters(texts[:10]) == [0] * 10


def test_shingles_are_those_of_five_words_in_a_row_whatever_the_block():
    text = " ".join(words(11, 50))
    assert len(shingle_set(text)) == 46
    assert shingle_set(text) == shingle_set("\n" + text.replace(" ", "\t\u3000 "))
    # A text of several blocks loses four at a border and gains none.
    long = " ".join(f"w{i}" for i in range(BLOCK // 4))
    assert len(long) > BLOCK and BLOCK // 4 - 4 - 4 * (len(long) // BLOCK) == len(shingle_set(long))


def test_the_cost_of_many_equal_beginnings_stays_linear():
    # One candidate pair for each of a few earlier texts, not for all pairs of a bucket.
    texts = [" ".join([*words(1, 200), str(i), str(i + 1)]) for i in range(120)]
    with ExitStack() as files:
        spool, index = indexed(texts, files)
        assert len(index.candidates(np.ones(120, bool))) <= 8 * 120
        assert keep(spool, index, lambda *_: None).sum() == 1
