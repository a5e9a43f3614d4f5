"""Artifacts between steps: small JSON cards that name a product folder on the shared workspace volume.

Weights and datasets never travel through the pipeline's object store. An artifact's file is a card
`{"folder", "digest", "facts"}` (and `"name"`, for a teacher), and its metadata carries the same for the UI.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kfp import dsl

from danceopd.errors import UserError
from danceopd.files import read_json, write_json
from danceopd.workspace import Product, open_product

PATH_FACTS = ("dataset", "pipeline", "report")


def write_card(artifact: dsl.Artifact, product: Product, name: str = "") -> None:
    """Make `artifact` stand for a product: its file becomes the card, its metadata says the same.

    Args:
        artifact: a component's output.
        product: what the step made.
        name: what the recipe calls it, where there are several of a kind (teachers).
    """
    card = {"folder": str(product.folder), "digest": product.digest, "facts": product.facts, "name": name}
    write_json(Path(artifact.path), card)
    # The backend's metadata store knows neither null nor lists, so the facts travel as text there.
    artifact.metadata.update(card | {"facts": json.dumps(product.facts, sort_keys=True)})


def read_card(artifact: dsl.Artifact) -> Product:
    """The product behind a card.

    Raises:
        UserError: if the folder, or a file it speaks of, is gone, or now holds another product.
    """
    card = read_json(Path(artifact.path))
    problem = card_problem(card["folder"], card["digest"])
    if problem:
        raise UserError(f"{problem}; run again with --fresh (on a cluster: with caching off)")
    return open_product(Path(card["folder"]))


def read_cards(artifacts: Iterable[dsl.Artifact]) -> dict[str, Product]:
    """Products by the name on their cards.

    Raises:
        UserError: as `read_card` does.
    """
    artifacts = list(artifacts)
    return {read_json(Path(a.path))["name"]: read_card(a) for a in artifacts}


def card_problem(folder: str, digest: str) -> str | None:
    """Why a card can no longer be trusted, or None if its product still lies there."""
    try:
        product = open_product(Path(folder))
    except UserError:
        return f"{folder}: the product a card names is gone"
    if product.digest != digest:
        return f"{folder}: holds another product than the one its card names"
    for fact in PATH_FACTS:
        path = product.folder / product.facts.get(fact, "")
        if not path.exists():
            return f"{path}: the {fact} that {folder} names is gone"
    return None


def publish_evaluation(product: Product, report: dsl.HTML, notes: dsl.Markdown, figures: dsl.Metrics) -> None:
    """Copy an evaluation's reports into their artifacts and log the figures its gates look at."""
    shutil.copyfile(product.folder / "report.html", report.path)
    shutil.copyfile(product.folder / "report.md", notes.path)
    values = gate_figures(read_json(product.folder / "metrics.json"))
    for name, value in values.items():
        figures.log_metric(name, value)
    write_json(Path(figures.path), values)  # kfp takes a cached output without a file for a lost one


def _plain(name: str) -> str:
    """A metric's name as MLflow takes it, where Kubeflow's own plugin copies figures."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def gate_figures(metrics: dict[str, Any]) -> dict[str, float]:
    """What the gates saw: the student's figure and its limit for every gate, and whether all hold (1 or 0).

    A figure that could not be told is left out.
    """
    figures: dict[str, float] = {}
    for gate in metrics["gates"]:
        name = f"{gate['task']} {gate['metric']}"
        figures |= {_plain(name): gate["value"], _plain(f"{name} limit {gate['rule']}"): gate["limit"]}
    return {name: value for name, value in figures.items() if value is not None} | {"passed": float(metrics["passed"])}
