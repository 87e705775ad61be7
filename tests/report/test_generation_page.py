"""The page of a routed text, and the same in a terminal, from a made-up record with every kind of layer."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from test_page import Page, browser, picture, screen  # noqa: F401  (a fixture)

from sparsemix.report.generation_page import generation_page, spoken
from sparsemix.report.generation_text import Painter
from sparsemix.report.shades import DARK, LIGHT, TERMINAL, contrast, shade

WORDS = ["", "The", " cat", " sees", "", "猫", "\n", " <b>", " &", "   "] * 8
MOD, PEER, HEADS = "blocks.1", "blocks.1.inner.ffn", "blocks.2.ffn.inner"


def token(i, text):
    routed = i % 3 == 0
    said = {MOD: {"routed": routed, "score": i / 7 - 2, "gate": 0.37, "guess": -1.5 if not routed else 0.25}}
    if routed:
        said[PEER] = {"experts": [[[4000 + i % 5, 0.51], [17, 0.2]]], "others": [95]}
    said[HEADS] = {"experts": [[[i % 4, 0.6]], [[3, 0.3], [0, 0.1]]], "others": [0, 0]}
    name = "<|endoftext|>" if i == 0 else "part of a character"
    return {
        "text": text, "name": name, "id": 300 + i, "prompt": i < 4, "logprob": None if i < 4 else -1.25,
        "blocks": 2 + routed, "layers": said,
    }  # fmt: skip


@pytest.fixture
def record():
    made = {
        "run": "mod-0-ab12cd34ef", "settings": {"temperature": 0.8, "top_k": None, "top_p": 0.9, "seed": 0},
        "least": 2, "most": 3, "tokens": [token(i, text) for i, text in enumerate(WORDS)],
        "layers": [
            {"path": MOD, "kind": "mod", "block": 1, "experts": None},
            {"path": PEER, "kind": "peer", "block": 1, "experts": 65536},
            {"path": HEADS, "kind": "moe", "block": 2, "experts": 4},
        ],
        "tokens_per_s": 41.27, "kv_bytes": 61234, "kv_dense_bytes": 100_000, "ended": "max_tokens",
    }  # fmt: skip
    return json.loads(json.dumps(made))


def test_the_page_is_whole_and_fetches_and_runs_nothing(record):
    text = generation_page(record)
    page = Page(text)
    assert not page.wrong and not page.open and len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert [link for link in page.links if not link.startswith("#")] == ["data:,"]
    assert not re.search(r"https?:|@import|url\(|<script|<iframe|javascript:", text)
    assert list(page.sections) == ["text", "layers", "run", "reading"]
    assert "None" not in text and "nan" not in text.lower().replace("nano", "")


def test_every_token_has_its_number_its_name_and_its_detail(record):
    text = generation_page(record)
    boxes = re.findall(
        r'<input type="radio" name="token" id="t(\d+)" aria-label="(.*?)" aria-describedby="d(\d+)"', text
    )
    assert [(int(a), int(b)) for a, _, b in boxes] == [(i, i) for i in range(len(WORDS))]
    names = [name for _, name, _ in boxes]
    assert names[0] == "&lt;|endoftext|&gt;, 3 of 3 blocks" and names[1] == "The, 2 of 3 blocks"
    assert names[4] == "part of a character, 2 of 3 blocks" and names[6] == "line break, 3 of 3 blocks"
    assert names[9] == "space, space, space, 3 of 3 blocks"
    details = dict(re.findall(r'<span class="d" id="d(\d+)">(.*?)</span></label>', text))
    assert len(details) == len(WORDS)
    said = details["1"].replace("\u00a0", " ")
    assert "went past it (gate 0.37, score −1.86, predictor −1.50)" in said and "prompt" in said
    assert "<b>blocks.1.inner.ffn</b>: not reached" in said
    assert "sub-token 0: 1 (0.60); sub-token 1: 3 (0.30), 0 (0.10) of 4 experts" in said
    assert "4001 (0.51), 17 (0.20) and 95 more of 65536 experts" in details["6"].replace("\u00a0", " ")
    assert "log-probability −1.25" in details["6"]


def test_the_tables_count_the_prompt_apart(record):
    layers = Page(generation_page(record)).sections["layers"]
    # Tokens 0 and 3 of the 4 of the prompt, 25 of the 76 others.
    assert re.search(r"blocks\.1\s*50\.0 %\s*32\.9 %\s*0\.37", layers)
    assert re.search(r"blocks\.1\.inner\.ffn\s*peer\s*65536\s*27", layers)


def test_text_of_the_model_is_escaped(record):
    evil = "<script>alert(1)</script>\"'&$title"
    record["run"] = record["tokens"][3]["text"] = record["tokens"][4]["name"] = evil
    record["settings"] = {evil: evil}
    record["layers"][0]["path"] = evil
    for one in record["tokens"]:
        one["layers"][evil] = one["layers"].pop(MOD)
    text = generation_page(record)
    page = Page(text)
    assert "<script" not in text and not page.wrong and evil in page.sections["text"]


def test_a_dense_models_page_says_that_nothing_is_routed(record):
    record.update(layers=[], least=3, most=3)
    for one in record["tokens"]:
        one.update(layers={}, blocks=3)
    page = Page(generation_page(record))
    assert "no block is routed" in page.sections["text"] and "no routed layer" in page.sections["layers"]


@pytest.mark.parametrize("ramp", [LIGHT, DARK, TERMINAL])
def test_every_shade_is_readable_and_the_order_shows_without_colour(ramp):
    shades = [shade(n / 12, ramp) for n in range(13)]
    assert min(contrast(one.ground, one.ink) for one in shades) >= 4.5
    grounds = [contrast(one.ground, ramp[0]) for one in shades]
    assert grounds == sorted(grounds) and len(set(grounds)) == 13
    assert shades[0].ground == ramp[0] and shades[-1].ground == ramp[-1]


VISIBLE = (
    "return [...document.querySelectorAll('.d')].filter(d => getComputedStyle(d).display != 'none').map(d => d.id)"
)


def test_a_pointer_and_arrow_keys_reach_every_token(record, tmp_path, browser):  # noqa: F811
    from selenium.webdriver import ActionChains, Keys

    (tmp_path / "page.html").write_text(generation_page(record), encoding="utf-8")
    screen(browser, 1200)
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.execute_script(VISIBLE) == ["d4"], "the first generated token is shown at first"
    browser.execute_script("document.getElementById('t4').focus()")
    for key, shown in ((Keys.ARROW_RIGHT, "d5"), (Keys.ARROW_DOWN, "d6"), (Keys.ARROW_LEFT, "d5")):
        ActionChains(browser).send_keys(key).perform()
        assert browser.execute_script(VISIBLE) == [shown]
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.execute_script("return document.activeElement.name") != "token", "all tokens are one tab stop"
    label = browser.find_element("css selector", "label:has(#t2)")
    ActionChains(browser).move_to_element(label).perform()
    assert browser.execute_script(VISIBLE) == ["d2"], "hovering shows a token and hides the chosen one"
    browser.execute_script("document.querySelector('.marks').open = true; document.getElementById('mark-x0').click()")
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    grounds = "return [...document.querySelectorAll('.words > .t')].map(t => getComputedStyle(t).backgroundColor)"
    coloured = [ground != "rgba(0, 0, 0, 0)" for ground in browser.execute_script(grounds)]
    assert coloured == [i % 3 == 0 for i in range(len(WORDS))]
    browser.execute_script("document.getElementById('mark-x2-3').click()")
    marked = "return [...document.querySelectorAll('.words > .t')].map(t => getComputedStyle(t).boxShadow != 'none')"
    assert all(browser.execute_script(marked)), "every token's second sub-token takes expert 3"


def test_the_page_works_in_a_browser_light_dark_and_on_a_phone(record, tmp_path, browser):  # noqa: F811
    (tmp_path / "page.html").write_text(generation_page(record), encoding="utf-8")
    for width, dark in ((1200, False), (1200, True), (390, False), (320, False)):
        screen(browser, width, dark, phone=width < 500)
        browser.get((tmp_path / "page.html").as_uri())
        browser.execute_script("document.querySelector('.marks').open = true")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        shades = picture(browser)[::3, ::3]
        assert len(np.unique(shades.reshape(-1, 3), axis=0)) > 50 and (shades[0, 0].max() < 0.2) == dark
        box = browser.execute_script("return document.getElementById('d4').getBoundingClientRect().toJSON()")
        assert box["height"] > 40 and box["right"] <= width + 1
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    numbers = "return getComputedStyle(document.querySelector('.words sub')).display"
    assert browser.execute_script(numbers) == "none"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(numbers) == "inline" and browser.execute_script(VISIBLE) == []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def painter(least=2, most=4, **console):
    return Painter(Console(file=io.StringIO(), **console), least, most)


def test_a_terminal_shows_colours_and_the_text_alone_is_unchanged():
    paint = painter(force_terminal=True, color_system="truecolor")
    said = paint.token(" two\nlines", 4, False) + paint.token(" none", 2, False)
    ground, ink = shade(1.0, TERMINAL)
    codes = [";".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5)) for colour in (ink, ground)]
    assert f"38;2;{codes[0]};48;2;{codes[1]}" in said and said.endswith(" none")
    assert re.sub(r"\x1b\[[\d;]*m", "", said) == " two\nlines none"
    assert not re.search(r"48;[^m]*m[^\x1b]*\n", said), "no colour runs on over the end of a line"


@pytest.mark.parametrize(
    "console",
    [
        {"force_terminal": False},
        {"force_terminal": True, "color_system": "truecolor", "no_color": True},
        {"force_terminal": True, "color_system": "standard"},
    ],
)
def test_without_colours_a_number_stands_where_the_depth_changes(console):
    paint = painter(**console)
    said = "".join(paint.token(text, n, False) for text, n in (("a", 2), (" b", 2), ("", 3), (" c", 3), (" d", 2)))
    assert said == "[2]a b[3] c[2] d"
    assert "\x1b" not in said + paint.legend() and "[n] before a token: n of 4 blocks" in paint.legend()


def test_a_terminal_is_never_commanded_by_the_text_but_a_file_gets_it_whole():
    evil = "a\x1b[2Jb\x07\r\n\tc"
    assert painter(force_terminal=True).plain(evil) == "a\ufffd[2Jb\ufffd\ufffd\n\tc"
    assert painter(force_terminal=False).plain(evil) == evil


def test_without_routed_blocks_there_is_nothing_to_number():
    paint = painter(4, 4)
    assert paint.token("a", 4, False) == "a" and "no block is routed" in paint.legend()


def test_a_token_is_spoken_in_words():
    assert spoken({"text": " a\n", "name": ""}) == "a" and spoken({"text": "\t", "name": ""}) == "tab"
    assert spoken({"text": "\u2003", "name": ""}) == "U+2003"
