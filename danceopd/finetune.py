"""Flow-matching fine-tuning of one teacher on one task's paired targets."""

from __future__ import annotations

import torch

from danceopd.backbones.base import Backbone, Condition
from danceopd.data.encoded import EncodedRecords
from danceopd.fields import VelocityField
from danceopd.objectives import flow_matching_loss
from danceopd.progress import StepProgress
from danceopd.recipe import FinetuneRecipe
from danceopd.resume import Checkpoints, resumable
from danceopd.routing import TaskSampler
from danceopd.training import new_learner


def finetune(
    backbone: Backbone,
    name: str,
    encoded: EncodedRecords,
    spec: FinetuneRecipe,
    checkpoints: Checkpoints | None = None,
) -> tuple[VelocityField, list[dict]]:
    """Fine-tune the base on encoded records with targets (they should be of one task).

    Args:
        backbone: the base; its own weights stay as they are.
        name: the teacher's name.
        encoded: training records, all with targets.
        spec: the recipe's section.
        checkpoints: where training is saved, and resumed from; None: it is not.

    Returns:
        The teacher's field, frozen, and its history: one {"step", "loss", "grad_norm"} a logged step.

    Raises:
        Interrupted: after a save, if SIGTERM came.
    """
    learner = new_learner(backbone, name, spec)
    device = learner.accelerator.device
    sampler = TaskSampler({"all": list(range(len(encoded.tasks)))}, {"all": 1.0}, spec.batch, spec.seed)
    generator = torch.Generator().manual_seed(spec.seed)
    empty = backbone.encode_prompts([""])[0].to(device)
    progress = StepProgress(f"finetune {name}", spec.steps, spec.log_every)
    with resumable(checkpoints, spec, learner, sampler, generator) as keeper:
        history: list[dict] = keeper.kept.get("history", [])
        for step in progress.steps(keeper.start):
            rows, _ = sampler.draw()
            total = 0.0
            with learner.field.active():
                for group in encoded.shape_groups(rows):
                    picked = [rows[i] for i in group]
                    condition = _drop_prompts(encoded.condition(picked, device), empty, spec.prompt_dropout, generator)
                    clean = encoded.target(picked, device)
                    loss = flow_matching_loss(backbone, learner.field.network, clean, condition, generator)
                    learner.accelerator.backward(loss * len(picked) / len(rows))
                    total += loss.item() * len(picked) / len(rows)
            norm = learner.update()
            progress.show(step, loss=total)
            if (step + 1) % spec.log_every == 0 or step + 1 == spec.steps:
                history.append({"step": step + 1, "loss": total, "grad_norm": norm})
            keeper.after(step + 1, history=history)
    learner.field.network.requires_grad_(False).eval()
    return learner.field, history


def _drop_prompts(condition: Condition, empty: torch.Tensor, share: float, generator: torch.Generator) -> Condition:
    """Replace a share of the prompts by the empty one, so that the field keeps an unconditional side for guidance."""
    if share == 0:
        return condition
    dropped = (torch.rand(len(condition), generator=generator) < share).to(empty.device)
    prompt = torch.where(dropped[:, None, None], empty, condition.prompt)
    return Condition(prompt, condition.source, condition.height, condition.width)
