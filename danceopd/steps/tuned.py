"""A teacher's fine-tuning: its weights are a product of their own, whatever guides or proves the teacher afterwards.

Another guidance scale, more sampling steps or another metric make another teacher of the same weights in the time of
its proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.config.recipe import FinetunedTeacher
from danceopd.files import FIELD, link_folder, read_json, write_json
from danceopd.steps.cost import TRAINED
from danceopd.steps.encodings import Encoder, open_backbone
from danceopd.steps.run import Run
from danceopd.workspace import STEP, Product, make_product

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from danceopd.backbones.base import Condition
    from danceopd.flow.fields import Field

HISTORY = "history.json"


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned teacher's weights, on a base that is loaded.

    Attributes:
        encoder: of the run's records, with that base; its text encoder is not there any more.
        condition: what `ready` made.
        field: the teacher without guidance.
        product: where its weights lie, `field.json` and its training's history.
        facts: of its training; under `tuned` what an earlier run spent on it, to be added to what this one does.
    """

    encoder: Encoder
    condition: Condition
    field: Field
    product: Product
    facts: dict[str, Any]


def tune(run: Run, teacher: str, record: Callable[[dict], None], ready: Callable[[Encoder], Condition]) -> Tuned:
    """Fine-tune a teacher, or take the weights that an earlier run made from the same base, data and training.

    Args:
        run: its recipe says how.
        teacher: its name there, of kind `finetune`.
        record: called with every entry of the training's history.
        ready: encodes what is read after the training, while the encoders are there.

    Raises:
        Interrupted: after a save, if SIGTERM or Ctrl-C came.
        UserError: as `finetune` and `Encoder.train` do.
    """
    from danceopd.finetune import finetune
    from danceopd.flow.field_io import load_field, save_field
    from danceopd.training.checkpoints import Checkpoints
    from danceopd.training.fsdp import share_frozen, shares
    from danceopd.training.processes import this_process

    spec = run.recipe.teachers[teacher]
    assert isinstance(spec, FinetunedTeacher)
    trained: list[tuple[Encoder, Condition, Field]] = []

    def build(scratch: Path, checkpoints: Path) -> dict:
        encoder = Encoder(run, open_backbone(run, spec.train))
        encoded, empty = encoder.train((spec.task,), targets=True), encoder.empty_prompt()
        condition = ready(encoder)
        encoder.backbone.free_encoders()  # everything is encoded
        saves = Checkpoints(checkpoints, spec.train.keep_checkpoints, checkpoints.name)
        field, history = finetune(encoder.backbone, teacher, encoded, spec.train, saves, record, empty)
        write_json(scratch / HISTORY, history)
        save_field(field, scratch)
        trained.append((encoder, condition, field))
        return _facts(spec, history[-1]["loss"])

    decisive = spec.decisive()
    inputs = [run.base.digest, run.recipe.model.decisive(), run.data.facts["content"], decisive["task"]]
    product = make_product(
        run.workspace, "tuned", teacher, [*inputs, decisive["train"]], build, together=True, journal=False
    )
    told = {name: product.facts[name] for name in ("task", "steps", "loss")}
    if trained:
        return Tuned(*trained[0], product, told | {"forwards": product.facts["forwards"]})
    encoder, processes = Encoder(run, open_backbone(run, spec.train)), this_process()
    condition = ready(encoder)
    encoder.backbone.free_encoders()
    for entry in read_json(product.folder / HISTORY):
        record(entry)
    field = load_field(encoder.backbone, teacher, product.folder)
    if shares(spec.train, processes):  # the base may be too large for one of them
        share_frozen(encoder.backbone, [field], processes)
    spent = {"seconds": read_json(product.folder / STEP)["seconds"]}
    spent |= {name: product.facts[name] for name in ("hardware", "forwards")}
    return Tuned(encoder, condition, field, product, told | {"tuned": spent})


def link_weights(product: Product, folder: Path) -> None:
    """A tuned product's weights and history in a teacher's folder, under a second name where that can be."""
    link_folder(product.folder, folder, but=(STEP, FIELD))  # the teacher has its own


def _facts(spec: FinetunedTeacher, loss: float) -> dict[str, Any]:
    from danceopd.devices import hardware
    from danceopd.training.processes import this_process

    processes, train = this_process(), spec.train
    return {
        "task": spec.task,
        "steps": train.steps,
        "loss": loss,
        "forwards": TRAINED * train.batch * train.steps,
        "hardware": hardware(processes.device, processes.count),
    }
