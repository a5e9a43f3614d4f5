"""The model card: front matter that parses, figures with intervals, nobody's paths."""

from __future__ import annotations

import json

import pytest
import yaml

from danceopd.config.load import load_recipe
from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.export.model_card import render_card, write_card

ORIGINS = {"data": "d" * 64, "dvc": None, "teacher a|b": "<x>"}
METRICS = {
    "split": "test",
    "scores": {
        "base": {"t2i": {"scene_accuracy": 0.98}},
        "student": {"t2i": {"scene_accuracy": 0.99}, "local_edit": {"edit_success": None}},
    },
    "intervals": {"student": {"t2i": {"scene_accuracy": [0.97, 1.0]}}},
    "comparisons": {"teacher": {"t2i": {"scene_accuracy": {"verdict": "equal"}}, "local_edit": {"edit_success": None}}},
    "units": {"scene_accuracy": "rate"},
}


@pytest.fixture
def pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    return tmp_path


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("world")


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_hugging_faces(recipe, pipeline):
    from huggingface_hub import ModelCard

    path = write_card(recipe, pipeline, False, ORIGINS, METRICS)
    data = front(path.read_text())
    assert (data["license"], data["base_model"], data["library_name"]) == ("apache-2.0", "world", "diffusers")
    [result] = ModelCard.load(path).data.eval_results
    assert (result.task_name, result.metric_type, result.metric_value) == ("t2i", "scene_accuracy", 0.99)


def test_figures_teachers_and_origins_are_told(recipe, pipeline):
    text = render_card(recipe, pipeline, True, ORIGINS, METRICS)
    assert "| t2i | scene_accuracy | rate | 0.99 | 0.97 to 1 | 0.98 | equal |" in text
    assert "| local_edit | edit_success |  | unknown | unknown | unknown |  |" in text
    assert "| local_edit | fine-tuned from the base in this run | local_edit |" in text
    assert "d" * 64 in text and "dvc" not in text and "<x>" not in text and r"a\|b" in text
    assert 'load_lora_weights("path/to/lora"' in text and "Flux2KleinPipeline.from_pretrained" in text


def test_without_an_evaluation_it_says_so(recipe, pipeline):
    text = render_card(recipe, pipeline, False, ORIGINS, None)
    assert "Not evaluated yet" in text and "load_lora_weights" not in text
    assert "model-index" not in front(text)


def test_a_bases_folder_is_named_without_its_path(recipe, pipeline):
    base = recipe.model.model_copy(update={"base": "/srv/someone/bases/klein"})
    text = render_card(recipe.model_copy(update={"model": base}), pipeline, False, {}, None)
    assert "someone" not in text and front(text)["base_model"] == "klein"


def test_a_folder_that_is_no_pipeline_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"no model_index.json"):
        write_card(recipe, tmp_path, False, {}, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "call", "told"),
    [
        ([], "num_inference_steps=8, guidance_scale=1.0", "draws in 8 Euler steps without guidance (`sampling.json`)"),
        (["distill.guidance={keep: 4}"], "guidance_scale=4.0", "8 Euler steps with guidance at 4 (`sampling.json`)"),
        (["distill.guidance={absorb: 4}"], "guidance_scale=1.0", "without guidance"),
        (
            ["distill.target=displacement", "distill.rollout_steps=4"],
            "num_inference_steps=4, guidance_scale=1.0",
            "4 Euler steps, for which alone it was made, without",
        ),
    ],
)
def test_it_says_how_the_student_is_drawn_in_the_stock_pipelines_words(pipeline, settings, call, told):
    text = render_card(load_recipe("world", settings), pipeline, False, ORIGINS, None)
    assert 'pipe("a prompt", ' in text and call in text
    assert told in text
