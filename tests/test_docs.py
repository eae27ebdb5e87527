"""What the READMEs and the docstrings of jobs name exists: files, headings, pictures."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
    page for room in ("raypipe", "jobs", "tests") for page in sorted((ROOT / room).rglob("*.md"))
]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)|<img src=\"([^\"]*)\"")
SCRIPT = re.compile(r"\bjobs/(?:benchmarks/|examples/)?\w+\.py\b")
MODULE = re.compile(r"\b(?:raypipe|tests)/[\w/]+\.\w+\b")


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target, anchor, image in LINK.findall(text):
        if target.startswith("http"):
            continue
        there = page.parent / (target or image) if target or image else page
        assert there.exists(), f"{page.name} links to {target or image}"
        assert not anchor or anchor in headings(there), f"{page.name} links to #{anchor}"
    for name in (*SCRIPT.findall(text), *MODULE.findall(text)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_pictures_are_small():
    for picture in (ROOT / ".github").iterdir():
        assert picture.stat().st_size < 200_000, picture.name


@pytest.mark.parametrize(
    "job", sorted((ROOT / "jobs").rglob("*.py")), ids=lambda job: str(job.relative_to(ROOT))
)
def test_a_job_begins_with_the_commands_that_run_it(job):
    manual = ast.get_docstring(ast.parse(job.read_text())) or ""
    assert f"    python {job.relative_to(ROOT)}" in manual
    for name in SCRIPT.findall(manual):
        assert (ROOT / name).exists(), name
