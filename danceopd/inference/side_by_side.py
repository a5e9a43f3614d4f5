"""A student beside its teachers: finds what it was distilled from, and loads all of it on one base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as attribute
from pathlib import Path

import torch

from danceopd.backbones import load_backbone
from danceopd.backbones.bases import fetch_weights, find_base
from danceopd.config.sampling import Sampling, read_sampling
from danceopd.devices import best_device
from danceopd.errors import UserError
from danceopd.files import read_json
from danceopd.flow.field_io import field_kind, load_fields
from danceopd.flow.fields import Field, VelocityField
from danceopd.inference.generate import Drawer, own_dtype, read_settings
from danceopd.workspace import STEP, Product, open_product

STUDENT = "student"
_MEND = "name them: --teacher NAME=WEIGHTS, and --base for teachers that are LoRAs or the base itself"


@dataclass(frozen=True)
class Origins:
    """What a student was distilled from.

    Attributes:
        base: the base's pipeline folder; None: not known.
        teachers: by name, field folders or other weights that `checkpoint.field_kind` knows.
        samplings: how the run that made the student drew each of them; those that are missing are drawn as it is.
    """

    base: Path | None
    teachers: dict[str, Path]
    samplings: dict[str, Sampling] = attribute(default_factory=dict)


def find_origins(model: Path) -> Origins:
    """The base and the teachers of a student that lies where it was made: in its workspace, told apart by digest.

    Args:
        model: the student's pipeline folder.

    Raises:
        UserError: if it lies elsewhere, does not say, or one of them is gone.
    """
    folder = Path(model).resolve().parent
    if not (folder / STEP).is_file():
        raise UserError(f"{model}: not in the workspace it was made in, so its teachers are not known; {_MEND}")
    facts = open_product(folder).facts
    made_of = facts.get("made_of")
    if made_of is None:
        raise UserError(f"{folder / STEP}: does not say what the student was made of; {_MEND}")
    workspace = folder.parent.parent
    base = _product(workspace / "base", made_of["base"], "base")
    teachers = {
        name: _product(workspace / "teachers", digest, f"teacher {name!r}").folder
        for name, digest in made_of["teachers"].items()
    }
    drawn = {name: Sampling.model_validate(of) for name, of in facts.get("samplings", {}).items() if name in teachers}
    return Origins(base.pipeline, teachers, drawn)


def _product(folder: Path, digest: str, what: str) -> Product:
    for path in sorted(folder.glob(f"*/{STEP}")):
        if read_json(path)["digest"] == digest:
            return open_product(path.parent)
    raise UserError(f"{folder}: the {what} the student was made of is not there any more; {_MEND}")


def named_origins(base: str | None, teachers: Mapping[str, str], workspace: Path) -> Origins:
    """Teachers by the weights a user names.

    Args:
        base: as a recipe's `model.base` names it; None: every teacher must be a whole checkpoint.
        teachers: by name, what a recipe's `teachers.<name>.path` may name, or a teacher's folder of a workspace.
        workspace: where weights that lie elsewhere are downloaded to.

    Raises:
        UserError: if there are no such weights, a name is taken, or a teacher needs a base and none is named.
    """
    if STUDENT in teachers:
        raise UserError(f"--teacher {STUDENT}=...: that name is the student's own; choose another")
    found = {name: fetch_weights(where, workspace, f"--teacher {name}=") for name, where in teachers.items()}
    needy = [name for name, weights in found.items() if field_kind(weights) != "full"]
    if needy and base is None:
        raise UserError(f"teacher {needy[0]!r} is no whole checkpoint: it needs the base it belongs to; add --base")
    return Origins(None if base is None else find_base(base, None, workspace), found)


def open_side_by_side(model: Path, origins: Origins, dtype: str | None = None) -> tuple[Drawer, dict[str, Field]]:
    """Load a student and its teachers on one base.

    Args:
        model: the student's pipeline folder.
        origins: its base and teachers. Without a base the student's own pipeline serves as one.
        dtype: of the weights; None: the student's own.

    Returns:
        The student's drawer, and the columns in order: the teachers by name, then the student.

    Raises:
        UserError: if one of them cannot be loaded, or lives in another latent space.
    """
    dtype = dtype or own_dtype(model)
    settings = read_settings(model).model_copy(update={"dtype": dtype})
    backbone = load_backbone(origins.base or model, settings, best_device())
    fields: dict[str, Field] = dict(load_fields(backbone, origins.teachers))
    network = backbone.transformer
    if origins.base is not None:
        network = backbone.new_transformer(model, getattr(torch, dtype)).requires_grad_(False).eval()
    student = VelocityField(STUDENT, backbone, network)
    return Drawer(student, settings, read_sampling(model) or Sampling(), origins.samplings), fields | {STUDENT: student}
