"""Metrics that look with networks: real CLIP and DINO classes with random weights, loaded from folders."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from danceopd.config.recipe import DISTANCES, EvaluateRecipe
from danceopd.data import world
from danceopd.data.records import Record, decode_image
from danceopd.errors import UserError
from danceopd.evaluation.metrics import METRICS, metric
from danceopd.evaluation.metrics import tools as tools_room
from danceopd.evaluation.metrics.drawing import frechet_distance, kernel_distance
from danceopd.evaluation.metrics.tools import ALEXNET, Tools, alexnet_path
from danceopd.evaluation.scoring import score_pictures, skipped_metrics


@pytest.fixture(scope="module")
def tools(clip_folder, dino_folder):
    return Tools(EvaluateRecipe(networks={"clip": str(clip_folder), "dino": str(dino_folder)}), "cpu")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(world.world_records({"global_style": {"test": 6}}))


def pictures(records: list[Record], field: str = "target") -> np.ndarray:
    return np.stack([decode_image(getattr(r, field), r.id) for r in records])


def test_clip_score_is_the_models_own_cosine(tools, records, clip_folder):
    from transformers import CLIPImageProcessorPil as Prepare
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

    drawn = pictures(records)
    processor = CLIPProcessor(Prepare.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    prompts = [r.prompt[:8] for r in records]
    inputs = processor(
        text=prompts, images=[Image.fromarray(p) for p in drawn], return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        wanted = (model(**inputs).logits_per_image / model.logit_scale.exp()).diagonal()
    short = [dataclasses.replace(r, prompt=prompt) for r, prompt in zip(records, prompts, strict=True)]
    assert metric("clip_score").score(drawn, short, tools) == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_prompt_longer_than_clip_reads_is_cut(tools, records):
    long = [dataclasses.replace(r, prompt="abcdefghijkl " * 40) for r in records]
    longer = [dataclasses.replace(r, prompt="abcdefghijkl " * 41) for r in records]
    score = metric("clip_score").score
    assert score(pictures(records), long, tools) == score(pictures(records), longer, tools)


@pytest.mark.parametrize(
    "name, field",
    [
        ("style_gram", "target"),
        ("clip_target", "target"),
        ("dino_target", "target"),
        ("structure_dino", "source"),
        ("structure_ssim", "source"),
    ],
)
def test_likeness_is_one_with_itself_and_less_with_another(tools, records, name, field):
    same = metric(name).score(pictures(records, field), records, tools)
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3)).astype(np.uint8)
    other = metric(name).score(noise, records, tools)
    assert same == pytest.approx([1.0] * 6, abs=1e-3)
    assert all(-1 <= b < a - 1e-4 for a, b in zip(same, other, strict=True))


def test_structure_survives_a_loss_of_contrast_and_not_a_move(records):
    source = pictures(records, "source")
    faint, moved = (source // 2 + 60).astype(np.uint8), np.roll(source, 9, axis=1)
    score = metric("structure_ssim").score
    assert np.mean(score(faint, records)) > 0.9 > np.mean(score(moved, records))


@pytest.mark.parametrize(
    "name", sorted(n for n, m in METRICS.items() if set(m.tools) & {"clip", "dino"} and not m.of_set)
)
def test_a_value_does_not_depend_on_its_neighbors(tools, records, name):
    drawn = pictures(records, "source")
    whole = metric(name).score(drawn, records, tools)
    alone = [metric(name).score(drawn[i : i + 1], records[i : i + 1], tools)[0] for i in range(6)]
    assert whole == pytest.approx(alone, abs=1e-5)


# --- distances of sets ---


def test_frechet_distance_of_a_shifted_set_is_the_shifts_square():
    features = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features + torch.tensor([3.0, 0, 4, 0, 0]), features) == pytest.approx(25, rel=1e-6)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_the_unbiased_squared_mmd():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(9, 4, generator=generator).double() + shift for shift in (0.5, 0))

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (9 * 8)

    wanted = within(ours) + within(theirs) - 2 * kernel(ours, theirs).mean()
    before = torch.random.get_rng_state()
    assert kernel_distance(ours, theirs) == pytest.approx(wanted.item(), rel=1e-4)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["fd_dino", "kd_dino"])
def test_a_set_has_one_figure_and_no_values_of_records(tools, records, name):
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3)).astype(np.uint8)
    near, far = (score_pictures(p, records, (name, "psnr"), tools) for p in (pictures(records), noise))
    assert far.means[name] < near.means[name] and near.means[name] == pytest.approx(0, abs=2)
    assert all(math.isnan(v) for v in near.values[name]) and math.isfinite(near.means["psnr"])
    with pytest.raises(UserError, match=f"'{name}' compares sets of pictures and there is one record"):
        metric(name).score(noise[:1], records[:1], tools)


def test_the_recipe_knows_which_metrics_are_distances():
    assert set(DISTANCES) == {name for name, found in METRICS.items() if found.unit == "distance"}


# --- what is not there ---


def test_without_their_tools_metrics_are_skipped_with_the_reason(tmp_path, monkeypatch, records):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setattr(tools_room, "find_spec", lambda _: None)
    spec = EvaluateRecipe(
        networks={"dino": str(tmp_path / "gone")},
        judge={"url": "http://localhost:1/v1", "model": "m", "key_env": "NO_SUCH_KEY"},
    )
    found = skipped_metrics(METRICS, Tools(spec))
    assert set(found) == {name for name, m in METRICS.items() if m.tools}
    assert found["clip_score"] == "evaluate.networks.clip does not name a folder with a CLIP model"
    assert "gone: not there (evaluate.networks.dino" in found["structure_dino"]
    assert found["fid"] == "the package torch-fidelity is not installed"
    assert found["lpips"] == "the package torchvision is not installed"
    assert found["judge_overall"] == "the environment variable NO_SUCH_KEY is not set (evaluate.judge.key_env)"
    assert skipped_metrics(["judge_quality"], Tools(EvaluateRecipe()))["judge_quality"].startswith("evaluate.judge")
    scored = score_pictures(pictures(records), records, ("clip_score", "psnr"), Tools(spec))
    assert math.isnan(scored.means["clip_score"]) and scored.means["psnr"] == 60


def test_weights_are_looked_for_where_torchvision_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tools_room, "find_spec", lambda _: object())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert alexnet_path() == tmp_path / "hub" / "checkpoints" / ALEXNET
    assert "no such file" in skipped_metrics(["lpips"], Tools(EvaluateRecipe()))["lpips"]
    alexnet_path().parent.mkdir(parents=True)
    alexnet_path().touch()
    assert skipped_metrics(["lpips"], Tools(EvaluateRecipe())) == {}
    assert "does not name torch-fidelity's" in skipped_metrics(["kid"], Tools(EvaluateRecipe()))["kid"]


@pytest.mark.parametrize(
    "tool, other, damage, said",
    [
        ("clip", "dino", None, "cannot be opened as a CLIP model .*says dinov2, not clip"),
        ("dino", "clip", None, "cannot be opened as a DINO model .*says clip"),
        ("dino", "dino", "model.safetensors", "cannot be opened as a DINO model"),
        ("dino", "dino", "preprocessor_config.json", "cannot be opened as a DINO model's image processor"),
    ],
)
def test_a_folder_with_something_else_is_one_line(tmp_path, clip_folder, dino_folder, tool, other, damage, said):
    folder = tmp_path / "copy"
    shutil.copytree({"clip": clip_folder, "dino": dino_folder}[other], folder)
    if damage:
        (folder / damage).unlink()
    with pytest.raises(UserError, match=said) as error:
        getattr(Tools(EvaluateRecipe(networks={tool: str(folder)}), "cpu"), tool)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_a_configuration_in_another_encoding_is_one_line(tmp_path, clip_folder, name):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "copy"))
    (folder / name).write_bytes((folder / name).read_text().encode("utf-16"))
    with pytest.raises(UserError, match=rf"{name}, line 1: UTF-16, not UTF-8") as error:
        _ = Tools(EvaluateRecipe(networks={"clip": str(folder)}), "cpu").clip
    assert "\n" not in str(error.value)
