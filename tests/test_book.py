"""The committed book: renders without a warning, has no broken link, and its generated pages are current."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

from tokenbook import pages
from tokenbook.pages.contents import parts
from tokenbook.pages.material import gather
from tokenbook.papers import project_root

ROOT = project_root(Path(__file__).parent)


@pytest.fixture(scope="module")
def html(book_html) -> Path:
    """The folder of the rendered book."""
    return book_html


@pytest.fixture(scope="module")
def documents(html) -> dict[Path, BeautifulSoup]:
    """Every rendered page, parsed."""
    found = {
        path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in sorted(html.rglob("*.html"))
    }
    return {path: soup for path, soup in found.items() if "_static" not in path.parts}


def test_generated_pages_are_current():
    assert pages.stale(ROOT) == [], "run `python -m tokenbook.pages` and commit what it writes"


def test_contents_name_every_chapter_and_every_page_exists():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    named = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    assert len(named) == len(set(named))
    in_toc = {name for name in named if name.startswith("notebooks/")}
    assert in_toc == {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    for name in [toc["root"], *named]:
        assert any((ROOT / f"{name}{suffix}").is_file() for suffix in (".md", ".ipynb")), name


def test_no_page_in_the_book_folder_is_forgotten():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    named = {toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])}
    with_chapters = {chapter.paper.part for chapter in pages.chapters(ROOT)}
    waiting = {part["page"] for part in parts(ROOT) if part["title"] not in with_chapters}
    for path in sorted((ROOT / "book").rglob("*.md")):
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        waits = path.parent.name == "parts" and path.stem in waiting
        assert name in named or waits, f"{name} is in no table of contents"


def test_every_page_of_the_contents_was_rendered(html):
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    for name in [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]:
        assert (html / f"{name}.html").is_file()


def test_no_internal_link_is_broken(html, documents):
    broken, checked = [], 0
    anchors = {path: {tag["id"] for tag in soup.find_all(id=True)} for path, soup in documents.items()}
    for path, soup in documents.items():
        for tag, attribute in [("a", "href"), ("img", "src"), ("script", "src"), ("link", "href")]:
            for element in soup.find_all(tag, **{attribute: True}):
                link = urlsplit(element[attribute])
                if link.scheme or link.netloc or element[attribute] in ("", "#"):
                    continue
                target = (path.parent / unquote(link.path)).resolve() if link.path else path
                checked += 1
                fragment = unquote(link.fragment)
                gone = fragment and target in anchors and fragment not in anchors[target]
                if not target.is_file() or gone:
                    broken.append(f"{path.relative_to(html)}: {element[attribute]}")
    assert broken == []
    assert checked > 100


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    inside = [link for link in links if not urlsplit(link).scheme]
    assert len(inside) >= 4
    assert [link for link in inside if not (ROOT / link).is_file()] == []


def test_every_image_has_alternative_text(html, documents):
    images = [(path, image) for path, soup in documents.items() for image in soup.find_all("img")]
    assert images
    bare = [
        f"{path.relative_to(html)}: {image.get('src', '')[:60]}"
        for path, image in images
        if not image.get("alt")
    ]
    assert bare == []


def test_no_formula_is_left_as_text_and_no_text_taken_for_a_formula(html, documents):
    """Where text is taken for a formula, the formulas in that text are left as text."""
    left = []
    for path, soup in documents.items():
        for text in (soup.article or soup).find_all(string=re.compile(r"\\[a-zA-Z]{2,}|\$\$")):
            is_code = text.find_parent(["code", "pre", "script", "style"])
            if not is_code and not text.find_parent(class_="math"):
                left.append(f"{path.relative_to(html)}: {text.strip()[:60]}")
    assert left == []


def test_reading_needs_no_network(html, documents):
    """Scripts, styles, fonts and images all come from the book's own folder."""
    outside = []
    for path, soup in documents.items():
        for element in soup.find_all(["script", "img", "link", "iframe"]):
            address = element.get("src") or (element.get("href") if element.name == "link" else "") or ""
            if urlsplit(address).netloc:
                outside.append(f"{path.relative_to(html)}: {address}")
    assert outside == []


def test_chapters_offer_their_notebook_for_download(html, documents):
    for chapter in pages.chapters(ROOT):
        path = html / "notebooks" / f"{chapter.name}.html"
        links = [a["href"] for a in documents[path].find_all("a", href=True) if a["href"].endswith(".ipynb")]
        assert any((path.parent / link).resolve().is_file() for link in links), chapter.name


def test_committed_verdicts_were_judged_by_the_thresholds_that_stand_in_the_paper_file():
    for material in gather(ROOT):
        assert material.ledger, f"notebooks/{material.chapter.name}.ipynb holds no ledger: execute it"
        claims = {claim.id: claim for claim in material.chapter.paper.claims}
        assert [row["claim"] for row in material.claims] == list(claims)
        for row in material.claims:
            for criterion in row["criteria"]:
                stands = {c.id: str(c) for c in claims[row["claim"]].criteria}
                assert criterion["threshold"] == stands.get(criterion["id"]), (
                    material.chapter.name,
                    row["claim"],
                )


def test_every_paper_is_in_the_references(documents, html):
    bibliography = (ROOT / "book" / "references.bib").read_text("utf-8")
    for chapter in pages.chapters(ROOT):
        assert f"{{{chapter.paper.bibtex}," in bibliography, chapter.name
