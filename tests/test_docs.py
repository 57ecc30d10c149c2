"""The documentation: its code runs, its scenarios are valid, its links and the functions it names exist."""

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from gmel.scenario.load import parse_scenario

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
NAMED = re.compile(r"`(gmel(?:\.\w+)+):(\w+(?:\.\w+)*)`")


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(text_of(page)) if kind == language]


def prose(page: Path) -> str:
    return BLOCK.sub("", text_of(page))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page run one after the other and share their names, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", pages_with("toml"), ids=lambda page: page.name)
def test_scenarios_are_valid(page: Path) -> None:
    for code in blocks(page, "toml"):
        if "[devices]" in code:
            parse_scenario(code, page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_somewhere(page: Path) -> None:
    dead: list[str] = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_that_are_named_exist(page: Path) -> None:
    """A name stands as `module:function`; attributes may follow after a dot."""
    for module, path in NAMED.findall(text_of(page)):
        found: object = importlib.import_module(module)
        for part in path.split("."):
            assert hasattr(found, part), f"{module}:{path}"
            found = getattr(found, part)


def test_the_checks_find_something() -> None:
    page = ROOT / "docs" / "model.md"
    assert len(NAMED.findall(text_of(page))) > 20
    assert "documented-choices" in anchors(page)
    assert {"environment.md", "traces.md"} <= {page.name for page in pages_with("python")}
    assert "presets.md" in {page.name for page in pages_with("toml")}
