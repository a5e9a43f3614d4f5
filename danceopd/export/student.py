"""A trained student as a pipeline folder, read back and proved to be the student."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.files import FIELD, hash_folder, read_json, write_json
from danceopd.workspace import Product

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    import torch

    from danceopd.backbones.base import Backbone, Condition
    from danceopd.flow.fields import Field, VelocityField


log = logging.getLogger(__name__)

PIPELINE, PROBE, PROOF = "pipeline", "probe.safetensors", "proof.json"
WEIGHT_FILES = "**/*.safetensors"
TOLERANCE = 5e-4  # of the velocity's size: other kernels round otherwise, another adapter or a lost one differs by more


def probe_condition(backbone: Backbone, recipe: Recipe) -> Condition:
    """What a student is asked under to be proved: two prompts, at the recipe's picture size."""
    from danceopd.backbones.base import Condition

    model = recipe.model
    return Condition(backbone.encode_prompts(["", recipe.name]), None, model.height, model.width)


def export_student(
    student: VelocityField, recipe: Recipe, base: Product, scratch: Path, condition: Condition | None = None
) -> None:
    """Write the pipeline folder (a LoRA merged into it, and beside it as it is) and the probe to prove it by.

    The transformer's weights are of the base's dtype and written layer by layer; no second network is ever whole.

    Args:
        student: to be exported.
        recipe: names the base's dtype and the picture's size.
        base: read again where the student trained on 8 bits, into which nothing can be merged.
        scratch: where it goes.
        condition: of `probe_condition`; None: the text encoder is read again for it.

    Raises:
        UserError: if what was written is, read back, not the student.
    """
    import torch

    from danceopd.backbones import load_backbone
    from danceopd.backbones.lora import load_lora
    from danceopd.backbones.sharded import outline_of, write_transformer
    from danceopd.backbones.streamed import OwnWeights, in_float32
    from danceopd.export.lora_files import export_lora
    from danceopd.flow.field_io import probe, save_field
    from danceopd.flow.fields import VelocityField

    backbone, model = student.backbone, recipe.model
    condition = probe_condition(backbone, recipe) if condition is None else condition
    whole = student
    if student.adapter is None:
        write_json(scratch / FIELD, {"kind": "full", "name": student.name})
    else:
        save_field(student, scratch)
        if model.quantize is not None:
            unquantized = model.model_copy(update={"quantize": None})
            network = load_backbone(base.pipeline, unquantized, condition.prompt.device).transformer
            load_lora(network, student.adapter, scratch / "lora")
            whole = VelocityField(student.name, backbone, network, student.adapter)
        export_lora(whole, scratch / "lora", condition)
    dtype = getattr(torch, model.dtype)
    weights = OwnWeights(whole.network, whole.adapter, dtype)
    backbone.save(scratch / PIPELINE, outline_of(whole.network))
    write_transformer(whole.network, scratch / PIPELINE / "transformer", weights)
    # What rounding to 16 bits did to the student is no fault of the export.
    device = condition.prompt.device
    if dtype == torch.float32 and model.quantize is None:
        write_probe(student, condition, scratch)
    else:
        plain = VelocityField(student.name, backbone, whole.network)
        with in_float32(whole.network, OwnWeights(whole.network, whole.adapter, torch.float32), device):
            trained = probe(plain, condition)
        with in_float32(whole.network, weights, device):
            moved = _difference(write_probe(plain, condition, scratch), trained)
        log.info("the export's rounding to %s moves the student's velocity by %.2g of its size", model.dtype, moved)
    prove_export(scratch, device)


def write_probe(field: Field, condition: Condition, folder: Path) -> torch.Tensor:
    """Write a field's velocity at fixed states, and the embeddings of the prompts it was asked under.

    Returns the velocity.

    The embeddings are kept because an encoder's own rounding differs from machine to machine by more than a proof may
    allow.
    """
    from safetensors.torch import save_file

    from danceopd.flow.field_io import probe

    velocity = probe(field, condition).contiguous()
    save_file({"velocity": velocity, "prompt": condition.prompt.float().cpu().contiguous()}, folder / PROBE)
    return velocity


def prove_export(folder: Path, device: torch.device | str = "cpu") -> float:
    """Read an exported student's transformer back, hold its velocity against the trained one's, and note the proof.

    The proof is made where the export is written; who takes the export over compares hashes (`check_export`). Weights
    are read block by block, and computed with in float32.

    Args:
        folder: holds the pipeline folder and the probe.
        device: where the transformer is asked.

    Returns:
        The greatest difference, as a share of the velocity's size (root mean square); at most `TOLERANCE`.

    Raises:
        UserError: if the probe is missing, the weights do not fit, or the velocity is another.
    """
    from safetensors.torch import load_file

    from danceopd.backbones import open_outline
    from danceopd.backbones.base import Condition
    from danceopd.backbones.streamed import StoredWeights, in_float32
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
    field = VelocityField("student", outline, outline.transformer.eval())
    condition = Condition(kept["prompt"].to(device), None, settings.height, settings.width)
    with in_float32(field.network, StoredWeights(outline.transformer, pipeline / "transformer"), device):
        found = probe(field, condition)
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
    difference = _difference(found, wanted)
    if not difference <= TOLERANCE:  # NaN is refused, too
        raise UserError(
            f"{pipeline}: the exported student is not the trained one (its velocity differs by {difference:.3g} of its "
            "size); the files were changed or the export is broken: distill the student again"
        )
    write_json(folder / PROOF, {"weights": hash_folder(pipeline, WEIGHT_FILES), "difference": difference})
    return difference


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The greatest difference of two velocities, as a share of the second one's size (root mean square)."""
    return float((found - wanted).abs().max() / wanted.square().mean().sqrt())


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
