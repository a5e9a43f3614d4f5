"""Rollouts of a merged copy: the student's own path, what the copy shares, and when it is given up."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from diffusers import Flux2KleinPipeline

from danceopd.backbones import load_backbone
from danceopd.backbones.base import repeated_blocks
from danceopd.backbones.lora import adapter_parameters
from danceopd.config.recipe import DistillRecipe
from danceopd.data.assemble import open_dataset
from danceopd.data.encode import encode_records
from danceopd.distill import distill
from danceopd.flow.fields import VelocityField
from danceopd.flow.rollout import rollout_drift
from danceopd.pretraining.world_base import SHAPE
from danceopd.training.checkpoints import Checkpoints
from danceopd.training.learner import new_learner

TASKS = ("t2i", "global_style")


def spec(**changes) -> DistillRecipe:
    known = {"trainable": "lora", "rollout_weights": "merged", "lr": 1e-2, "steps": 4, "batch": 4, "rollout_steps": 4}
    return DistillRecipe(**(known | {"log_every": 1, "warmup": 1, "optimizer": "adamw"} | changes))


@pytest.fixture(params=["float32", "bfloat16"])
def base(request, tiny_base):
    return load_backbone(tiny_base, SHAPE.model_copy(update={"dtype": request.param}))


@pytest.fixture(scope="module")
def encoded(backbone, small_data):
    return encode_records(backbone, open_dataset(small_data).records("train"), 64, 64, None, "k", targets=False)


def disturb(learner, size=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter_parameters(learner.field.network, "student"):
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    learner.merged.stale = True


def inputs(base, encoded, stop=(4, 2, 0, 3)):
    condition = encoded.condition(encoded.rows_by_task()["global_style"][:4], "cpu")
    noise = torch.randn(4, *base.latent_shape(64, 64), generator=torch.Generator().manual_seed(1))
    return noise, base.sigmas(4, 64, 64), torch.tensor(stop), condition


def test_it_leads_where_the_student_itself_does(base, encoded):
    learner = new_learner(
        base, "student", spec(precision="bfloat16" if base.settings.dtype == "bfloat16" else "float32")
    )
    disturb(learner, 0.15)
    plain, given = VelocityField("base", base, base.transformer), inputs(base, encoded)
    with learner.precision():
        drift = rollout_drift(learner.field, learner.walker, *given)
        of_adapter = rollout_drift(learner.field, plain, *given)
    exact = base.settings.dtype == "float32"
    assert drift < (1e-5 if exact else 0.02)
    assert of_adapter > 10 * drift  # it has what the adapter changes


def test_it_follows_every_update_and_a_resumed_state(base, encoded):
    learner, other = (new_learner(load_backbone(base._folder, base.settings), "student", spec()) for _ in range(2))
    given = inputs(base, encoded)
    with torch.no_grad():
        before = learner.walker(given[0], given[1][:1].expand(4), given[3])
        disturb(learner)
        after = learner.walker(given[0], given[1][:1].expand(4), given[3])
        assert other.walker.adapter is None  # merged once, before the state comes
        other.load_state_dict(learner.state_dict())
        resumed = other.walker(given[0], given[1][:1].expand(4), given[3])
    assert not torch.equal(before, after)
    assert torch.equal(after, resumed)
    loss = learner.field(given[0], given[1][:1].expand(4), given[3]).square().mean()
    learner.backward(loss)
    learner.update()
    with torch.no_grad():
        assert not torch.equal(learner.walker(given[0], given[1][:1].expand(4), given[3]), after)


def test_it_holds_the_changed_weights_and_shares_the_rest(base):
    learner = new_learner(base, "student", spec())
    copy, of_base = learner.walker.network, dict(base.transformer.named_parameters())
    own = {
        name
        for name, weight in copy.named_parameters()
        if not any(weight is w for w in of_base.values())
        and not any(weight.data_ptr() == w.data_ptr() for w in of_base.values())
    }
    changed = {name.replace(".base_layer", "") for name in of_base if ".base_layer.weight" in name}
    assert own == changed
    assert {w.dtype for w in copy.parameters()} == {getattr(torch, base.settings.dtype)}
    assert not any(w.requires_grad for w in copy.parameters())
    assert isinstance(base.pipeline, Flux2KleinPipeline)


def test_the_base_and_the_student_stay_as_they_are(base, encoded):
    learner = new_learner(base, "student", spec())
    disturb(learner)
    before = {name: weight.clone() for name, weight in base.transformer.named_parameters()}
    given = inputs(base, encoded)
    with torch.no_grad():
        learner.walker(given[0], given[1][:1].expand(4), given[3])
    assert all(torch.equal(before[name], weight) for name, weight in base.transformer.named_parameters())


def teachers_of(base) -> dict[str, VelocityField]:
    """One teacher that is not the base."""
    network = base.new_transformer().requires_grad_(False)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "to_out" in name or "linear_out" in name:
                weight.mul_(20)
    return {"other": VelocityField("other", base, network)}


def train(base, encoded, checkpoints=None, record=None, **changes):
    known = (base, encoded, teachers_of(base), dict.fromkeys(TASKS, "other"), dict.fromkeys(TASKS, 1.0))
    return distill(*known, spec(**changes), checkpoints=checkpoints, record=record)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["danceopd", "soft", "dense"])
def test_training_with_it_is_training_without(tiny_base, encoded, method):
    own, merged = (
        train(load_backbone(tiny_base, SHAPE), encoded, rollout_weights=weights, method=method)[1]
        for weights in ("own", "merged")
    )
    assert own[-1]["loss"]["t2i"] < 0.99 * own[0]["loss"]["t2i"]
    for one, two in zip(own, merged, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["rollout_drift"] < 1e-4


def test_the_drift_is_in_the_history_and_beyond_the_limit_the_student_rolls_out_itself(tiny_base, encoded, caplog):
    low = SHAPE.model_copy(update={"dtype": "bfloat16"})
    kept = train(load_backbone(tiny_base, low), encoded, precision="bfloat16", log_every=2)[1]
    assert [0 <= entry["rollout_drift"] < 0.05 for entry in kept] == [True, True]
    assert not [record for record in caplog.records if "rollout_drift" in record.getMessage()]
    with caplog.at_level(logging.WARNING, logger="danceopd"):
        closed = train(load_backbone(tiny_base, low), encoded, precision="bfloat16", rollout_drift=1e-9)[1]
    told = [record.getMessage() for record in caplog.records if "rollout_drift" in record.getMessage()]
    assert len(told) == 1
    assert "own weights from here on" in told[0]
    seen = [entry["step"] for entry in closed if "rollout_drift" in entry]
    assert seen[-1] < 4  # not measured any more


def test_a_closed_gate_stays_closed_when_training_goes_on(tiny_base, encoded, tmp_path):
    def run(folder, stop_at=None):
        def record(entry):
            if stop_at is not None and entry["step"] == stop_at:
                raise InterruptedError

        base = load_backbone(tiny_base, SHAPE.model_copy(update={"dtype": "bfloat16"}))
        how = {"precision": "bfloat16", "rollout_drift": 1e-9, "checkpoint_every": 2}
        student, history = train(base, encoded, Checkpoints(folder, 2, "key"), record, **how)
        return [p.clone() for p in adapter_parameters(student.network, "student")], history

    whole, history = run(tmp_path / "one")
    with pytest.raises(InterruptedError):
        run(tmp_path / "two", stop_at=3)
    resumed, again = run(tmp_path / "two")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert history == again


@pytest.mark.parametrize("which", ["compile", "rollout_compile"])
def test_the_copy_and_the_student_are_compiled_apart(base, which):
    learner = new_learner(base, "student", spec(**{which: "default"}))
    compiled = {
        name: {block._compiled_call_impl is not None for block in repeated_blocks(field.network)}
        for name, field in (("compile", learner.field), ("rollout_compile", learner.walker))
    }
    assert compiled == {name: {name == which} for name in compiled}


def test_nothing_moves_no_drift(base, encoded):
    learner = new_learner(base, "student", spec())
    given = inputs(base, encoded, stop=(0, 0, 0, 0))
    assert rollout_drift(learner.field, replace(learner.field, adapter=None), *given) == 0.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trainable": "full"}, "for trainable: lora"),
        ({"method": "joint"}, "for method danceopd or soft or dense"),
        ({"parallel": "shard"}, "parallel: shard"),
        ({"rollout_weights": "own", "rollout_drift": 0.1}, "remove it"),
        ({"rollout_weights": "own", "rollout_compile": "default"}, "remove it, or set compile"),
    ],
)
def test_what_does_not_fit_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        spec(**changes)
