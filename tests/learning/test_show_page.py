"""The page of `lkv show` in a browser: what a reader sees of a text, and what a click or a key changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser, browser, find

from lkv.show import Method, Shown, write

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium: apt install chromium")

# Seven tokens; layers 1 and 4 are evicted, of two heads and of one.
UNITS = [("<s>", 1), ("a", 1), (" </script><i>", 1), ("🙂", 2), ("\n", 1), (" z", 1)]
FIRST = [[[0, 1], [0, 3, 4]], [[0, 1, 2, 3, 4, 5, 6]]]
SECOND = [[[5, 6], [6]], [[0, 6]]]


def method(name: str, rows: list[list[list[int]]], answer: str) -> Method:
    kept = [[torch.tensor(head) for head in layer] for layer in rows]
    return Method(name, kept, 64 * sum(len(head) for layer in kept for head in layer), [answer])


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def seen(looking: Browser, tmp_path: Path) -> Iterator[Browser]:
    """The page of two methods, opened; nothing on it may fail or load anything."""
    methods = [method("first & best", FIRST, "<b>41</b>"), method("second", SECOND, "")]
    shown = Shown(
        *("<i>title</i>", "tiny", "float32", 0.3, UNITS, 1, [1, 4], [2, 1], 1344, ["Why <not>?"], ["41\n"], methods)
    )
    path = write(shown, tmp_path / "page.html")
    looking.requests.clear()
    looking.open(path)
    yield looking
    assert looking.requests == [path.as_uri()] and not looking.errors


def texts(page: Browser, selector: str, value: str = "textContent") -> list:
    return page.run(f"[...document.querySelectorAll('{selector}')].map(e => e.{value})")


def shades(page: Browser, selector: str) -> list[float]:
    """Squared, they are shares."""
    return [round(float(x) ** 2, 2) for x in texts(page, selector, "style.getPropertyValue('--s')")]


def cell(number: int, view: int = 0) -> str:
    return f"document.querySelectorAll('.method')[{view}].querySelectorAll('.cell')[{number}]"


def kept(page: Browser) -> list[list[str]]:
    """The pieces that each text marks as kept by the head that is picked."""
    return [
        page.run(f"[...document.querySelectorAll('.text')[{i}].querySelectorAll('.kept')].map(e => e.textContent)")
        for i in range(2)
    ]


def test_text_numbers_and_answers(seen: Browser) -> None:
    text = "".join(piece for piece, _ in UNITS)
    assert texts(seen, ".text") == [text, text] and texts(seen, "h1") == ["<i>title</i>"]
    assert texts(seen, "h2") == ["first & best", "second"] and seen.run("document.querySelectorAll('i, b').length") == 0
    rows = [line.split("\t") for line in texts(seen, "#sizes tr", "innerText")]
    assert rows[1:] == [
        ["full", "21", "100 %", "1.3 KiB", "100 %"],
        ["first & best", "12", "57 %", "0.8 KiB", "57 %"],
        ["second", "5", "24 %", "0.3 KiB", "24 %"],
    ]
    assert texts(seen, "#answers td") == ["Why <not>?", "41\n", "<b>41</b>", "(nothing)"]
    assert "2 layers, 3 KV heads in all; 7 tokens; 30 % of the rows" in texts(seen, "#facts")[0]


def test_shades_are_the_shares(seen: Browser) -> None:
    """Of three heads, and for two tokens in one piece of six rows."""
    first, second = [1, 2 / 3, 1 / 3, 4 / 6, 1 / 3, 1 / 3], [1 / 3, 0, 0, 0, 1 / 3, 1]
    assert shades(seen, ".text span") == pytest.approx([*first, *second], abs=0.006)
    assert shades(seen, ".cell") == pytest.approx([2 / 7, 3 / 7, 1, 2 / 7, 1 / 7, 2 / 7], abs=0.006)
    labels = texts(seen, ".cell", "getAttribute('aria-label')")
    assert labels[1:3] == ["layer 1, head 1: 3 rows, 43 %", "layer 4, head 0: 7 rows, 100 %"]
    colours = texts(seen, ".text span", "computedStyleMap().get('background-color').toString()")
    assert colours[0] == colours[11] != colours[7] and len(set(colours)) == 4


def test_a_click_on_a_head_shows_its_rows(seen: Browser) -> None:
    assert kept(seen) == [[], []]
    seen.click(cell(1))
    assert kept(seen) == [["<s>", "🙂"], [" z"]]  # of a piece of two tokens, any one
    assert texts(seen, "#status") == ["Layer 1, head 1 keeps rows: first & best 3 (43 %), second 1 (14 %)."]
    assert texts(seen, ".cell", "getAttribute('aria-pressed')") == ["false", "true", "false"] * 2
    seen.click(cell(2, 1))
    assert kept(seen) == [[piece for piece, _ in UNITS], ["<s>", " z"]]
    seen.click(cell(2, 1))
    assert kept(seen) == [[], []] and texts(seen, "#all", "getAttribute('aria-pressed')") == ["true"]


def test_keys_go_from_head_to_head(seen: Browser) -> None:
    assert texts(seen, ".cell", "tabIndex") == [0, -1, -1] * 2
    seen.run(f"{cell(0)}.focus()")
    for key, at in (("ArrowDown", 1), ("ArrowRight", 2), ("ArrowRight", 2)):
        seen.press(key)
        assert seen.run(f"document.activeElement === {cell(at)}")
    assert texts(seen, ".cell", "tabIndex") == [-1, -1, 0, 0, -1, -1]
    seen.press("Enter")
    assert kept(seen)[1] == ["<s>", " z"]
    seen.press("Escape")
    assert kept(seen) == [[], []]


def test_numbers_pick_a_head_and_a_token(seen: Browser) -> None:
    def enter(name: str, value: int) -> None:
        field = f"document.getElementById('{name}')"
        seen.run(f"{field}.value = {value}; {field}.onchange({{target: {field}}})")

    enter("layer", 4)
    assert kept(seen) == [[piece for piece, _ in UNITS], ["<s>", " z"]]
    enter("layer", 2)  # which is not evicted
    assert kept(seen)[1] == ["<s>", " z"]
    enter("token", 4)
    assert texts(seen, ".picked") == ["🙂", "🙂"]
    assert texts(seen, "#token", "value") == ["3"]


def test_a_click_on_a_token_marks_the_heads_that_keep_it(seen: Browser) -> None:
    seen.click("document.querySelectorAll('.text')[1].querySelectorAll('span')[3]")
    assert texts(seen, ".cell", "classList.contains('holds')") == [False, True, True, False, False, False]
    assert texts(seen, "#status") == [
        'Tokens 3 to 4, "🙂", is kept by heads: first & best 4 of 6 (67 %), second 0 of 6 (0.0 %).'
    ]
    seen.press("Escape")
    assert texts(seen, ".picked") == [] and texts(seen, ".holds") == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone_and_both_schemes(seen: Browser, tmp_path: Path, dark: bool) -> None:
    seen.open(tmp_path / "page.html", width=360, dark=dark)
    seen.requests.pop()
    assert seen.run("document.documentElement.scrollWidth") <= 360
    tops = texts(seen, ".method", "getBoundingClientRect().top")
    assert tops[0] < tops[1]
    # Luminance of text and of the strongest shade, and of what is dimmed: readable on it, in either scheme.
    seen.click(cell(2))
    ratio = seen.run(
        """(() => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
              .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          const style = (e) => getComputedStyle(document.querySelector(e));
          const page = light(style("body").backgroundColor);
          const shaded = ratio(light(style(".kept").color), light(style(".kept").backgroundColor));
          const gone = document.querySelectorAll(".text")[1].querySelectorAll("span:not(.kept)")[1];
          return [page, shaded, ratio(light(getComputedStyle(gone).color), light(style(".text").backgroundColor))];
        })()"""
    )
    assert (ratio[0] < 0.1) == dark and min(ratio[1:]) >= 4.5
