"""Fields drawn in their own ways: what is measured, shown, counted and followed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from test_evaluate import make_recipe, other_network

from danceopd.backbones import load_backbone
from danceopd.config.load import parse_recipe
from danceopd.config.sampling import Sampling
from danceopd.data.assemble import open_dataset
from danceopd.data.encode import encode_records
from danceopd.evaluation import evaluate as ev
from danceopd.evaluation.drift import path_drift
from danceopd.evaluation.previews import Previewer
from danceopd.evaluation.samplings import Samplings
from danceopd.evaluation.validate import GateValidator
from danceopd.flow.fields import VelocityField
from danceopd.flow.guidance import GuidedField
from danceopd.pretraining.world_base import SHAPE


@pytest.fixture(scope="module")
def own(tiny_base):
    return load_backbone(tiny_base, SHAPE)


@pytest.fixture(scope="module")
def fields(own):
    names = ("base", "local", "style", "student")
    networks = [own.transformer, *(other_network(own, seed) for seed in range(3))]
    return {name: VelocityField(name, own, network) for name, network in zip(names, networks, strict=True)}


@pytest.fixture(scope="module")
def empty(own):
    return own.encode_prompts([""])[0]


def recipe_of(**changes):
    """Students in 2 steps, all else in 6; guidance kept at 3; a psnr gate to select by."""
    gate = [{"metric": "psnr", "max_drop": 60, "champion_margin": 1}]
    data = make_recipe(t2i={"gates": gate}).model_dump(mode="json", exclude_defaults=True)
    data["distill"] |= {"target": "displacement", "rollout_steps": 2, "guidance": {"keep": 3.0}}
    data["evaluate"] |= {"steps": 6, "drift": {"records": 2, "steps": [2, 6]}} | changes
    return parse_recipe(data, "test")


@contextmanager
def counted(own):
    seen, real = [], own.velocity
    own.velocity = lambda network, z, *rest: (seen.append(len(z)), real(network, z, *rest))[1]
    try:
        yield seen
    finally:
        del own.velocity


@pytest.mark.slow
def test_every_field_is_measured_in_its_own_steps_and_guidance_and_its_forwards_are_counted(own, fields, small_data):
    recipe = recipe_of()
    with counted(own) as passed:
        metrics = ev.evaluate(recipe, own, fields, open_dataset(small_data), None, "key").metrics
    assert metrics["sampling"]["student"] == {"steps": 2, "guidance": 3.0, "fixed": True}
    assert metrics["sampling"]["local"] == {"steps": 6, "guidance": 3.0, "fixed": False}
    assert metrics["forwards"] == sum(passed)
    assert metrics["drift"]["t2i"]["small_steps"] == 3
    assert len(metrics["drift"]["t2i"]["sigmas"]) == 3
    plain = recipe_of(fields={name: {"guidance": 1, "steps": 2} for name in fields})
    with counted(own) as again:
        other = ev.evaluate(plain, own, fields, open_dataset(small_data), None, "key").metrics
    assert other["forwards"] == sum(again)
    assert other["scores"]["student"] != metrics["scores"]["student"]


def test_the_same_network_drawn_in_two_ways_is_scored_twice(own, fields, small_data):
    twins = fields | {"student": VelocityField("student", own, own.transformer)}
    scores = ev.evaluate(recipe_of(drift=None), own, twins, open_dataset(small_data), None, "key").metrics["scores"]
    assert scores["student"]["t2i"]["psnr"] != scores["base"]["t2i"]["psnr"]


@pytest.mark.slow
def test_a_field_that_is_measured_alone_is_drawn_as_it_states(own, fields, small_data):
    recipe = recipe_of(drift=None)
    student = ev.evaluate(recipe, own, fields, open_dataset(small_data), None, "key").metrics
    stated = Sampling.model_validate(student["sampling"]["student"])
    alone, _ = ev.measure_field(recipe, fields["student"], open_dataset(small_data), None, "key", "", stated)
    assert alone["scores"]["student"] == student["scores"]["student"]
    assert alone["sampling"]["student"] == student["sampling"]["student"]
    silent, _ = ev.measure_field(recipe, fields["student"], open_dataset(small_data), None, "key")
    assert silent["sampling"]["student"] == {"steps": 6, "guidance": 1.0, "fixed": False}


def test_previews_and_validation_draw_the_same_way(own, fields, empty, small_data, tmp_path):
    recipe, dataset = recipe_of(), open_dataset(small_data)
    records = dataset.records("val", "t2i")[:3]
    encoded = encode_records(own, records, 64, 64, None, "k", targets=False)
    samplings = Samplings(recipe, lambda: empty)
    show = Previewer(records, encoded, fields, {"t2i": "base"}, recipe.evaluate, tmp_path, samplings)
    with counted(own) as passed:
        show(fields["student"], 1)
    assert sum(passed) == 3 * 2 * (6 + 2)  # both sides of each
    recipe = recipe.model_copy(update={"tasks": {"t2i": recipe.tasks["t2i"]}})
    validate = GateValidator(recipe, fields, {"t2i": (records, encoded)}, None, samplings)
    with counted(own) as passed:
        validate(fields["student"])
    assert sum(passed) == 3 * 2 * (6 + 2)


def test_a_teacher_in_more_steps_is_followed_by_small_ones(own, fields, empty, small_data):
    records = open_dataset(small_data).records("val", "t2i")[:2]
    encoded = encode_records(own, records, 64, 64, None, "k", targets=False)
    teacher = GuidedField(fields["local"], 3.0, empty)
    with counted(own) as passed:
        found = path_drift(teacher, teacher, encoded, [0, 1], 2, 4, 3)
    assert found.forwards == sum(passed) == 2 * 2 * (2 + 3 * 3)
    assert max(found.drift) > 0  # in two steps it is not where six lead
    same = path_drift(teacher, teacher, encoded, [0, 1], 2, 4)
    assert max(same.drift) < 1e-5
    assert torch.tensor(same.velocity_error).max() < 1e-5
