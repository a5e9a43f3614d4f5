"""A trained student as a pipeline folder, read back and proved to be the student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.files import hash_folder, read_json, write_json
from danceopd.workspace import Product

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    import torch
    from diffusers import ModelMixin

    from danceopd.backbones.base import Condition
    from danceopd.flow.fields import VelocityField


PIPELINE, PROBE, PROOF = "pipeline", "probe.safetensors", "proof.json"
WEIGHT_FILES = "**/*.safetensors"
TOLERANCE = 5e-4  # of the velocity's size: other kernels round otherwise, another adapter or a lost one differs by more


def export_student(student: VelocityField, recipe: Recipe, base: Product, scratch: Path) -> None:
    """Write the pipeline folder (a LoRA merged into it, and beside it as it is) and the probe to prove it by."""
    from danceopd.backbones import load_backbone
    from danceopd.backbones.base import Condition
    from danceopd.backbones.lora import load_lora, plain_copy
    from danceopd.export.lora_files import export_lora
    from danceopd.flow.field_io import save_field
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
    backbone.save(scratch / PIPELINE, exported.network)
    rounded = model.dtype != "float32" or model.quantize is not None  # the base is, and the export is not
    write_probe(exported if rounded else student, condition, scratch)
    del exported  # a merged copy makes room for the one that is read back
    prove_export(scratch, condition.prompt.device)


def write_probe(field: VelocityField, condition: Condition, folder: Path) -> None:
    """Write a field's velocity at fixed states, and the embeddings of the prompts it was asked under.

    The embeddings are kept because an encoder's own rounding differs from machine to machine by more than a proof may
    allow.
    """
    from safetensors.torch import save_file

    from danceopd.flow.field_io import probe

    velocity = probe(field, condition).contiguous()
    save_file({"velocity": velocity, "prompt": condition.prompt.float().cpu().contiguous()}, folder / PROBE)


def prove_export(folder: Path, device: torch.device | str = "cpu") -> float:
    """Read an exported student's transformer back, hold its velocity against the trained one's, and note the proof.

    The proof is made where the export is written; who takes the export over compares hashes (`check_export`).

    Args:
        folder: holds the pipeline folder and the probe.
        device: where the transformer is asked.

    Returns:
        The greatest difference, as a share of the velocity's size (root mean square); at most `TOLERANCE`.

    Raises:
        UserError: if the probe is missing, or the velocity is another.
    """
    import torch
    from safetensors.torch import load_file

    from danceopd.backbones import open_outline
    from danceopd.backbones.base import Condition
    from danceopd.backbones.weights import read_transformer
    from danceopd.flow.field_io import probe
    from danceopd.flow.fields import VelocityField
    from danceopd.inference.generate import read_settings

    pipeline, file = folder / PIPELINE, folder / PROBE
    if not file.is_file():
        raise UserError(f"{file}: no such file; distill the student again, so that its export can be proved")
    kept = load_file(file)
    if lacking := [name for name in ("velocity", "prompt") if name not in kept]:
        raise UserError(f"{file}: holds no '{lacking[0]}'; distill the student again")
    settings, wanted = read_settings(pipeline), kept["velocity"]
    outline = open_outline(pipeline, settings)
    empty: ModelMixin = outline.transformer
    network = read_transformer(type(empty), pipeline / "transformer", torch.float32, empty.config).to(device).eval()
    condition = Condition(kept["prompt"].to(device), None, settings.height, settings.width)
    found = probe(VelocityField("student", outline, network), condition)
    return note_proof(folder, found, wanted)


def note_proof(folder: Path, found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Hold the velocity of an export that was read back against the trained student's, and note the proof.

    Returns:
        The greatest difference, as a share of the velocity's size (root mean square).

    Raises:
        UserError: if it is more than `TOLERANCE`.
    """
    pipeline = folder / PIPELINE
    if found.shape != wanted.shape:
        shapes = f"{tuple(found.shape)}, the trained student's is {tuple(wanted.shape)}"
        raise UserError(f"{pipeline}: the velocity's shape is {shapes}; export the student again")
    difference = float((found - wanted).abs().max() / wanted.square().mean().sqrt())
    if not difference <= TOLERANCE:  # NaN is refused, too
        raise UserError(
            f"{pipeline}: the exported student is not the trained one (its velocity differs by {difference:.3g} of its "
            "size); the files were changed or the export is broken: distill the student again"
        )
    write_json(folder / PROOF, {"weights": hash_folder(pipeline, WEIGHT_FILES), "difference": difference})
    return difference


def check_export(folder: Path) -> str:
    """The hash of an exported student's weights, which its proof must speak of; nothing is loaded.

    Raises:
        UserError: if there is no proof, or the files are not those it was made for.
    """
    if not (folder / PROOF).is_file():
        raise UserError(f"{folder / PROOF}: no such file; distill the student again, so that its export is proved")
    weights = hash_folder(folder / PIPELINE, WEIGHT_FILES)
    if read_json(folder / PROOF).get("weights") != weights:
        raise UserError(
            f"{folder / PIPELINE}: not the weights that were proved to be the trained student's; "
            "the files were changed: distill the student again"
        )
    return weights
