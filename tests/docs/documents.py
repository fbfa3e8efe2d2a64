"""The documents that people read, and their parts: code blocks, inline code, links, headings."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", CHANGELOG, *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page: Path) -> str:
    """How a test calls a page."""
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    """A page's text; of the changelog, without the cells that say how things were called before."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^( *)\|[^|]*`moe_ray\.[^|]*\|", r"\1| |", text, flags=re.M) if page == CHANGELOG else text


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.M | re.S)


def inline(page: Path) -> list[str]:
    """What stands between backticks outside of code blocks."""
    prose = re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def links(page: Path) -> list[str]:
    """The targets of all links that lead into the repository."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", read(page)) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
