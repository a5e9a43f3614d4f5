"""Cards: small files that stand for product folders, and what happens when the folder is not what the card says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from kfp import dsl

from components.cards import card_problem, gate_figures, publish_evaluation, read_card, read_cards, write_card
from danceopd.errors import UserError
from danceopd.files import write_json
from danceopd.workspace import STEP, Product, open_product

FACTS = {"kind": "lora", "scores": {"t2i": {"hit": 0.1 + 0.2}}, "git": None, "window": [0.2, 0.8], "steps": 3}


def make_product(folder: Path, digest: str = "d1", facts: dict | None = None) -> Product:
    write_json(folder / STEP, {"step": "x", "key": "k", "digest": digest, "facts": facts or FACTS, "seconds": 1.0})
    return open_product(folder)


@pytest.fixture
def product(tmp_path) -> Product:
    return make_product(tmp_path / "products" / "one")


@pytest.fixture
def card(tmp_path, product) -> dsl.Model:
    artifact = dsl.Model(name="field", uri=str(tmp_path / "artifacts" / "field"))
    write_card(artifact, product, "local")
    return artifact


def test_round_trip_gives_the_same_product(product, card):
    assert read_card(card) == product


def test_card_is_small_and_its_metadata_says_the_same(product, card):
    written = json.loads(Path(card.path).read_text())
    assert written == {"folder": str(product.folder), "digest": "d1", "facts": FACTS, "name": "local"}
    assert card.metadata | {"facts": json.loads(card.metadata["facts"])} == written


def test_metadata_holds_only_what_the_backend_can_store(card):
    assert all(isinstance(value, str) for value in card.metadata.values())


def test_cards_are_told_apart_by_name_not_by_order(tmp_path):
    artifacts = []
    for name in ("b", "a"):
        artifact = dsl.Model(name="field", uri=str(tmp_path / f"card-{name}"))
        write_card(artifact, make_product(tmp_path / name, digest=name), name)
        artifacts.append(artifact)
    assert {name: p.digest for name, p in read_cards(artifacts).items()} == {"a": "a", "b": "b"}


def test_a_missing_folder_is_one_line_that_says_what_to_do(product, card):
    shutil.rmtree(product.folder)
    with pytest.raises(UserError, match=r"the product a card names is gone; run again with --fresh") as caught:
        read_card(card)
    assert str(product.folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_now_holds_another_product(product, card):
    make_product(product.folder, digest="d2")
    with pytest.raises(UserError, match="holds another product than the one its card names"):
        read_card(card)


@pytest.mark.parametrize("fact", ["dataset", "pipeline", "report"])
def test_a_file_the_product_speaks_of_is_gone(tmp_path, fact):
    place = tmp_path / "elsewhere"
    place.mkdir()
    product = make_product(tmp_path / "p", facts={fact: str(place)})
    assert card_problem(str(product.folder), product.digest) is None
    place.rmdir()
    problem = card_problem(str(product.folder), product.digest)
    assert problem.startswith(f"{place}: the {fact} that {product.folder} names is gone")


def test_a_card_that_is_no_json(tmp_path):
    (tmp_path / "card").write_text("<html>")
    with pytest.raises(UserError, match="not valid JSON"):
        read_card(dsl.Model(uri=str(tmp_path / "card")))


GATES = [
    {"task": "t2i", "metric": "hit", "rule": "retain 0.95", "limit": 0.9, "value": 0.8, "passed": False},
    {"task": "edit", "metric": "psnr", "rule": "max_drop 3.0", "limit": None, "value": None, "passed": False},
]


def test_gate_figures_leave_out_what_is_unknown():
    figures = gate_figures({"gates": GATES, "passed": False})
    assert figures == {"t2i hit": 0.8, "t2i hit limit retain 0.95": 0.9, "passed": 0.0}


def test_an_evaluation_is_published_in_files_of_its_own(tmp_path):
    product = make_product(tmp_path / "e")
    write_json(product.folder / "metrics.json", {"gates": GATES, "passed": False})
    (product.folder / "report.html").write_text("<html>")
    (product.folder / "report.md").write_text("# text")
    report, notes = dsl.HTML(uri=str(tmp_path / "html")), dsl.Markdown(uri=str(tmp_path / "md"))
    figures = dsl.Metrics(uri=str(tmp_path / "metrics"))
    publish_evaluation(product, report, notes, figures)
    assert Path(report.path).read_text() == "<html>" and Path(notes.path).read_text() == "# text"
    assert figures.metadata["t2i hit"] == 0.8
    assert json.loads(Path(figures.path).read_text()) == figures.metadata  # without a file, kfp never reuses the step
