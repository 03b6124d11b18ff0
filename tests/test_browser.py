"""The report in a real browser: Chromium, driven by Playwright, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from run_folders import finished_run
from ws.report import page, several_runs

playwright = pytest.importorskip("playwright.sync_api", reason="the browser extra is not installed: no Playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (on Debian: apt-get install chromium)"),
]

HOSTILE = (
    "</style></script><script>window.broken=1</script><img src=x onerror='window.broken=1'>\"'>"
    "<svg onload=window.broken=1>"
    "[a](javascript:window.broken=1) `x` | \u202e <a href='javascript:window.broken=1'>a</a> " + "w" * 300
)
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every text is hostile."""
    story = finished_run(tmp_path_factory.mktemp("runs") / "small" / "sycophancy" / "lora" / "seed0", text=HOSTILE)
    page.write(story)
    return story.folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser: Any, file: Path, said: list[str] | None = None, **options: Any) -> Iterator[Any]:
    """The page in a fresh window; `said` collects console messages, errors, and requests for anything else."""
    context = browser.new_context(**{"viewport": DESK, **options})
    tab = context.new_page()
    told = [] if said is None else said
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or told.append(request.url))
    try:
        tab.goto(file.as_uri())
        yield tab
    finally:
        context.close()


def test_hostile_texts_do_nothing_and_the_console_is_silent(browser: Any, run: Path) -> None:
    said: list[str] = []
    with opened(browser, run, said) as tab:
        for summary in tab.locator("details > summary").all():
            if summary.is_visible():
                summary.click()
        tab.wait_for_timeout(100)
        assert tab.evaluate("window.broken") is None
        assert tab.locator("article img, article a, article script, td img, td a").count() == 0
        assert tab.locator("article.sample p").first.inner_text().startswith("</style></script><script>")
    assert said == []


def test_the_policy_of_the_page_stops_scripts_that_are_not_its_own(browser: Any, run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    text = run.read_text(encoding="utf-8")
    broken.write_text(text.replace("</main>", "<script>window.broken=1</script></main>"), encoding="utf-8")
    with opened(browser, broken) as tab:
        assert tab.evaluate("window.broken") is None
        assert tab.locator("th button").count() > 0, "the page's own script runs"


def test_every_chart_is_drawn_and_tells_its_values(browser: Any, run: Path) -> None:
    with opened(browser, run) as tab:
        drawn = tab.locator("figure.chart:visible")
        assert drawn.count() >= 8
        for one in drawn.all():
            picture = one.locator("svg[role=img], table").first
            box = picture.bounding_box()
            assert box["width"] > 150 and box["height"] > 50
        for picture in tab.locator("svg[role=img]").all():
            assert picture.get_attribute("aria-label") and picture.locator("desc").text_content()
        dot = tab.locator(".panel:visible svg.lead circle.dot").last
        dot.hover(force=True)
        assert tab.locator(".tip").inner_text().count("alpha") == 1


def test_a_probe_is_picked_by_mouse_and_keyboard(browser: Any, run: Path) -> None:
    with opened(browser, run) as tab:
        group = tab.locator("fieldset.tabs").first
        assert group.locator(".panel:visible").count() == 1
        group.get_by_text("dilemmas", exact=True).first.click()
        assert "dilemmas, held out" in group.locator(".panel:visible").inner_text()
        tab.keyboard.press("ArrowRight")
        assert "other behaviours" in group.locator(".panel:visible").inner_text()


def test_tables_sort_by_number_both_ways_and_back(browser: Any, run: Path) -> None:
    with opened(browser, run) as tab:
        table = tab.locator(".wide > table", has=tab.locator("th", has_text="KL, mean"))
        column = [head.inner_text().strip("↕↑↓ ") for head in table.locator("th").all()].index("alpha")

        def shown() -> list[str]:
            return [row.locator("td").nth(column).inner_text() for row in table.locator("tbody tr").all()]

        before = shown()
        button = table.locator("th button").nth(column)
        orders = []
        for _ in range(3):
            button.click()
            orders.append((table.locator("th").nth(column).get_attribute("aria-sort"), shown()))
        ascending = sorted(before, key=float)
        assert orders == [("ascending", ascending), ("descending", ascending[::-1]), (None, before)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_axe_finds_no_violation(browser: Any, run: Path, scheme: str, size: dict[str, int]) -> None:
    """Contrast, names, roles and order, by axe-core, in both themes."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-playwright-python").Axe()
    with opened(browser, run, color_scheme=scheme, viewport=size) as tab:
        assert tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
        for tabs in range(tab.locator("fieldset.tabs").first.locator("label").count()):
            tab.locator("fieldset.tabs").first.locator("label").nth(tabs).click()
            found = axe.run(tab)
            told = {one["id"]: [node["html"][:150] for node in one["nodes"]] for one in found.response["violations"]}
            assert told == {}


def test_dark_pages_are_dark(browser: Any, run: Path) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        with opened(browser, run, color_scheme=scheme) as tab:
            shade = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            shades[scheme] = sum(int(part) for part in shade[4:-1].split(","))
    assert shades["light"] > 700 and shades["dark"] < 120


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_page_does_not_scroll_sideways(browser: Any, run: Path, width: int) -> None:
    with opened(browser, run, viewport={"width": width, "height": 800}) as tab:
        for label in tab.locator("fieldset.tabs label").all():
            label.click()
            assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_without_scripts_everything_can_be_read(browser: Any, run: Path) -> None:
    with opened(browser, run, java_script_enabled=False) as tab:
        assert tab.locator("figure.chart svg").first.is_visible()
        assert tab.locator("th button").count() == 0, "nothing promises what does not work"
        group = tab.locator("fieldset.tabs").first
        group.get_by_text("side effects", exact=True).first.click()
        assert "KL to the base" in group.locator(".panel:visible").inner_text()
        assert tab.locator("circle title").first.text_content()


def test_on_paper_all_panels_are_shown_and_the_page_is_light(browser: Any, run: Path) -> None:
    with opened(browser, run, color_scheme="dark") as tab:
        tab.emulate_media(media="print", color_scheme="dark")
        group = tab.locator("fieldset.tabs").first
        assert group.locator(".panel:visible").count() == group.locator(".panel").count() > 2
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not tab.locator("nav").is_visible()
        assert len(tab.pdf(format="A4")) > 10_000


def test_runs_side_by_side_pass_the_same_checks(browser: Any, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-playwright-python").Axe()
    stories = [finished_run(tmp_path / name / "sycophancy" / "lora" / "seed0", name, HOSTILE) for name in ("a", "b")]
    said: list[str] = []
    with opened(browser, several_runs.write(stories), said, viewport=PHONE) as tab:
        assert axe.run(tab).response["violations"] == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert tab.locator("figure.chart:visible").count() >= 3
    assert said == []
