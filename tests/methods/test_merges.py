"""Weight merges: what each rule makes of the teachers' weights, and that nothing is trained."""

from __future__ import annotations

import pytest
import torch

from danceopd.backbones.lora import add_lora, plain_copy
from danceopd.config.recipe import LoraRecipe, SelectRecipe
from danceopd.errors import UserError
from danceopd.evaluation.plots import plot_history
from danceopd.flow.fields import VelocityField
from danceopd.methods.merges import TaskArithmetic, Ties, average, merge
from danceopd.methods.table import merge_rule_of
from danceopd.training.selection import Validation


def weights(field):
    return dict(field.network.named_parameters())


def assert_equal_fields(one, other, **tolerance):
    for name, weight in weights(other).items():
        torch.testing.assert_close(weights(one)[name], weight, **tolerance)


def flat_weights(*values):
    return {"a": torch.tensor(values[:2]), "b": torch.tensor(values[2:])}


def test_the_average_of_two_equal_teachers_is_that_teacher(bench):
    student = merge(bench.base, [bench.teachers["editor"]] * 2, average)
    assert_equal_fields(student, bench.teachers["editor"])


def test_the_average_lies_between(bench):
    student = merge(bench.base, list(bench.teachers.values()), average)
    for name, weight in weights(student).items():
        ends = [weights(field)[name] for field in bench.teachers.values()]
        torch.testing.assert_close(weight, (ends[0] + ends[1]) / 2)


def test_task_arithmetic_with_scale_one_of_one_teacher_is_that_teacher(bench):
    student = merge(bench.base, [bench.teachers["editor"]], TaskArithmetic(1.0))
    assert_equal_fields(student, bench.teachers["editor"])


def test_task_arithmetic_adds_scaled_task_vectors():
    base = flat_weights(1.0, 0.0, 0.0, 0.0)
    merged = TaskArithmetic(0.5)(base, [flat_weights(3.0, 0.0, 4.0, 0.0), flat_weights(1.0, 2.0, 2.0, 0.0)])
    torch.testing.assert_close(merged, flat_weights(2.0, 1.0, 3.0, 0.0))


def test_ties_resolves_signs_by_size_and_averages_those_that_agree():
    base = flat_weights(1.0, 1.0, 1.0, 1.0)
    teachers = [flat_weights(4.0, 1.0, 3.0, 2.0), flat_weights(-1.0, 1.0, 5.0, -4.0)]
    merged = Ties(density=1.0)(base, teachers)  # task vectors: (3, 0, 2, 1) and (-2, 0, 4, -5)
    torch.testing.assert_close(merged, flat_weights(1 + 3.0, 1.0, 1 + 3.0, 1 - 5.0))
    half = Ties(scale=0.5, density=1.0)(base, teachers)
    torch.testing.assert_close(half, flat_weights(1 + 1.5, 1.0, 1 + 1.5, 1 - 2.5))


def test_ties_trims_over_the_whole_network_before_it_elects():
    base = flat_weights(0.0, 0.0, 0.0, 0.0)
    teachers = [flat_weights(9.0, -8.0, 1.0, 1.0), flat_weights(-5.0, 1.0, 1.0, 6.0)]
    merged = Ties(density=0.5)(base, teachers)  # trimmed: (9, -8, 0, 0) and (-5, 0, 0, 6)
    torch.testing.assert_close(merged, flat_weights(9.0, -8.0, 0.0, 6.0))


def test_ties_of_one_whole_teacher_is_that_teacher(bench):
    student = merge(bench.base, [bench.teachers["editor"]], Ties(density=1.0))
    assert_equal_fields(student, bench.teachers["editor"])


def test_a_lora_is_merged_as_its_change_of_the_base(bench):
    before = {name: p.clone() for name, p in bench.base.transformer.named_parameters()}
    add_lora(bench.base.transformer, "styler", LoraRecipe(rank=4, alpha=8), bench.base.lora_targets, 0)
    with torch.no_grad():
        for name, parameter in bench.base.transformer.named_parameters():
            if ".styler." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    lora = VelocityField("styler", bench.base, bench.base.transformer, adapter="styler")
    whole = VelocityField("styler", bench.base, plain_copy(bench.base.transformer, merge="styler"))
    student = merge(bench.base, [lora, bench.teachers["base"]], TaskArithmetic(1.0))
    assert_equal_fields(student, whole)
    assert set(weights(student)) == set(before)
    assert any(not torch.equal(weights(student)[name], weight) for name, weight in before.items())


def test_a_teacher_of_another_architecture_is_refused(bench):
    other = VelocityField("editor", bench.base, torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="teacher 'editor': its weights differ in name or shape from the base's"):
        merge(bench.base, [other], average)


@pytest.mark.parametrize("name", ["merge_average", "merge_task_arithmetic", "merge_ties"])
def test_distill_hands_over_the_merge_and_a_history_without_losses(bench, tmp_path, name):
    before = [p.clone() for field in bench.teachers.values() for p in field.network.parameters()]
    shown = []
    with bench.counted() as passed:
        student, history = bench.distill(preview=lambda field, step: shown.append((field, step)), method=name)
    assert passed == []
    assert history == [{"step": 0, "loss": {}, "sigma_histogram": {}, "forwards_per_sample": 0.0}]
    assert shown == [(student, 0)]
    assert student.name == "student" and student.adapter is None
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in student.network.parameters())
    after = [p for field in bench.teachers.values() for p in field.network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    wanted = merge(bench.base, list(bench.teachers.values()), merge_rule_of(bench.spec(method=name)))
    assert_equal_fields(student, wanted, atol=0, rtol=0)
    plot_history(history, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_a_merge_is_validated_once_where_the_recipe_selects(bench):
    rule = SelectRecipe(every=1)
    _, [entry] = bench.distill(method="merge_average", select=rule, validate=lambda field: Validation(0.3, {"m": 1}))
    assert entry["validation"] == {"step": 0, "score": 0.3, "figures": {"m": 1}}
    assert entry["best_step"] == 0


def test_settings_reach_the_rule_and_default_to_the_papers(bench):
    def rule(**changes):
        return merge_rule_of(bench.spec(**changes))

    assert rule(method="merge_task_arithmetic") == TaskArithmetic(0.4)
    assert rule(method="merge_task_arithmetic", merge_scale=0.7) == TaskArithmetic(0.7)
    assert rule(method="merge_ties") == Ties(1.0, 0.2)
    assert rule(method="merge_ties", merge_scale=0.7, merge_density=0.5) == Ties(0.7, 0.5)
