"""A component folder's README.md, generated from its docstring, its interface and its metadata.yaml.

`PYTHONPATH=. python tests/components/component_readme.py` writes them all; what follows `MARKER` is a person's and is
kept.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import yaml
from docstring_parser import parse
from kfp.dsl.base_component import BaseComponent

import components

ROOT = Path(components.__file__).parent
STEPS = sorted(p.name for p in ROOT.iterdir() if (p / "component.py").is_file())
MARKER = "<!-- custom-content -->"


def component_of(step: str) -> BaseComponent:
    return getattr(importlib.import_module(f"components.{step}"), step)


def generated(step: str) -> str:
    """The part of a README that nobody writes by hand, up to and with the marker."""
    spec = component_of(step).component_spec
    doc = parse(inspect.getdoc(component_of(step).python_func) or "")
    said = {parameter.arg_name: parameter.description or "" for parameter in doc.params}
    if doc.returns is not None:
        said["Output"] = doc.returns.description or ""
    parts = [f"# {step}", (doc.description or "").strip()]
    for title, interface in (("input", spec.inputs), ("output", spec.outputs)):
        if interface:
            rows = [f"| `{name}` | {_kind(entry)} | {_line(said.get(name, ''))} |" for name, entry in interface.items()]
            parts.append("\n".join([f"| {title} | type | what |", "|---|---|---|", *rows]))
    return "\n\n".join([*parts, _about(yaml.safe_load((ROOT / step / "metadata.yaml").read_text())), MARKER]) + "\n"


def _kind(entry) -> str:
    name = entry.type.removeprefix("system.").split("@")[0]
    return f"list of {name}" if entry.is_artifact_list else name


def _line(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").replace("|", "\\|")


def _about(metadata: dict) -> str:
    needs = ", ".join(f"{d['name']} {d['version']}" for d in metadata["dependencies"]["kubeflow"])
    verified = metadata["lastVerified"].date().isoformat()
    tags = ", ".join(metadata["tags"])
    return f"Stability: {metadata['stability']}. Needs Kubeflow {needs}. Tags: {tags}. Last verified: {verified}."


def readme(step: str) -> str:
    """A README as it must be: generated, then what stands behind the marker now."""
    path = ROOT / step / "README.md"
    kept = path.read_text().partition(MARKER)[2] if path.is_file() else ""
    return generated(step).removesuffix("\n") + (kept or "\n")


if __name__ == "__main__":
    for step in sys.argv[1:] or STEPS:
        (ROOT / step / "README.md").write_text(readme(step))
