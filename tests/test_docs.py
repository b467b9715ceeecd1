"""Every block of the pages in docs/ is run, as docs/README.md says; every link leads somewhere."""

import re
from pathlib import Path

import pytest
from docblocks import ROOT, blocks, lacking, matches, run_block

from kvmpy.probe import Finding

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
MEASURES = "8-exit-costs"  # which takes as long as four other pages


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.stem == MEASURES else [])
        for page in PAGES
    ],
    ids=lambda page: page.stem,
)
def test_the_blocks_of_a_page(page: Path, tmp_path: Path) -> None:
    """In their order and in one directory, as a reader would type them."""
    not_here = []
    for block in blocks(page):
        if reason := lacking(block):
            not_here.append(f"line {block.line}: {reason}")
            continue
        try:
            run_block(block, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"docs/{page.name}:{block.line}: {error}") from error
    if not_here:
        pytest.skip("all but these were run: " + "; ".join(not_here))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (DOCS / target).exists(), f"{page.name}: no {target}"


def test_the_index_has_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        ("a\n", "a\n", True),
        ("a\n", "b\n", False),
        ("a\n", "a\nb\n", False),
        ("a\n  ...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nd\n", True),
        ("a ...\n", "a b c\n", True),
        ("a ...\n", "b c\n", False),
        ("and so on ...\n", "and so on ...\n", True),
        ("   0.000106  halt  1.2 us\n", "  10.5  halt  900 ns\n", True),
        ("   0.000106  halt  1.2 us\n", "  10.5  port  900 ns\n", False),
        ("3 ms   84.3 %  in\n", "12.5 s  8 %  in\n", True),
        ("21 exits\n", "22 exits\n", False),
        ("21 exits in 3 us\n", "22 exits in 3 us\n", False),
        ("(.*)\n", "abc\n", False),
        ("   12  00007c18  lgdt\n", "  345  00007c18  lgdt\n", True),
        ("   12  00007c18  lgdt\n", "   12  00007c19  lgdt\n", False),
        ("a  b\n", "a b\n", True),
        ("SDM Vol.3 3.4.5\n", "SDM Vol.3 3.4.6\n", False),
    ],
)
def test_what_matches(expected: str, found: str, same: bool) -> None:
    assert matches(expected, found) is same


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```console\n$ echo one\ntwo\n```\n", "echo one"),
        ("```python\nraise ValueError(7)\n```\n", "ValueError: 7"),
        ("```python\nimport sys; sys.exit(3)\n```\n", "status 3"),
        ("```asm\n        mov al, 'never so in a guest'\n```\n", "no shipped guest has the line"),
        ("```perl\n1\n```\n", "nothing tests a block of perl"),
        ("```python\n```\n```\n", "a stray fence"),
    ],
)
def test_what_is_not_so_is_found(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=words):
        for block in blocks(tmp_path / "page.md"):
            run_block(block, tmp_path)


def test_guests_and_scripts_of_a_page_are_kept(tmp_path: Path) -> None:
    page = "```asm\n# one - a guest\n        hlt\n```\n```python\n# two.py - a script\n1 / 0\n```\n"
    (tmp_path / "page.md").write_text(page)
    for block in blocks(tmp_path / "page.md"):
        run_block(block, tmp_path)
    assert (tmp_path / "one.S").read_text() == "# one - a guest\n        hlt\n"
    assert (tmp_path / "two.py").read_text() == "# two.py - a script\n1 / 0\n"


def test_what_a_host_lacks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- needs: single-step, vmcall -->\n```python\n1\n```\n")
    (block,) = blocks(tmp_path / "page.md")
    assert block.needs == ("single-step", "vmcall")
    found = {"single-step": ("yes", "fine"), "vmcall": ("no", "not here")}
    monkeypatch.setattr("docblocks.probe", lambda name: Finding(name, *found[name]))
    assert lacking(block) == "not here"
