"""pyproject.toml, constraints.txt and what a wheel carries agree with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Version]:
    """constraints.txt as {canonical name: version}; every line must be an exact pin."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, sign, version = line.partition("==")
        assert sign and re.fullmatch(r"[A-Za-z0-9._-]+", name), f"not an exact pin: {line!r}"
        assert canonicalize_name(name) not in found, f"pinned twice: {name}"
        found[canonicalize_name(name)] = Version(version)
    return found


def declared() -> list[Requirement]:
    return [Requirement(r) for r in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]


@pytest.mark.parametrize("requirement", declared(), ids=lambda r: r.name)
def test_the_pin_is_in_the_declared_range(requirement):
    assert requirement.specifier, f"{requirement.name}: declare a range"
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"


def test_no_pin_depends_on_one_machine():
    assert not [name for name, version in pins().items() if version.local], "local version tags, such as +cpu"
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"(@|file:|https?:|--)", "\n".join(x for x in text.splitlines() if not x.startswith("#")))


# What a build of torch for an accelerator brings with it; other builds bring none or others.
ACCELERATOR = ("nvidia-", "cuda-", "triton")


def test_the_pins_are_closed():
    """Whatever is installed because of us is pinned."""
    locked = pins()
    todo, seen, loose = declared(), set(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, *sorted(requirement.extras))
        if key in seen or name.startswith(ACCELERATOR):
            continue
        seen.add(key)
        if name not in locked:
            loose.add(name)
        try:
            wanted = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        for child in map(Requirement, wanted):
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                todo.append(child)
    assert not loose, f"add to constraints.txt: {sorted(loose)}"


def test_the_pins_fit_each_other():
    """No pinned package asks for a version of another that is not the pinned one."""
    locked = pins()
    clashes = []
    for name in locked:
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if metadata.version(name).partition("+")[0] != str(locked[name]):
            continue  # someone tries another version: what that one asks for is not ours
        for requirement in map(Requirement, wanted):
            pin = locked.get(canonicalize_name(requirement.name))
            asked = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if pin and asked and not requirement.specifier.contains(pin, prereleases=True):
                clashes.append(f"{name} asks for {requirement}, pinned is {pin}")
    assert not clashes


def test_the_declared_python_is_the_one_ruff_checks_for():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert tools["ruff"]["target-version"] == "py" + lowest.replace(".", "")


def test_the_version_is_said_once_more_and_the_same():
    from danceopd import __version__

    assert PROJECT["version"] == __version__


def test_every_package_tells_that_it_is_typed():
    """PEP 561: else whoever imports them gets no types."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    for name in tools["mypy"]["packages"]:
        assert (ROOT / name / "py.typed").is_file()
    assert {name.rstrip("*") for name in tools["setuptools"]["packages"]["find"]["include"]} == set(
        tools["mypy"]["packages"]
    )


def test_no_module_of_ours_is_left_out_of_the_type_check():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"] and not {"ignore_errors", "ignore_missing_imports", "exclude"} & set(settings)
    named = {module.partition(".")[0] for each in settings["overrides"] for module in each["module"]}
    assert not named & set(settings["packages"])


ENTRIES = PROJECT["scripts"] | PROJECT["entry-points"]["danceopd.commands"]


@pytest.mark.parametrize("target", ENTRIES.values(), ids=ENTRIES)
def test_the_commands_exist(target):
    entry = metadata.EntryPoint("x", target, "x")
    assert callable(entry.load())


@pytest.mark.slow
def test_a_wheel_carries_every_file_of_the_packages(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    packages = ("danceopd", "components", "pipelines")
    for name in packages:
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run([*command, "-w", str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    carried = set(zipfile.ZipFile(next(tmp_path.glob("danceopd-*.whl"))).namelist())
    present = {p.relative_to(source).as_posix() for n in packages for p in (source / n).rglob("*") if p.is_file()}
    assert present <= carried, f"left out of the wheel: {sorted(present - carried)}"
    strange = {name.split("/")[0] for name in carried} - {*packages, f"danceopd-{PROJECT['version']}.dist-info"}
    assert not strange, f"packages of other names in the wheel: {strange}"
