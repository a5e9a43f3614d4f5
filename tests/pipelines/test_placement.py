"""Placements: what ships, what overrides what, and one line for each mistake."""

from __future__ import annotations

import pytest

from danceopd.config.shipped import shipped_names
from danceopd.errors import UserError
from pipelines.placement import NEEDS, PLACEMENTS, Placement, load_placement


def read(tmp_path, text: str) -> Placement:
    path = tmp_path / "placement.yaml"
    path.write_text(text)
    return load_placement(str(path))


@pytest.mark.parametrize("name", ["gke-h100", "gpu"])
def test_what_ships_places_every_gpu_step_on_a_gpu_and_no_other(name):
    assert name in shipped_names(PLACEMENTS)
    placement = load_placement(name)
    for step, needs in NEEDS.items():
        placed = placement.needs(step)
        assert bool(placed.accelerator) == bool(placed.tolerations) == bool(placed.shared_memory) == needs.gpu
    assert placement.needs("distill").hours == NEEDS["distill"].hours


def test_a_steps_own_goes_before_what_all_gpu_steps_get(tmp_path):
    placement = read(
        tmp_path,
        "retries: 5\n"
        "gpu: {accelerator: nvidia.com/gpu, cpu: [4, 8], node_selector: {pool: a}}\n"
        "steps: {distill: {cpu: [8, 16], retries: 1}, build_data: {hours: 3}, check_recipe: {retries: 2}}\n",
    )
    assert placement.needs("distill").cpu == (8, 16) and placement.needs("evaluate").cpu == (4, 8)
    assert placement.needs("distill").node_selector == {"pool": "a"}
    assert placement.needs("build_data").hours == 3 and placement.needs("build_data").cpu == NEEDS["build_data"].cpu
    wanted = {"distill": 1, "evaluate": 5, "check_recipe": 2}
    assert {step: placement.retries_of(step) for step in wanted} == wanted
    assert Placement().retries_of("check_recipe") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: {distil: {hours: 1}}", "no step is called 'distil'; steps are: check_recipe, .*distill"),
        ("secrets: [{name: s, env: {A: a}, steps: [x]}]", "secrets.s.steps: no step is called 'x'"),
        ("steps: {build_data: {accelerator: a/b}}", "steps.build_data.accelerator: it uses none; .*finetune, distill"),
        ("gpu: {acelerator: a/b}", "gpu.acelerator: no such field; here are: accelerator, cpu, "),
        ("steps: {distill: {hourz: 1}}", "steps.distill.hourz: no such field; here are: .*hours"),
        ("gpu: {tolerations: [{kye: a}]}", "tolerations.0.*(and 1 more)"),
        ("gpu: {cpu: [8, 4]}", r"gpu.cpu: \[8, 4\]: \[requested, at most\]"),
        ("claim: My Claim", "claim: String should match"),
        ("claim: claim_", "claim: String should match"),
        ("image_pull_secrets: [a b]", "image_pull_secrets.0: String should match"),
        ("retries: -1", "retries: Input should be greater"),
        ("image_pull_policy: Sometimes", "image_pull_policy: Input should be 'Always'"),
        ("- a", "a placement is a YAML mapping, this is list"),
        ("{", "not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
