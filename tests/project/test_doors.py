"""What a newcomer reads first is true: the README's tree, links, and the pages around it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "danceopd"
DOORS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "LICENSE")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def tree_paths(text: str) -> list[str]:
    """Paths of an indented tree: names, then two spaces and what they are; folders end in a slash and may go deeper."""
    paths, parents = [], []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split()
        paths += ["".join([*parents[:depth], name]) for name in names]
        parents = [*parents[:depth], names[-1]]
    return paths


def readme_tree() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Where things are\n")[1]
    return tree_paths(re.search(r"```\n(.*?)```", section, flags=re.DOTALL)[1])


def test_the_reader_of_trees_reads_one():
    text = "a/   first\n  b.py c.py   two\n  d/  deep\n    e/   deeper\nf/  next\n"
    assert tree_paths(text) == ["a/", "a/b.py", "a/c.py", "a/d/", "a/d/e/", "f/"]


def test_every_path_of_the_tree_exists():
    paths = readme_tree()
    assert len(paths) > 30
    wrong = [path for path in paths if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()]
    assert not wrong


def test_every_room_is_in_the_tree():
    paths = {path.rstrip("/") for path in readme_tree()}
    rooms = {path.relative_to(ROOT).as_posix() for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    files = {f"danceopd/{path.name}" for path in PACKAGE.glob("[a-z]*.py")}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout")
    top = {name.split("/")[0] for name in done.stdout.splitlines() if "/" in name and not name.startswith(".")}
    assert not (rooms | files | top) - paths


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = page.parent / path if path else page
        if not there.exists() or (anchor and anchor not in slugs(there.read_text())):
            broken.append(target)
    return broken


@every_page
def test_links_lead_somewhere(page):
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One title\n[a](page.md#one-title) [b](#other) [c](none.md) [d](https://example.com)")
    assert broken_links(page) == ["#other", "none.md"]


def missing_paths(text: str) -> list[str]:
    """Paths of this repository that a text names in backticks and that do not exist."""
    named = re.findall(r"`((?:danceopd|components|pipelines|tests|docs|examples|benchmarks|manifests)/[\w./-]*)`", text)
    return [path for path in named if not (ROOT / path).exists()]


@every_page
def test_paths_in_the_text_exist(page):
    text = page.read_text()
    assert not missing_paths(re.sub(r"`[^`]*NAME[^`]*`", "", text))
    assert missing_paths("see `danceopd/no_such_file.py`")


def test_the_doors_are_there_and_agree():
    for name in DOORS:
        assert (ROOT / name).is_file(), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_contributing_names_targets_that_exist():
    targets = re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"unit", "test", "docs"} <= set(targets) <= set(rules)


# A native reader reads these twice: it is "depends on", and "per sample".
TWICE = re.compile(
    r"\bhangs? on\b|\b(forwards?|records|tokens|gates) an? (sample|task|step|update|optimizer step|prompt)\b"
)


@pytest.mark.parametrize("room", ["README.md", "docs", "danceopd"])
def test_english_that_a_reader_takes_in_at_once(room):
    found = []
    for path in [ROOT / room] if (ROOT / room).is_file() else sorted((ROOT / room).rglob("*")):
        if path.suffix not in (".md", ".py", ".yaml", ".j2"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if TWICE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def site() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def nav_pages(entries: list) -> list[str]:
    pages: list[str] = []
    for entry in entries:
        inside = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages += nav_pages(inside) if isinstance(inside, list) else [inside]
    return pages


def test_every_page_is_in_the_sites_navigation_once():
    pages = nav_pages(site()["nav"])
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages) == sorted(there)


def test_every_module_has_an_api_page_that_shows_all_of_it():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    pages = {path.stem: path for path in (ROOT / "docs" / "api").glob("*.md") if path.stem != "index"}
    assert set(pages) == {room for room in rooms if not room.startswith("__")}
    for room, path in pages.items():
        assert f"\n::: danceopd.{room}\n" in path.read_text()
    assert site()["plugins"][1]["mkdocstrings"]["handlers"]["python"]["options"]["show_submodules"] is True


def test_the_python_page_names_the_front_door():
    import danceopd

    text = (ROOT / "docs" / "api" / "index.md").read_text()
    assert not [name for name in danceopd.__all__ if f"`{name}`" not in text and name != "__version__"]


def test_a_link_that_leads_nowhere_fails_the_site():
    assert site()["strict"] is True
    assert set(site()["validation"]["links"].values()) == {"warn"}
