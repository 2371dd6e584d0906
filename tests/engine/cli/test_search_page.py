"""The page of `pagefork explain --html`: whole in itself, closed to whatever its texts say, and at work in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.browser import VARIABLE, Tab, browser
from support.searches import HOSTILE, search

from pagefork.cli.search_page import page

STRATEGIES = ["beam", "contrastive", "mcts"]


class Parsed(HTMLParser):
    """The start tags of a page, and the text of its scripts and style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("type") or tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open] = self.texts.get(self._open, "") + data


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_page_refers_to_nothing_outside_and_its_policy_forbids_it(strategy: str) -> None:
    parsed = Parsed(page(search(strategy)))
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "data", "style", "background", "poster"}
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in parsed.texts["style"] and "@import" not in parsed.texts["style"]
    [policy] = [a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules == {f"{kind}-src": hashed(parsed.texts[kind]) for kind in ("script", "style")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_search_comes_back_from_the_page_and_its_texts_are_no_markup(strategy: str) -> None:
    hostile = search(strategy)
    written = page(hostile)
    parsed = Parsed(written)
    harmless = json.loads(json.dumps(hostile).replace("<", "").replace("&", ""))
    assert parsed.tags == Parsed(page(harmless)).tags
    assert json.loads(parsed.texts["application/json"]) == hostile
    assert written.isascii()
    assert not [
        text for text in HOSTILE if "<" in text and text in written.partition('application/json">')[2].partition("</script>")[0]
    ]


program = browser()
in_browser = pytest.mark.skipif(program is None, reason=f"no Chromium on PATH, and {VARIABLE} names none")


def opened(document: dict[str, Any], folder: Path) -> Tab:
    assert program is not None
    file = folder / "page.html"
    file.write_text(page(document), encoding="utf-8")
    return Tab(program, file)


@in_browser
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_reader_steps_through_the_search_and_no_text_of_it_acts(strategy: str, tmp_path: Path) -> None:
    document = search(strategy, steps=6, outputs=1)
    with opened(document, tmp_path) as tab:
        place = "document.getElementById('place').textContent"
        selected = "document.querySelector('#rows [aria-selected=true] button').title"
        rows = "document.querySelectorAll('#rows tr').length"
        assert (tab.run(place), tab.run(rows)) == ("token 1 of 6", 8)
        assert tab.run("document.querySelectorAll('#picture g').length") >= 9  # the candidates and what they go on from
        tab.press("ArrowRight")
        tab.run("document.getElementById('on').click()")
        assert tab.run(place) == "token 3 of 6"
        for key in ("End", "ArrowRight"):
            tab.press(key)
            assert tab.run(place) == "token 6 of 6"
        tab.press("Home")
        tab.run("slider.value = 5, slider.dispatchEvent(new Event('input'))")
        assert tab.run(place) == "token 5 of 6"
        tab.run("document.querySelector('#rows tr:nth-child(3) button').click()")
        assert tab.run("document.querySelectorAll('#rows tr')[2].ariaSelected") == "true"
        third = tab.run(selected)
        assert tab.run("document.querySelector('#picture .selected title').textContent") == tab.run(
            "document.querySelector('#rows [aria-selected=true] button').textContent"
        )
        tab.press("ArrowUp")
        tab.press("ArrowDown")
        assert tab.run(selected) == third
        assert tab.run("document.querySelectorAll('img, a, iframe, form, link, object').length") == 0
        assert (tab.events, tab.requests) == ([], [(tmp_path / "page.html").as_uri()])


@in_browser
def test_the_policy_holds_even_for_a_script_that_came_in(tmp_path: Path) -> None:
    with opened(search("beam"), tmp_path) as tab:
        tab.run(
            "document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.com/x\" onerror=\"window.acted = 1\">')"
        )
        tab.run("document.head.append(Object.assign(document.createElement('script'), { textContent: 'window.acted = 1' }))")
        tab.run("new Promise((done) => setTimeout(done, 100))")
        assert tab.run("window.acted") is None
        assert len(tab.events) >= 2
        assert tab.run("fetch('https://example.com').then(() => 1, () => 0)") == 0


@in_browser
@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        ("beam", {"steps": 1250, "candidates": 8}),
        ("beam", {"steps": 2, "candidates": 5000}),
        ("contrastive", {"steps": 2000, "candidates": 5}),
        ("mcts", {"steps": 10, "candidates": 333}),
    ],
)
def test_ten_thousand_entries_are_drawn_in_part(strategy: str, sizes: dict[str, int], tmp_path: Path) -> None:
    with opened(search(strategy, **sizes, outputs=1), tmp_path) as tab:
        tab.press("End")
        assert tab.run("document.getElementById('place').textContent") == f"token {sizes['steps']} of {sizes['steps']}"
        assert 9 < tab.run("document.querySelectorAll('#picture g').length") < 300
        assert tab.run("document.querySelectorAll('#rows tr').length") <= 201
        assert tab.events == []


@in_browser
def test_a_search_without_steps_says_so(tmp_path: Path) -> None:
    with opened(search("beam", steps=0), tmp_path) as tab:
        assert "no step" in tab.run("document.getElementById('status').textContent")
        assert tab.events == []
