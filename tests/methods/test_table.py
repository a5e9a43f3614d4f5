"""The table of methods is the recipe's, and each knob is for those that read it."""

from __future__ import annotations

import math

import pytest
import torch

from danceopd.config.recipe import MERGES, METHODS
from danceopd.errors import UserError
from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.table import MERGED, TRAINED, merge_rule_of, method_of, needs_targets


def test_the_recipes_names_are_the_tables(bench):
    assert set(METHODS) == {*TRAINED, *MERGED} and set(MERGES) == set(MERGED)
    assert isinstance(method_of(bench.spec()), DanceOPD)
    with pytest.raises(UserError, match=r"method that trains: 'merge_ties'.*danceopd"):
        method_of(bench.spec(method="merge_ties"))
    with pytest.raises(UserError, match=r"weight merge: 'dense'.*merge_average"):
        merge_rule_of(bench.spec(method="dense"))


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("off_policy", True),
        ("joint", True),
        ("soft", False),
        ("dense", False),
        ("merge_ties", False),
        ("danceopd", False),
    ],
)
def test_who_trains_on_target_images_says_so(bench, name, needs):
    assert needs_targets(bench.spec(method=name)) == needs


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in MERGES])
def test_every_method_trains_a_lora_in_low_precision_with_activations_computed_again(bench, name):
    before = [p.clone() for p in bench.teachers["editor"].network.parameters()]
    changes = {"trainable": "lora", "precision": "bfloat16", "activation_checkpointing": True, "steps": 2}
    learner, setup, method = bench.learner(), bench.setup(), method_of(bench.spec(method=name))
    plain = bench.update(method, bench.groups(setup, method, learner), setup, learner)
    student, history = bench.distill(method=name, **changes)
    assert all(math.isfinite(loss) for entry in history for loss in entry["loss"].values())
    assert history[0]["grad_norm"] > 0
    assert student.adapter == "student"
    if name in ("joint", "diffusion_opd", "flow_opd"):  # whose cost depends on no draw
        passes = len(plain.losses["t2i"]) // 2
        assert history[0]["forwards_per_sample"] == plain.forwards_per_sample + passes
    assert all(torch.equal(a, b) for a, b in zip(before, bench.teachers["editor"].network.parameters(), strict=True))
