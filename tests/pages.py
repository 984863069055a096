"""Pages of the documentation, for the tests that read and run them."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def write_named(text: str, language: str) -> None:
    """Write the blocks whose first line is a comment with a file's name."""
    for block in blocks(text, language):
        name = re.match(r"# ([\w/]+\.\w+)\n", block)
        if name:
            Path(name[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(name[1]).write_text(block, encoding="utf-8")
