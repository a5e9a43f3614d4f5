"""The update: whose gradient, whose teacher, which samples, and that it learns."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from danceopd.config.recipe import DistillRecipe, FinetuneRecipe, LoraRecipe, SelectRecipe, WeightPhase
from danceopd.data.assemble import open_dataset
from danceopd.data.encode import encode_records
from danceopd.distill import distill
from danceopd.errors import UserError
from danceopd.finetune import finetune
from danceopd.flow.fields import VelocityField
from danceopd.flow.guidance import GuidedField
from danceopd.flow.losses import velocity_matching_loss
from danceopd.methods.base import Distillation, UpdateFigures
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.groups import draw_groups
from danceopd.methods.queries import NAMED, query_window
from danceopd.training import learner as training
from danceopd.training.learner import new_learner
from danceopd.training.selection import Selection, Validation

TEACHER_OF = {"t2i": "base", "local_edit": "editor", "global_style": "editor"}
WEIGHTS = {"t2i": 1.0, "local_edit": 1.0, "global_style": 2.0}


@pytest.fixture
def base(own_backbone):
    return own_backbone


@pytest.fixture(scope="module")
def encoded(backbone, small_data):
    return encode_records(backbone, open_dataset(small_data).records("train"), 64, 64, None, "k", targets=False)


def editor(base):
    """A teacher that differs from the base."""
    network = base.new_transformer()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "to_out" in name or "linear_out" in name:
                weight.mul_(20)
    return VelocityField("editor", base, network.requires_grad_(False))


def spec(**changes):
    return DistillRecipe(
        **({"lr": 1e-3, "steps": 3, "batch": 6, "rollout_steps": 3, "log_every": 1, "warmup": 2} | changes)
    )


def run(base, encoded, **changes):
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    return distill(base, encoded, teachers, TEACHER_OF, WEIGHTS, spec(**changes))


def drawn(base, encoded, learner, teachers, generator, **changes):
    """A setup and the groups of one small mixed batch."""
    setup = Distillation(base, encoded, teachers, TEACHER_OF, 3)
    by_task = encoded.rows_by_task()
    rows = [by_task[t][i] for t in TEACHER_OF for i in range(2)]
    tags = [t for t in TEACHER_OF for _ in range(2)]
    window = query_window("uniform")
    method = DanceOPD()
    return setup, draw_groups(setup, method, learner, rows, tags, WEIGHTS, window, generator, **changes)


def test_one_update_sends_gradient_to_the_student_alone(base, encoded):
    learner = new_learner(base, "student", spec())
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    setup, groups = drawn(base, encoded, learner, teachers, torch.Generator().manual_seed(0))
    figures = UpdateFigures()
    for group in groups:
        DanceOPD().accumulate(setup, learner, group, figures)
    assert all(p.grad is not None for p in learner.parameters)
    for field in teachers.values():
        assert all(p.grad is None for p in field.network.parameters())
    assert figures.samples == 6
    assert {task: len(v) for task, v in figures.losses.items()} == {"t2i": 2, "local_edit": 2, "global_style": 2}
    assert max(figures.losses["t2i"]) < 1e-10  # the student still is the base, its drawing teacher
    assert min(figures.losses["local_edit"]) > 1e-4


def test_forwards_are_the_steps_before_the_query_one_teacher_and_three(base, encoded):
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    for window in NAMED:
        learner = new_learner(base, "student", spec())
        setup = Distillation(base, encoded, teachers, TEACHER_OF, 6)
        rows = list(range(6))
        tags = [encoded.tasks[row] for row in rows]
        generator = torch.Generator().manual_seed(3)
        groups = draw_groups(setup, DanceOPD(), learner, rows, tags, WEIGHTS, query_window(window), generator)
        figures = UpdateFigures()
        with count_samples(base) as passed:
            for group in groups:
                DanceOPD().accumulate(setup, learner, group, figures)
        before_query = sum(int(group.stop.sum()) for group in groups)
        assert sum(passed) == before_query + 6 + 6  # rollout, teacher, student; its backward pass is two more
        assert figures.forwards == before_query + 4 * 6
        assert figures.forwards_per_sample == pytest.approx(before_query / 6 + 4)


def test_a_guided_teacher_counts_both_of_its_passes(base, encoded):
    guided = GuidedField(VelocityField("base", base, base.transformer), 3.0, base.encode_prompts([""])[0], True)
    learner = new_learner(base, "student", spec())
    setup, groups = drawn(
        base, encoded, learner, {"base": guided, "editor": editor(base)}, torch.Generator().manual_seed(0)
    )
    figures = UpdateFigures()
    with count_samples(base) as passed:
        for group in groups:
            DanceOPD().accumulate(setup, learner, group, figures)
    assert figures.forwards == sum(passed) + 2 * 6  # a backward pass is two


@contextmanager
def count_samples(base):
    """How many samples each forward pass held, through any network, in the block."""
    seen: list[int] = []
    real = base.velocity
    base.velocity = lambda network, z, *rest: (seen.append(len(z)), real(network, z, *rest))[1]
    try:
        yield seen
    finally:
        del base.velocity


@pytest.mark.parametrize("parts", [2, 5])
def test_a_batch_in_parts_gives_the_same_gradient(base, encoded, parts):
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    gradients = []
    for count in (1, parts):
        learner = new_learner(base, "student", spec())
        setup, groups = drawn(base, encoded, learner, teachers, torch.Generator().manual_seed(0), parts=count)
        assert [group.last for group in groups] == [False] * (len(groups) - 1) + [True]
        for group in groups:
            DanceOPD().accumulate(setup, learner, group, UpdateFigures())
        gradients.append([p.grad for p in learner.parameters])
    assert len(groups) > 2
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_curriculum_moves_samples_from_task_to_task(base, encoded):
    phases = (WeightPhase(until=0.5, weight=20.0), WeightPhase(until=1.0, weight=0.1))
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    weights = WEIGHTS | {"t2i": phases}
    _, history = distill(base, encoded, teachers, TEACHER_OF, weights, spec(steps=2, batch=12))
    first, second = (sum(entry["sigma_histogram"]["t2i"]) for entry in history)
    assert first > 8
    assert second == 1


def test_the_loss_is_the_float32_mean_and_stops_at_the_teacher():
    student = torch.randn(3, 4, 2, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(3, 4, 2, dtype=torch.bfloat16, requires_grad=True)
    loss = velocity_matching_loss(student, teacher)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (student.float() - teacher.float()).pow(2).flatten(1).mean(1))
    loss.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize(("trainable", "lr"), [("full", 5e-3), ("lora", 2e-2)])
def test_distillation_learns_and_leaves_the_base_as_it_was(base, encoded, trainable, lr):
    before = {name: p.clone() for name, p in base.transformer.named_parameters()}
    changes = {"trainable": trainable, "lora": LoraRecipe(rank=8, alpha=16), "steps": 25, "lr": lr}
    student, history = run(base, encoded, **changes)
    assert history[-1]["loss"]["local_edit"] < 0.6 * history[0]["loss"]["local_edit"]
    now = dict(base.transformer.named_parameters())
    for name, weight in before.items():
        kept = now[name] if name in now else now[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(kept, weight)
    assert not any(p.requires_grad for p in student.network.parameters())


def test_a_student_may_start_from_a_teacher_and_leaves_it_alone(base, encoded):
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    before = teachers["editor"].network.proj_out.weight.clone()
    _, history = distill(base, encoded, teachers, TEACHER_OF, WEIGHTS, spec(start="editor", steps=1))
    assert history[0]["loss"]["local_edit"] < 1e-10  # it still is its editing teacher
    assert history[0]["loss"]["t2i"] > 1e-4
    assert torch.equal(teachers["editor"].network.proj_out.weight, before)


def test_the_same_seed_gives_the_same_student_and_another_seed_another(base, encoded):
    def weights(seed):
        return run(base, encoded, seed=seed)[0].network.proj_out.weight

    first = weights(1)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_history_counts_every_query_and_its_forwards(base, encoded):
    _, history = run(base, encoded, steps=4, log_every=2, window="semantic")
    assert [entry["step"] for entry in history] == [2, 4]
    assert sum(sum(bins) for bins in history[0]["sigma_histogram"].values()) == 12
    assert all(4 <= entry["forwards_per_sample"] <= 4 + 2 for entry in history)


def test_a_schedule_asks_early_first_and_late_afterwards(base, encoded):
    phases = [{"until": 0.5, "window": [0.9, 1.0]}, {"until": 1.0, "window": [0.0, 0.4]}]
    _, history = run(base, encoded, steps=4, log_every=2, window=phases)
    early, late = ([sum(b) for b in zip(*e["sigma_histogram"].values(), strict=True)] for e in history)
    assert sum(early[8:]) == sum(early) == 12
    assert sum(late[:4]) == sum(late) == 12


def test_previews_come_at_their_steps_and_at_the_end(base, encoded):
    seen = []
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    distill(
        base,
        encoded,
        teachers,
        TEACHER_OF,
        WEIGHTS,
        spec(steps=5, preview_every=2),
        preview=lambda field, step: seen.append((field.name, step)),
    )
    assert seen == [("student", 2), ("student", 4), ("student", 5)]


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_teacher_learns_its_task(base, small_data, trainable, optimizer):
    records = open_dataset(small_data).records("train", "global_style")
    encoded = encode_records(base, records, 64, 64, None, "k", targets=True)
    train = FinetuneRecipe(
        trainable=trainable,
        lora=LoraRecipe(rank=8, alpha=16),
        optimizer=optimizer,
        lr=1e-2,
        steps=40,
        batch=12,
        warmup=2,
        log_every=5,
        prompt_dropout=0.1,
    )
    _, history = finetune(base, "styler", encoded, train)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]


def test_averaged_weights_are_handed_over_and_shown_and_training_goes_on_from_the_last(base, encoded):
    shown = []
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}

    def weights_of(field):
        return field.network.proj_out.weight.detach().clone()

    def look(field, step):
        shown.append(weights_of(field))

    plain = [weights_of(run(base, encoded, steps=n, lr=1e-2)[0]) for n in (1, 2, 3)]
    averaged, _ = distill(
        base, encoded, teachers, TEACHER_OF, WEIGHTS, spec(lr=1e-2, steps=3, ema=0.5, preview_every=1), look
    )
    assert torch.equal(shown[-1], weights_of(averaged))
    assert not torch.allclose(weights_of(averaged), plain[-1])
    between = weights_of(averaged)
    start = base.transformer.proj_out.weight
    assert (between - start).norm() < (plain[-1] - start).norm()


def test_the_best_state_is_handed_over_and_patience_ends_training(base, encoded):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    seen = []

    def validate(field):
        seen.append(field.network.proj_out.weight.detach().clone())
        return Validation(next(scores), {"local_edit": 1.0})

    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    chosen = spec(steps=9, lr=1e-2, select=SelectRecipe(every=1, patience=2))
    student, history = distill(base, encoded, teachers, TEACHER_OF, WEIGHTS, chosen, validate=validate)
    assert len(seen) == 4
    assert torch.equal(student.network.proj_out.weight, seen[1])
    assert history[-1]["step"] == 4
    assert history[-1]["best_step"] == 2
    assert history[1]["validation"]["score"] == 0.5


def test_training_ends_when_the_gates_hold():
    selection, rule = Selection(), SelectRecipe(every=1, stop_when_held=True)
    selection.see(1, Validation(-0.2, {}), rule)
    assert not selection.ended
    selection.see(2, Validation(0.0, {}), rule)
    assert selection.ended


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_precision_and_recomputation_change_the_gradient_by_little(base, encoded, changes, trainable):
    """bfloat16 carries 8 bits: 3 % of the gradient's length; computing activations again changes nothing."""
    gradients = []
    teachers = {"base": VelocityField("base", base, base.transformer), "editor": editor(base)}
    for change in ({}, changes):
        other = load_backbone_again(base)
        learner = new_learner(other, "student", spec(trainable=trainable, **change))
        assert learner.field.network.is_gradient_checkpointing == ("activation_checkpointing" in change)
        wake(learner)
        setup, groups = drawn(other, encoded, learner, teachers, torch.Generator().manual_seed(0))
        with learner.precision():
            for group in groups:
                DanceOPD().accumulate(setup, learner, group, UpdateFigures())
        gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert difference < (0.03 if "precision" in changes else 1e-5)
    assert gradients[0].dtype == gradients[1].dtype == torch.float32
    if "precision" in changes:
        assert difference > 0


def load_backbone_again(base):
    from danceopd.backbones.flux2_klein import Flux2Klein

    pipeline = copy.deepcopy(base.pipeline)
    return Flux2Klein(pipeline, base.settings)


def wake(learner):
    """A fresh LoRA is no change at all: give it one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_velocity(base, encoded):
    """Within 1e-4 of the velocity's size."""
    learner = new_learner(base, "student", spec(trainable="lora", compile="default"))
    wake(learner)
    plain = VelocityField("student", base, base.transformer, adapter="student")
    blocks = base.transformer.transformer_blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    condition = encoded.condition([0, 1])
    z = torch.randn(2, *base.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.8, 0.3])
    with torch.no_grad():
        compiled = learner.field(z, sigma, condition)
        with torch.compiler.set_stance("force_eager"):
            eager = plain(z, sigma, condition)
    assert (compiled - eager).norm() < 1e-4 * eager.norm()


def test_fewer_samples_than_processes_are_refused(base, encoded, monkeypatch):
    alone = training.this_process()
    monkeypatch.setattr(training, "this_process", lambda: replace(alone, count=9))
    with pytest.raises(UserError, match=r"distill.batch 6: 9 processes need a sample each"):
        run(base, encoded)


def test_a_start_that_was_not_given_is_refused(base, encoded):
    with pytest.raises(UserError, match=r"distill\.start 'styler': no such field was given; there are: base, editor"):
        run(base, encoded, start="styler")
