"""The report: whole, self-contained, escaped, and telling what the figures tell."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from danceopd.config.load import parse_recipe
from danceopd.config.recipe import Recipe
from danceopd.data import world
from danceopd.data.records import Record, decode_image
from danceopd.evaluation import evaluate as ev
from danceopd.evaluation.report import grid_path, write_report

EVIL = '<script>alert("x")</script> & "quotes" | pipe <img src=https://evil.example/x.png>'
TASK = "local_edit"
TEACHER = "local"
PROVENANCE = {
    "seconds": 12.3456789,
    "code": {"git": "abc123", "site": "https://example.org/code"},
    "recipe": {"name": "x", "deep": {"lr": 0.1}},
    "log": "line one\nline two <b>",
    "accelerator": None,
}


def make_recipe(gates: list[dict]) -> Recipe:
    return parse_recipe(
        {
            "name": "demo",
            "model": {"base": "world", "height": 64, "width": 64},
            "data": {"world": {TASK: {"test": 6}}},
            "tasks": {
                "t2i": {"teacher": "base", "needs_source": False, "metrics": ["scene_accuracy"]},
                TASK: {
                    "teacher": TEACHER,
                    "needs_source": True,
                    "metrics": ["preserved_psnr", "edit_success"],
                    "gates": gates,
                },
            },
            "teachers": {"base": {"kind": "base"}, TEACHER: {"kind": "checkpoint", "path": "x"}},
            "distill": {"lr": 0.001, "steps": 1, "batch": 3},
            "register_as": {"model": "m"},
        },
        "test",
    )


GATES = [
    {"metric": "edit_success", "retain": 0.95, "champion_margin": 0},
    {"metric": "preserved_psnr", "max_drop": 3.0, "champion_margin": 0},
]


def make_evaluation(wrong: int = 0, gates: list[dict] = GATES, prompt: str | None = None):
    """An evaluation in which the teacher draws the targets, and the student all but `wrong` of the edits."""
    recipe = make_recipe(gates)
    results = {}
    for name, kind in (("t2i", "t2i"), (TASK, TASK)):
        records = list(world.world_records({kind: {"test": 6}}))
        if prompt is not None:
            records = [dataclasses.replace(r, prompt=prompt) for r in records]
        targets = np.stack([decode_image(r.target, r.id) for r in records])
        student = targets.copy()
        if kind == TASK:
            for i in range(wrong):
                student[i] = decode_image(records[i].source, "")
        drawn = {"base": targets // 2, TEACHER: targets, "student": student}
        metrics = recipe.tasks[name].metrics
        scored = {field: ev.score_pictures(p, records, metrics) for field, p in drawn.items()}
        values = {field: part.values for field, part in scored.items()}
        examples = ev._examples(records, scored, (64, 64), list(range(6)))
        results[name] = ev._TaskResult(records, scored[TEACHER].means, values, examples)
    fields = ["base", TEACHER, "student"]
    pictures = {name: result.examples for name, result in results.items()}
    return ev.Evaluation(ev._metrics(recipe, fields, results), ev._values(fields, results), pictures)


class Page(HTMLParser):
    """Tags with their attributes, and text with the tag it stands in."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def write(tmp_path, evaluation, provenance=PROVENANCE) -> Page:
    write_report(evaluation, tmp_path, provenance)
    return Page((tmp_path / "report.html").read_text())


def test_every_file_is_written_and_what_lay_there_stays(tmp_path):
    (tmp_path / "step.json").write_text("{}")
    evaluation = make_evaluation()
    write_report(evaluation, tmp_path, PROVENANCE)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "step.json",
        "metrics.json",
        "values.json",
        "report.html",
        "report.md",
        "grids/t2i.png",
        f"grids/{TASK}.png",
    }
    assert json.loads((tmp_path / "metrics.json").read_text()) == evaluation.metrics
    assert json.loads((tmp_path / "values.json").read_text()) == evaluation.values
    with Image.open(tmp_path / f"grids/{TASK}.png") as image:
        assert image.width > 4 * 128 and image.height > 6 * 128


def test_the_page_needs_nothing_from_anywhere(tmp_path):
    page = write(tmp_path, make_evaluation(wrong=2, prompt=EVIL))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    for _, attributes in page.tags:
        assert not set(attributes) & {"href", "srcset", "data", "action", "onclick", "onerror", "onload"}
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert "url(" not in (attributes.get("style") or "")
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.S).group(1)
    assert "url(" not in style and "@import" not in style and "http" not in style
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_pictures_are_embedded_whole(tmp_path):
    evaluation = make_evaluation()
    page = write(tmp_path, evaluation)
    images = [a["src"] for t, a in page.tags if t == "img"]
    assert len(images) == 6 * 3 + 6 * 4  # drawing has no source
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(i.split(",")[1])))) for i in images]
    first = evaluation.examples["t2i"][0]
    for found, want in zip(decoded, (first.drawn["base"], first.drawn["student"], first.target), strict=False):
        assert np.array_equal(found, want)


@pytest.mark.parametrize("where", ["prompt", "provenance"])  # a task's name may hold no such signs
def test_user_text_is_escaped(tmp_path, where):
    evaluation = make_evaluation(1, prompt=EVIL if where == "prompt" else None)
    page = write(tmp_path, evaluation, {"note": EVIL, EVIL: {EVIL: EVIL}} if where == "provenance" else {})
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert EVIL in page.text
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown


def test_the_verdict_comes_first_and_says_what_fails(tmp_path):
    page = write(tmp_path, make_evaluation(wrong=3))
    banner = next(a["class"] for t, a in page.tags if "banner" in (a.get("class") or ""))
    assert banner == "banner failed"
    assert "The student fails 1 of 2 gates" in page.text
    assert f"{TASK}: edit_success is 50.0 %, needs at least 95.0 % (at least 95 % of its teacher)" in page.text
    assert page.text.index("fails 1 of 2") < page.text.index("Retention")
    assert "**The student fails 1 of 2 gates.**" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "gates, banner, verdict",
    [
        (GATES, "held", "The student holds all 2 gates"),
        (GATES[:1], "held", "The student holds its gate"),
        ([], "none", "The recipe sets no gates"),
    ],
)
def test_other_verdicts(tmp_path, gates, banner, verdict):
    page = write(tmp_path, make_evaluation(gates=gates))
    assert next(a["class"] for t, a in page.tags if "banner" in (a.get("class") or "")) == f"banner {banner}"
    assert verdict in page.text


@pytest.mark.parametrize("wrong", [0, 2, 6])
def test_wrong_samples_are_marked_by_the_rate_metric_even_if_it_is_not_the_first(tmp_path, wrong):
    page = write(tmp_path, make_evaluation(wrong))
    marked = [a for t, a in page.tags if t == "figure" and a.get("class") == "wrong"]
    # the base serves as the drawing task's teacher here, at half the brightness: all of its pictures are wrong
    assert len(marked) == wrong + 6


def test_a_missing_figure_is_shown_as_missing(tmp_path):
    evaluation = make_evaluation()
    metrics = json.loads(json.dumps(evaluation.metrics))
    for field in metrics["scores"].values():
        field[TASK] = dict.fromkeys(field[TASK])
    metrics["retention"][TASK] = {
        name: dict.fromkeys(entry) for name, entry in evaluation.metrics["retention"][TASK].items()
    }
    metrics["gates"] = [g | {"value": None, "limit": None, "passed": False} for g in metrics["gates"]]
    metrics["ceiling"][TASK] = {}
    page = write(tmp_path, dataclasses.replace(evaluation, metrics=metrics | {"passed": False}))
    assert "edit_success has no value, its teacher has none" in page.text
    assert not re.search(r"\b(None|nan)\b", page.text)


def test_the_matrix_and_the_provenance_are_shown(tmp_path):
    page = write(tmp_path, make_evaluation())
    own = [a for t, a in page.tags if t == "td" and "own" in (a.get("class") or "")]
    cells = [a for t, a in page.tags if t == "td" and "heat" in (a.get("class") or "")]
    assert len(cells) == 3 * 2 and len(own) == 2
    for text in ("abc123", "12.3457", "deep:", "line two <b>", "combination"):
        assert text in page.text


def test_pictures_can_be_laid_over_one_another_without_a_script(tmp_path):
    evaluation = make_evaluation(wrong=1)
    page = write(tmp_path, dataclasses.replace(evaluation, worst={TASK: evaluation.examples[TASK][:1]}))
    radios = [a for t, a in page.tags if t == "input"]
    names = {a["name"] for a in radios}
    offered = [[a["value"] for a in radios if a["name"] == name] for name in ("worst-1", "pictures-1", "pictures-2")]
    assert len(names) == 3 and all(a["type"] == "radio" for a in radios)
    assert offered == [["side", "source", "teacher"], ["side", "teacher"], ["side", "source", "teacher"]]
    assert [a["value"] for a in radios if "checked" in a] == ["side"] * 3  # nothing is hidden until it is asked for
    roles = [a["data-is"] for t, a in page.tags if t == "figure"]
    assert roles[:4] == ["source", "teacher", "student", "target"] and roles[4:7] == ["teacher", "student", "target"]
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.S).group(1)
    for value in ("source", "teacher"):
        assert f".views:has([value={value}]:checked) + .gallery {{" in style
        assert f"figure[data-is={value}] .layer {{ clip-path: inset(0 50% 0 0); }}" in style
    tracks = [a for t, a in page.tags if a.get("class") == "track"]
    assert len(tracks) == 1 + 6 + 6 and all(a["tabindex"] == "0" and a["aria-label"] for a in tracks)


def test_large_pictures_are_embedded_smaller(tmp_path):
    evaluation = make_evaluation()
    example = evaluation.examples[TASK][0]
    big = {name: p.repeat(8, 0).repeat(8, 1) for name, p in example.drawn.items()}
    example = dataclasses.replace(example, drawn=big, source=big["base"], target=big["base"])
    page = write(tmp_path, dataclasses.replace(evaluation, examples={TASK: [example]}))
    sizes = {Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1]))).size for t, a in page.tags if t == "img"}
    assert sizes == {(256, 256)}


def test_file_names_are_safe_and_distinct():
    names = ["a/b", "a_b", "../../etc/passwd", "a b", "", "ä", "ö", EVIL]
    paths = [grid_path(name) for name in names]
    assert len(set(paths)) == len(names)
    assert all(re.fullmatch(r"grids/[A-Za-z0-9_-]+\.png", p) for p in paths if p != "grids/.png")
    assert grid_path("local_edit") == "grids/local_edit.png"


def test_records_need_no_novelty(tmp_path):
    evaluation = make_evaluation()
    plain = {
        task: [dataclasses.replace(e, record=Record(e.record.id, task, "p", None, None, "test")) for e in examples]
        for task, examples in evaluation.examples.items()
    }
    metrics = evaluation.metrics | {"by_novelty": {}}
    page = write(tmp_path, dataclasses.replace(evaluation, examples=plain, metrics=metrics))
    assert "what is new" not in page.text and "combination" not in page.text


# --- intervals, worst cases, plots, the champion ---

DRIFT = {
    "records": 4,
    "metric": "psnr",
    "unit": "dB",
    "sigmas": [1.0, 0.5, 0.0],
    "drift": [0.0, 0.125, 0.25],
    "velocity_error": [0.1, 0.3],
    "by_steps": {"1": {"student": 10.0, "teacher": 12.0}},
}


def test_the_first_screen_says_how_good_and_how_sure(tmp_path):
    page = write(tmp_path, make_evaluation(wrong=3))
    top = page.text[: page.text.index("Retention")]
    assert "Beside its teachers, record by record: " in top and "worse on " in top
    assert re.search(r"edit_success is 50\.0 %, needs at least 95\.0 % .*; 95 % interval 16\.7 to 83\.3 %", top)
    assert "95 % interval" in top and "points" in top
    assert "Beside the champion" not in page.text


def test_worst_cases_are_those_where_the_student_loses_most(tmp_path):
    evaluation = make_evaluation(wrong=2)
    records = list(world.world_records({TASK: {"test": 6}}))
    scored = {}
    for name in ("student", TEACHER):
        values = {key: list(part) for key, part in evaluation.values[name][TASK].items()}
        scored[name] = ev.Scored(np.zeros((6, 64, 64, 3), np.uint8), values)
    metrics = ("preserved_psnr", "edit_success")
    rows = ev._worst(scored, TEACHER, metrics, 4)
    assert sorted(rows) == [0, 1]  # the two wrong ones and no others
    assert ev._worst(scored, TEACHER, metrics, 1) == rows[:1] and ev._worst(scored, TEACHER, metrics, 0) == []
    worst = {TASK: ev._examples(records, scored, (64, 64), rows), "t2i": []}
    page = write(tmp_path, dataclasses.replace(evaluation, worst=worst))
    assert "Worst cases" in page.text and f"{TASK}, by edit_success" in page.text
    assert "Worst cases" not in write(tmp_path, evaluation).text


def test_plots_are_embedded_and_written(tmp_path):
    evaluation = make_evaluation()
    page = write(tmp_path, dataclasses.replace(evaluation, metrics=evaluation.metrics | {"drift": {TASK: DRIFT}}))
    assert "4 records per task, from the same noise" in page.text
    assert f"{TASK}: 0.25 from its teacher at the end, velocity error 0.3 at most" in page.text
    names = {p.name for p in (tmp_path / "plots").iterdir()}
    assert {"drift.png", "velocity_error.png"} < names and len(names) == 3
    markdown = (tmp_path / "report.md").read_text()
    assert all(f"](plots/{name})" in markdown for name in names)


def test_the_champion_is_told_of_once_it_is_known(tmp_path):
    from danceopd.evaluation.report import add_champion

    evaluation = make_evaluation()
    write(tmp_path, evaluation)
    found = evaluation.metrics["comparisons"]["teacher"][TASK]
    champion = {
        "version": "7<",
        "scores": {TASK: {"edit_success": 0.5}},
        "table": {TASK: found | {"edit_success": None}},
    }
    page = Page(add_champion((tmp_path / "report.html").read_text(), champion, evaluation.metrics))
    assert "Beside the champion (version 7<): equal on 1 of 1 figures" in page.text
    assert page.text.index("Beside the champion") < page.text.index("Retention")
    assert add_champion("<p>another page</p>", champion, evaluation.metrics) == "<p>another page</p>"
