"""The book in a real browser: landing page, filter, search, dark mode, download, keyboard, phone."""

import functools
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sample_book
import yaml

from tokenbook import pages

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: nothing to open the book with"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def _serve(folder: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Address of a small book with two chapters and all four verdicts."""
    root = sample_book.make(tmp_path_factory.mktemp("sample") / "project")
    server, address = _serve(pages.render(root).parent)
    yield address
    server.shutdown()


@pytest.fixture(scope="module")
def book(book_html):
    """Address of the committed book."""
    server, address = _serve(book_html)
    yield address
    server.shutdown()


@pytest.fixture
def open_page(browser):
    """Opens an address in a page of its own; fails on errors in its scripts and on requests to elsewhere."""
    contexts, problems = [], []

    def opened(address: str, viewport=DESKTOP, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(f"{address}: {error}"))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("http://127.0.0.1:", "data:", "blob:"))
                else problems.append(request.url)
            ),
        )
        page.goto(address, wait_until="load")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def _title(page) -> str:
    return page.get_by_role("heading", level=1).inner_text()


def _shown(page) -> list[str]:
    return [
        row.inner_text().split()[0]
        for row in page.locator("#the-scoreboard .as-cards tbody tr:visible").all()
    ]


def test_the_first_page_says_what_this_is_and_leads_on(book, open_page):
    page = open_page(f"{book}/index.html")
    page.wait_for_url("**/book/index.html")
    assert _title(page).startswith("Tokenbook")
    figure = page.locator("img.idea:visible")
    assert figure.count() == 1
    assert figure.evaluate("image => image.complete && image.naturalWidth > 0")
    page.locator("article").get_by_role("link", name="the scoreboard").click()
    assert _title(page).startswith("The scoreboard")


def test_the_filter_narrows_the_claims_by_verdict_and_by_word(sample, open_page):
    page = open_page(f"{sample}/book/scoreboard.html")
    assert _shown(page) == ["P1", "P2", "P3", "P4"] * 2
    assert page.get_by_role("status").inner_text() == "8 of 8 claims shown"
    for verdict in ("reproduced", "direction only", "untested"):
        page.get_by_role("checkbox", name=f"{verdict} (2)", exact=True).uncheck()
    assert _shown(page) == ["P3", "P3"]
    page.get_by_role("searchbox", name="Words in the claim").fill("second splicing")
    assert _shown(page) == ["P3"]
    assert page.get_by_role("status").inner_text() == "1 of 8 claims shown"
    assert not page.get_by_role("heading", name="The first paper").is_visible()
    page.get_by_role("searchbox", name="Words in the claim").fill("")
    assert _shown(page) == ["P3", "P3"]


def test_the_scoreboard_is_whole_without_scripts(sample, open_page):
    page = open_page(f"{sample}/book/scoreboard.html", java_script_enabled=False)
    assert page.locator("#the-scoreboard td .verdict:visible").count() == 8
    assert page.locator(".scoreboard-filter").count() == 0


def test_the_filter_works_by_keyboard_alone_and_shows_where_it_is(sample, open_page):
    page = open_page(f"{sample}/book/scoreboard.html")
    page.get_by_role("searchbox", name="Words in the claim").focus()
    page.keyboard.type("people")
    assert _shown(page) == ["P4", "P4"]
    page.keyboard.press("Tab")
    focused = page.evaluate(
        "() => [document.activeElement.value, getComputedStyle(document.activeElement).outlineStyle]"
    )
    assert focused[0] == "reproduced"
    assert focused[1] != "none"
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert _shown(page) == []


def test_a_table_that_scrolls_sideways_can_be_scrolled_by_keyboard(sample, open_page):
    page = open_page(f"{sample}/notebooks/first.html", viewport={"width": 760, "height": 800})
    scrolls, index = page.locator(".ledger-scroll").evaluate(
        "box => { box.firstChild.style.width = '2000px'; reachByKeyboard(box);"
        " return [box.scrollWidth > box.clientWidth, box.tabIndex] }"
    )
    assert scrolls
    assert index == 0


def test_the_first_tab_offers_to_skip_to_the_content(sample, open_page):
    page = open_page(f"{sample}/notebooks/first.html")
    page.keyboard.press("Tab")
    assert "Skip to main content" in page.evaluate("document.activeElement.textContent")


def test_search_finds_a_chapter(sample, open_page):
    page = open_page(f"{sample}/search.html?q=equation")
    hit = page.locator("#search-results a[href*='notebooks/first.html']").first
    hit.wait_for(timeout=15_000)
    hit.click()
    assert _title(page).startswith("Chapter first")


def test_dark_mode_is_switched_by_the_button_and_every_text_stays_legible(sample, open_page):
    page = open_page(f"{sample}/notebooks/first.html", color_scheme="light")
    button = page.locator("button.theme-switch-button:visible").first
    for _ in range(3):
        if page.evaluate("document.documentElement.dataset.theme") == "dark":
            break
        button.click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    for selector in ("article p", "table.ledger td", "table.ledger thead th", ".verdict-not-reproduced"):
        assert _contrast(page, selector) >= 4.5, selector


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_verdicts_have_contrast_in_both_schemes(sample, open_page, scheme):
    page = open_page(f"{sample}/book/scoreboard.html", color_scheme=scheme)
    for verdict in ("reproduced", "direction-only", "not-reproduced", "untested"):
        assert _contrast(page, f"td .verdict-{verdict}") >= 4.5, (scheme, verdict)


def _contrast(page, selector: str) -> float:
    """Contrast ratio by WCAG 2 between an element's text and the first opaque ground below it."""
    return page.locator(selector).first.evaluate(CONTRAST)


CONTRAST = """element => {
  const rgba = css => {
    const values = css.match(/[\\d.]+/g).map(Number);
    return values.length < 4 ? [...values, 1] : values;
  };
  const linear = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const groundOf = node => rgba(getComputedStyle(node).backgroundColor);
  let ground = element;
  while (ground.parentElement && groundOf(ground)[3] < 1) ground = ground.parentElement;
  const below = groundOf(ground)[3] < 1 ? [255, 255, 255] : groundOf(ground);
  const [a, b] = [light(rgba(getComputedStyle(element).color)), light(below)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def test_a_notebook_can_be_downloaded_as_it_was_executed(sample, open_page):
    page = open_page(f"{sample}/notebooks/first.html")
    page.get_by_role("button", name="Download this page").click()
    with page.expect_download() as waiting:
        page.locator("a[href$='first.ipynb']:visible").first.click()
    notebook = json.loads(Path(waiting.value.path()).read_text("utf-8"))
    assert any(
        "application/vnd.tokenbook.claims+json" in str(cell.get("outputs")) for cell in notebook["cells"]
    )


def test_equations_are_set_without_a_network(sample, open_page):
    page = open_page(f"{sample}/notebooks/first.html")
    page.locator("mjx-container svg").first.wait_for(timeout=15_000)


@pytest.mark.parametrize("where", ["book", "sample"])
def test_no_page_is_wider_than_a_phone(request, open_page, where):
    address = request.getfixturevalue(where)
    root = sample_book.ROOT
    names = ["book/scoreboard", "notebooks/first"]
    if where == "book":
        toc = yaml.safe_load((root / "_toc.yml").read_text())
        names = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    for name in names:
        page = open_page(f"{address}/{name}.html", viewport=PHONE)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], f"{name} is {width} pixels wide"
        page.evaluate("window.MathJax?.startup?.promise?.then(() => 0)")
        assert page.evaluate(CUT_OFF) == [], f"{name}: formulas that the line's end cuts off"
        page.context.close()


# Formulas in the text that are wider than their line and cannot be scrolled.
CUT_OFF = """() => [...document.querySelectorAll("article span.math")]
  .filter(span => getComputedStyle(span).overflowX === "hidden" && span.querySelector("svg"))
  .filter(span => {
    const right = element => element.getBoundingClientRect().right;
    return right(span.querySelector("svg")) > right(span) + 2;
  })
  .map(span => span.textContent.slice(0, 60))"""


def test_on_a_phone_each_claim_is_a_card_that_names_its_parts(sample, open_page):
    page = open_page(f"{sample}/book/scoreboard.html", viewport=PHONE)
    cell = page.locator(".as-cards tbody tr").first.locator("td").nth(4)
    assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") == '"Verdict"'
    assert cell.locator(".verdict").bounding_box()["x"] < PHONE["width"] / 2


def test_on_a_phone_all_totals_of_a_chapter_are_seen_without_scrolling(sample, open_page):
    page = open_page(f"{sample}/book/scoreboard.html", viewport=PHONE)
    row = page.locator(".as-totals tbody tr").first
    boxes = [cell.bounding_box() for cell in row.locator("td").all()]
    assert len(boxes) == 6
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] for box in boxes)
    assert len({box["y"] for box in boxes[1:]}) == 1


def test_on_a_phone_the_contents_open_and_lead_to_a_chapter(sample, open_page):
    page = open_page(f"{sample}/book/scoreboard.html", viewport=PHONE)
    page.locator("button.primary-toggle:visible, .primary-toggle:visible").first.click()
    link = page.get_by_role("link", name="Chapter second").first
    link.click()
    assert _title(page).startswith("Chapter second")
