"""The README's links lead somewhere, and its figures stand in the files that it links."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


FIGURE = r"\d+(?:\.\d+)?"


def percents(value: object) -> set[str]:
    """Every number in a result, as the README would print it: a rate to one decimal, others as they are."""
    if isinstance(value, dict):
        return {p for v in value.values() for p in percents(v)}
    if isinstance(value, list):
        return {p for v in value for p in percents(v)}
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set()
    return {f"{100 * value:.1f}", f"{value:.2f}", f"{value:g}"}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "measured.md"], ids=lambda p: p.name)
def test_measured_figures_stand_in_the_linked_files(page: Path) -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| \[\w+\.json\]\(([^)]+)\) \|$", page.read_text(), re.M)
    assert rows, "there is a table of measured claims"
    for what, measured, link in rows:
        found = json.loads((page.parent / link).read_text(encoding="utf-8"))
        known = percents(found["rows"]) | {"95", "240"}
        # means over seeds and the like are computed with the aims, which explain themselves
        known |= {figure for aim in found["aims"] for figure in re.findall(FIGURE, f"{aim['measured']} {aim['why']}")}
        for figure in re.findall(FIGURE, measured):
            assert figure in known, f"{what}: {figure} is in no row of {link}"
