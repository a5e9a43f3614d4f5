"""A trained student as a pipeline folder, read back and proved to be the student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.workspace import Product

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from danceopd.flow.fields import VelocityField


PIPELINE, PROBE = "pipeline", "probe.safetensors"
TOLERANCE = 1e-4


def export_student(student: VelocityField, recipe: Recipe, base: Product, scratch: Path) -> None:
    """Write the pipeline folder (a LoRA merged into it, and beside it as it is) and the probe to prove it by."""
    from safetensors.torch import save_file

    from danceopd.backbones import load_backbone
    from danceopd.backbones.base import Condition
    from danceopd.backbones.lora import load_lora, plain_copy
    from danceopd.export.lora_files import export_lora
    from danceopd.flow.field_io import probe, save_field
    from danceopd.flow.fields import VelocityField

    backbone, model = student.backbone, recipe.model
    condition = Condition(backbone.encode_prompts(["", recipe.name]), None, model.height, model.width)
    save_field(student, scratch)
    if student.adapter is None:
        exported = student
        shutil.rmtree(scratch / "transformer")  # the pipeline folder holds it
    else:
        whole = student
        if model.quantize is not None:  # nothing can be merged into 8 bits: take the base as it was
            plain = model.model_copy(update={"quantize": None})
            network = load_backbone(base.pipeline, plain, condition.prompt.device).transformer
            load_lora(network, student.adapter, scratch / "lora")
            whole = VelocityField(student.name, backbone, network, student.adapter)
        export_lora(whole, scratch / "lora", condition)
        exported = VelocityField(student.name, backbone, plain_copy(whole.network, merge=student.adapter))
    backbone.save(scratch / "pipeline", exported.network)
    rounded = model.dtype != "float32" or model.quantize is not None  # the base is, and the export is not
    proved = exported if rounded else student
    save_file({"velocity": probe(proved, condition).contiguous()}, scratch / "probe.safetensors")


def verify_export(pipeline: Path, recipe: Recipe, probe_reference: Path) -> float:
    """Read an exported pipeline back, as a user would, and compare its velocity with the trained student's.

    Args:
        pipeline: the exported folder.
        recipe: its name is one of the two probe prompts; the other is empty.
        probe_reference: safetensors file with `velocity` (2, N, C), taken from the student in memory.

    Returns:
        The greatest absolute difference, at most `TOLERANCE` off.

    Raises:
        UserError: if the reference is missing, or the velocity is another.
    """
    import torch
    from safetensors.torch import load_file

    from danceopd.backbones import Condition
    from danceopd.flow.field_io import probe
    from danceopd.inference.generate import open_student

    if not Path(probe_reference).is_file():
        raise UserError(f"{probe_reference}: no such file; distill the student again, so that its export can be proved")
    wanted = load_file(probe_reference).get("velocity")
    if wanted is None:
        raise UserError(f"{probe_reference}: holds no 'velocity'; distill the student again")
    drawer = open_student(pipeline)
    settings, prompts = drawer.settings, drawer.field.backbone.encode_prompts(["", recipe.name])
    found = probe(drawer.field, Condition(prompts, None, settings.height, settings.width))
    if found.shape != wanted.shape:
        shapes = f"{tuple(found.shape)}, the trained student's is {tuple(wanted.shape)}"
        raise UserError(f"{pipeline}: the velocity's shape is {shapes}; export the student again")
    difference = float((found - wanted).abs().max())
    if not torch.allclose(found, wanted, atol=TOLERANCE):
        raise UserError(
            f"{pipeline}: the exported student is not the trained one (its velocity differs by {difference:.3g}); "
            "the files were changed or the export is broken: distill the student again"
        )
    return difference
