"""Each phase's memory and disk, told from configurations, against what the loaded base and a real export take."""

from __future__ import annotations

import pytest

from danceopd.backbones import load_backbone, open_outline
from danceopd.backbones.lora import add_lora
from danceopd.config.load import load_recipe
from danceopd.export.student import export_student, probe_condition
from danceopd.flow.fields import VelocityField
from danceopd.preflight.outlook import look_ahead
from danceopd.preflight.phases import parts_of

LORA = ["distill.trainable=lora", "distill.start=base", "distill.optimizer=adamw"]
TAUGHT = [f"teachers.{name}.train.{key}" for name in ("local_edit", "global_style") for key in ("trainable=lora",)]


@pytest.fixture
def recipe(tiny_base):
    def load(*settings):
        return load_recipe("world", [f"model.base={tiny_base}", "model.dtype=bfloat16", *LORA, *TAUGHT, *settings])

    return load


def size_of(module):
    return sum(p.nbytes for p in module.parameters())


def test_a_bases_parts_are_those_of_the_loaded_one(recipe, tiny_base):
    spec = recipe()
    loaded = load_backbone(tiny_base, spec.model)
    found = parts_of(spec, open_outline(tiny_base, spec.model), tiny_base)
    assert found.transformer == size_of(loaded.transformer)
    assert found.encoders == size_of(loaded.pipeline.text_encoder)
    assert found.autoencoder == size_of(loaded.pipeline.vae)


@pytest.mark.slow
def test_phases_hold_what_they_use_and_no_more(recipe, tiny_base, tmp_path):
    spec = recipe()
    base = parts_of(spec, open_outline(tiny_base, spec.model), tiny_base)
    ahead = look_ahead(spec, tmp_path)
    memory = {phase.name: phase.memory for phase in ahead.phases}
    assert memory["encode"] == base.coding
    assert memory["load"] == memory["generate"] == base.transformer + base.coding
    assert memory["register"] == 0
    assert memory["distill"] == ahead.held + ahead.training.total
    student = ahead.training.weights
    assert base.transformer < memory["fine-tune local_edit"] < memory["fine-tune local_edit"] + base.encoders
    assert memory["evaluate"] == ahead.held + student + base.coding
    assert memory["export"] < ahead.held + student + 4 * ahead.parameters, "no float32 copy of the base"
    whole = {phase.name: phase.memory for phase in look_ahead(recipe("distill.trainable=full"), tmp_path).phases}
    assert whole["evaluate"] == ahead.held + base.transformer + base.coding


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_export_of_a_shared_student_holds_a_copy_in_float32(recipe, tiny_base, tmp_path, processes):
    spec, found = recipe("distill.parallel=shard"), {}
    for name, of in (("shard", spec), ("replicate", recipe())):
        for count in (1, processes):
            ahead = look_ahead(of, tmp_path, count)
            [found[name, count]] = [phase.memory for phase in ahead.phases if phase.name == "export"]
    base = parts_of(spec, open_outline(tiny_base, spec.model), tiny_base)
    copied = 2 * base.transformer // processes  # the base is in 16 bits
    assert found["shard", processes] >= look_ahead(spec, tmp_path, processes).held + copied
    assert found["shard", 1] == found["replicate", processes] == found["replicate", 1]


@pytest.mark.slow
def test_disk_is_that_of_a_real_export(recipe, tiny_base, tmp_path):
    spec = recipe()
    backbone = load_backbone(tiny_base, spec.model)
    add_lora(backbone.transformer, "student", spec.distill.lora, backbone.lora_targets, 0)
    field = VelocityField("student", backbone, backbone.transformer.requires_grad_(False), "student")
    export_student(field, spec, None, tmp_path, probe_condition(backbone, spec))
    written = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    [said] = [phase.disk for phase in look_ahead(spec, tmp_path).phases if phase.name == "export"]
    assert abs(said - written) < 0.1 * written
