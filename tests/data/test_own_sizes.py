"""Records that keep their own picture sizes: encoded, grouped and trained size by size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from danceopd.config.recipe import DistillRecipe, FinetuneRecipe, LoraRecipe
from danceopd.data.cache import EncodingCache
from danceopd.data.columns import table_of
from danceopd.data.encode import encode_cached, encode_records
from danceopd.data.encoded import Sizing, load_pixels
from danceopd.data.png import encode_png
from danceopd.data.records import Record
from danceopd.distill import distill
from danceopd.errors import UserError
from danceopd.finetune import finetune
from danceopd.flow.fields import VelocityField
from danceopd.methods.base import Distillation
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.groups import draw_groups
from danceopd.methods.queries import query_window
from danceopd.training.learner import new_learner
from danceopd.training.processes import Processes

SQUARE, WIDE, TALL = (64, 64), (32, 96), (96, 32)
LORA = {"trainable": "lora", "lora": LoraRecipe(rank=4, alpha=8), "lr": 3e-3, "warmup": 1, "log_every": 1}


def picture(size, seed):
    return encode_png(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def record(number, task, size, edits, target=True):
    source = picture(size, 100 + number) if edits else None
    return Record(str(number), task, f"prompt {number % 3}", source, picture(size, number) if target else None, "train")


@pytest.fixture
def base(own_backbone):
    """A base of the test's own, to train on."""
    return own_backbone


@pytest.fixture(scope="module")
def records():
    """Two of each size of drawing and of editing, and a prompt without any picture."""
    made = [
        record(2 * i + edits, "edit" if edits else "draw", (SQUARE, WIDE, TALL)[i % 3], edits)
        for i in range(6)
        for edits in (0, 1)
    ]
    return [*made, record(12, "draw", SQUARE, False, target=False)]


def own(backbone, records, targets=True, cache=None):
    return encode_records(backbone, records, 64, 64, cache, "k", targets, own_sizes=True)


def test_each_picture_is_encoded_at_its_own_size(backbone, records):
    encoded = own(backbone, records[:12])
    for row, known in enumerate(records[:12]):
        size = Image.open(io.BytesIO(known.target)).size[::-1]
        assert encoded.size(row) == size
        condition = encoded.condition([row])
        assert (condition.height, condition.width) == size
        latents = backbone.encode_images(load_pixels(known.target, *size, "")[None])
        assert latents.shape[1:] == tuple(backbone.latent_shape(*size))
        torch.testing.assert_close(encoded.target([row]), latents, atol=1e-4, rtol=1e-4)
        assert (condition.source is None) == (known.source is None)
    assert own(backbone, records, targets=False).size(12) == SQUARE  # nothing to measure: the recipe's


def test_groups_are_of_one_size_and_lose_nobody(backbone, records):
    encoded = own(backbone, records)
    groups = encoded.shape_groups(list(range(13)))
    assert sorted(i for group in groups for i in group) == list(range(13))
    assert len(groups) == 6
    for group in groups:
        assert len({(encoded.size(row), int(encoded.source_row[row]) < 0) for row in group}) == 1
        assert len(encoded.condition(group).prompt) == len(group)
    part = encoded.subset([3, 2])
    assert [part.size(0), part.size(1)] == [encoded.size(3), encoded.size(2)]


def test_one_size_crops_them_all(backbone, records):
    encoded = encode_records(backbone, records, 64, 64, None, "k", targets=True)
    assert {encoded.size(row) for row in range(13)} == {SQUARE}
    assert len(encoded.shape_groups(list(range(13)))) == 2


def test_a_cache_and_a_file_give_back_the_same(backbone, records, tmp_path):
    plain = own(backbone, records)
    again = [own(backbone, records, cache=tmp_path / "file") for _ in range(2)][1]
    cache = EncodingCache(tmp_path / "cache")
    cached = encode_cached(backbone, table_of(records), Sizing(64, 64, own=True), cache, "k", True)
    assert len(list(cache.folder.glob("latents-*"))) == 3
    for other in (again, cached):
        assert torch.equal(other.sizes, plain.sizes)
        for group in plain.shape_groups(list(range(12))):
            assert torch.equal(other.target(group), plain.target(group))
            mine, theirs = plain.condition(group), other.condition(group)
            assert torch.equal(mine.prompt, theirs.prompt)
            assert mine.source is None or torch.equal(mine.source, theirs.source)
    thin = cached.thin()  # how a study counts what a method costs
    assert (thin.targets.shape, thin.prompts.shape) == ((len(cached.targets), 1, 1), (len(cached.prompts), 1, 1))


@pytest.mark.parametrize("through_cache", [False, True])
def test_a_size_the_base_cannot_take_is_named_with_its_record(backbone, records, tmp_path, through_cache):
    odd = [records[0], record(77, "draw", (60, 70), False)]
    with pytest.raises(UserError, match=r"record '77': picture size 60x70: .* or set model.sizes: one"):
        if through_cache:
            sizing = Sizing(64, 64, own=True)
            encode_cached(backbone, table_of(odd), sizing, EncodingCache(tmp_path), "k", True)
        else:
            own(backbone, odd)
    encode_records(backbone, odd, 64, 64, None, "k", targets=True)


@pytest.mark.slow
def test_a_student_learns_from_all_sizes_in_one_batch(base, records):
    encoded = own(base, records, targets=False)
    teacher = base.new_transformer().requires_grad_(False)
    teacher.proj_out.weight.mul_(1.5)
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": VelocityField("editor", base, teacher)}
    teacher_of, weights = {"draw": "base", "edit": "editor"}, {"draw": 1.0, "edit": 1.0}
    spec = DistillRecipe(lr=3e-3, warmup=1, log_every=1, steps=12, batch=13, rollout_steps=3)
    setup = Distillation(base, encoded, teachers, teacher_of, 3)
    learner, window, rows = new_learner(base, "probe", spec), query_window("uniform"), list(range(13))
    tags = [encoded.tasks[row] for row in rows]
    whole = draw_groups(setup, DanceOPD(), learner, rows, tags, weights, window, torch.Generator())
    assert sum(float(group.weights.sum()) for group in whole) == pytest.approx(1)
    for group in whole:
        size = (group.condition.height, group.condition.width)
        assert group.noise.shape[1:] == tuple(base.latent_shape(*size))
        assert torch.equal(group.grid, base.sigmas(3, *size))
    _, history = distill(base, encoded, teachers, teacher_of, weights, spec)
    losses = [entry["loss"]["edit"] for entry in history]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_processes_share_the_groups_of_one_batch(base, records, monkeypatch):
    encoded = own(base, records, targets=False)
    spec = DistillRecipe(**LORA, steps=1, batch=12, rollout_steps=2)
    setup = Distillation(base, encoded, {}, {}, 2)
    taken = []
    for rank in range(4):
        learner = new_learner(base, f"probe{rank}", spec)
        monkeypatch.setattr(learner, "processes", Processes(rank, 4, torch.device("cpu")))
        tags = [encoded.tasks[row] for row in range(12)]
        weights, window = {"draw": 1.0, "edit": 1.0}, query_window("uniform")
        groups = draw_groups(setup, DanceOPD(), learner, list(range(12)), tags, weights, window, torch.Generator())
        assert groups[-1].last
        taken.append([row for group in groups for row in group.rows])
    assert [len(rows) for rows in taken] == [3, 3, 3, 3]
    assert sorted(row for rows in taken for row in rows) == list(range(12))


def test_a_teacher_is_fine_tuned_on_all_sizes(base, records):
    encoded = own(base, records[:12])
    spec = FinetuneRecipe(**LORA, steps=2, batch=12, prompt_dropout=0.3)
    field, history = finetune(base, "all", encoded, spec)
    assert len(history) == 2
    condition = encoded.condition([2])
    noise = torch.zeros(1, *base.latent_shape(condition.height, condition.width))
    velocity = field(noise, torch.ones(1), condition)
    assert velocity.isfinite().all()
