"""The export of a student that processes share: written once, weight by weight, and proved without ever being whole."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import save_file

from danceopd.backbones.base import Condition
from danceopd.backbones.sharded import INDEX, rows_here, sharded_like, write_transformer
from danceopd.config.recipe import Recipe
from danceopd.errors import UserError
from danceopd.export.lora_files import export_lora
from danceopd.export.student import PIPELINE, PROBE, note_proof, probe_condition
from danceopd.files import FIELD, write_json
from danceopd.flow.field_io import probe, save_field
from danceopd.flow.fields import VelocityField
from danceopd.training.fsdp import shares_of
from danceopd.training.processes import Processes


def export_sharded(
    student: VelocityField, recipe: Recipe, scratch: Path, processes: Processes, condition: Condition | None = None
) -> None:
    """Write the pipeline folder, a LoRA merged into it and beside it as it is, and the probe to prove it by.

    Every process must call it; the main one writes, into its own folder. The transformer's weights are of the base's
    dtype, and a file a layer.

    Args:
        student: shared out among the processes.
        recipe: names the base's dtype and the picture's size.
        scratch: where the main process's export goes; the folders of the others stay empty.
        processes: those.
        condition: of `probe_condition`, in the main process; None: it reads the text encoder again for it.

    Raises:
        UserError: if what was written is, read back, not the student.
    """
    backbone, model = student.backbone, recipe.model
    shares = shares_of(student.network)
    assert shares is not None, "a student that is not shared out is exported by `export_student`"
    folder = Path(processes.gather(str(scratch))[0])
    condition = _shared(student, recipe, processes, condition)
    if student.adapter is not None:
        save_field(student, folder)
        export_lora(student, folder / "lora", condition)
    elif processes.main:
        write_json(folder / FIELD, {"kind": "full", "name": student.name})
    dtype = getattr(torch, model.dtype)
    written = shares.copy(student.network, model.attention, dtype, student.adapter)
    if processes.main:
        backbone.save(folder / PIPELINE, written)
    processes.wait()
    write_transformer(written.requires_grad_(False), folder / PIPELINE / "transformer")
    shares.lockstep.leave(written)
    del written  # before there is another
    # The export is proved in float32. What rounding to 16 bits did to the student is no fault of the export.
    again = shares.copy(student.network, model.attention, torch.float32, student.adapter, rounded=dtype)
    again.requires_grad_(False)
    field = VelocityField(student.name, backbone, again)
    wanted = probe(student if model.dtype == "float32" else field, condition)
    processes.wait()
    _read_rows(again, folder / PIPELINE / "transformer")
    found = probe(field, condition)
    shares.lockstep.leave(again)
    if processes.main:
        prompt = condition.prompt.float().cpu().contiguous()
        save_file({"velocity": wanted.contiguous(), "prompt": prompt}, folder / PROBE)
        note_proof(folder, found, wanted)


def _shared(student: VelocityField, recipe: Recipe, processes: Processes, condition: Condition | None) -> Condition:
    """What the student is asked under, in every process; the main one alone reads the text encoder, if it must."""
    if processes.main and condition is None:
        condition = probe_condition(student.backbone, recipe)
    prompt = None if condition is None else condition.prompt.cpu()
    processes.wait()
    prompt = processes.gather(prompt)[0]
    return Condition(prompt.to(processes.device), None, recipe.model.height, recipe.model.width)


@torch.no_grad()
def _read_rows(network: ModelMixin, folder: Path) -> None:
    """Put the rows that lie here of every weight in a transformer's folder in the place of a sharded network's own."""
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    own = dict(network.named_parameters())
    if lacking := sorted(set(own) - set(where)):
        raise UserError(f"{folder}: lacks {len(lacking)} weights, first {lacking[0]}; distill the student again")
    for file in sorted(set(where.values())):
        with safe_open(folder / file, framework="pt") as opened:
            for name, of in where.items():
                if of == file and name in own:
                    start, stop = rows_here(own[name])
                    rows = opened.get_slice(name)[start:stop].to(own[name].dtype)
                    own[name].copy_(sharded_like(rows, own[name]))
