"""The report as a reader meets it: in a real browser, from a file, wide and narrow, light and dark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from endcap.report import build
from endcap.report.page import SECTIONS
from tests.browser import Browser, find_chromium
from tests.run_folder import make_run_folder

SMALLEST_FONT_PX = 9


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no chromium on this machine, and CI may not skip: install the Debian package chromium")
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run_folder(tmp_path_factory.mktemp("run") / "demo", rate=130.0)
    assert build(folder).ok
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_reads_well(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.messages.clear()
    browser.requests.clear()
    browser.open(report.as_uri(), width=width, dark=dark)
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    assert browser.messages == []
    assert browser.requests == [report.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # Boxes of their own may scroll inside (tables, the row of links); nothing else may be cut off at the side.
    assert browser.evaluate(_OUTSIDE) == []
    assert browser.evaluate(_SMALLEST_FONT) >= SMALLEST_FONT_PX
    assert browser.evaluate(_OVERLAPPING_LABELS) == []
    for section, _ in SECTIONS:
        assert browser.evaluate(f"document.getElementById('{section}').getBoundingClientRect().height") > 40


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_stand_out_from_their_ground(browser: Browser, report: Path, dark: bool) -> None:
    browser.open(report.as_uri(), width=1280, dark=dark)
    assert browser.evaluate(_LOW_CONTRAST) == []


def test_a_run_stopped_halfway_opens_without_a_complaint(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "demo"}')
    assert not build(tmp_path).ok
    browser.messages.clear()
    browser.open((tmp_path / "report.html").as_uri(), width=390)
    assert browser.messages == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_file_of_30000_requests_stays_small(report: Path) -> None:
    assert report.stat().st_size < 2_000_000


_OUTSIDE = """
[...document.querySelectorAll('main *, header *')].filter(element => {
  if (element.closest('.scroll, nav, svg, pre')) return false;
  const box = element.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(element => element.outerHTML.slice(0, 120))
"""
_SMALLEST_FONT = """
Math.min(...[...document.querySelectorAll('body *')]
  .filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
  .filter(element => element.getClientRects().length)
  .map(element => parseFloat(getComputedStyle(element).fontSize)))
"""
# Labels of one plot or axis that touch cannot be read.
_OVERLAPPING_LABELS = """
[...document.querySelectorAll('.chart .x, .chart .y, .chart .plot, .rows .axis, .lane')].flatMap(axis => {
  const labels = [...axis.querySelectorAll('span')].filter(label => !label.matches('.more'));
  const boxes = labels.map(label => label.getBoundingClientRect()).filter(box => box.width > 0);
  return boxes.flatMap((a, i) => boxes.slice(i + 1)
    .filter(b => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
    .map(() => axis.parentElement.textContent.slice(0, 80)));
})
"""
# WCAG 2.2, 1.4.3: 4.5 to 1 for words, on the ground that is painted behind them.
_LOW_CONTRAST = """
(() => {
  const parse = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * x + .7152 * y + .0722 * z;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const painted = getComputedStyle(e).backgroundColor, colour = parse(painted);
      if (painted.startsWith('rgb') && (colour.length < 4 || colour[3] === 1)) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('body *')]
    .filter(e => [...e.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
    .filter(e => e.getClientRects().length)
    .map(e => {
      const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
      return [(a + .05) / (b + .05), e.textContent.trim().slice(0, 40)];
    })
    .filter(([ratio]) => ratio < 4.5);
})()
"""
