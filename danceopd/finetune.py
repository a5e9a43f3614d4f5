"""Flow-matching fine-tuning of one teacher on one task's paired targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.backbones.base import Backbone
from danceopd.config.recipe import FinetuneRecipe
from danceopd.data.encoded import EncodedRecords
from danceopd.data.sampler import TaskSampler
from danceopd.errors import UserError
from danceopd.flow.fields import VelocityField
from danceopd.flow.guidance import drop_prompts
from danceopd.flow.losses import flow_matching_loss
from danceopd.training.checkpoints import Checkpoints, resumable
from danceopd.training.finite import FiniteGuard
from danceopd.training.learner import new_learner
from danceopd.training.processes import Processes, share
from danceopd.training.progress import StepProgress


def finetune(
    backbone: Backbone,
    name: str,
    encoded: EncodedRecords,
    spec: FinetuneRecipe,
    checkpoints: Checkpoints | None = None,
    record: Callable[[dict], None] | None = None,
    empty: Tensor | None = None,
) -> tuple[VelocityField, list[dict]]:
    """Fine-tune the base on encoded records with targets (they should be of one task).

    Args:
        backbone: the base; its own weights stay as they are.
        name: the teacher's name.
        encoded: training records, all with targets.
        spec: the recipe's section.
        checkpoints: where training is saved, and resumed from; None: it is not.
        record: called with every entry of the history as it is made, and again after an interruption.
        empty: embedding of the empty prompt, (L, D); None: it is encoded now.

    Returns:
        The teacher's field, frozen, and its history: one {"step", "loss", "grad_norm"} per logged step.

    Raises:
        Interrupted: after a save, if SIGTERM or Ctrl-C came.
        UserError: if a loss, the gradient or a weight is not a finite number.
    """
    record = record or (lambda entry: None)
    learner = new_learner(backbone, name, spec)
    device, processes = learner.device, learner.processes
    if spec.batch < processes.count:
        raise UserError(f"teachers.{name}.train.batch {spec.batch}: {processes.count} processes need a sample each")
    sampler = TaskSampler({"all": list(range(len(encoded.tasks)))}, spec.seed)
    generator = torch.Generator().manual_seed(spec.seed)
    empty = (backbone.encode_prompts([""])[0] if empty is None else empty).to(device)
    progress = StepProgress(f"finetune {name}", spec.steps, spec.log_every)
    with resumable(checkpoints, spec, learner, sampler, generator) as keeper:
        history: list[dict] = keeper.kept.get("history", [])
        guard = FiniteGuard(learner.section, spec, encoded, keeper.kept.get("skipped", 0))
        for entry in history:
            record(entry)
        for step in progress.steps(keeper.start):
            rows, _ = sampler.draw({"all": spec.batch})
            parts = list(_parts(backbone, encoded, rows, spec, generator, processes))
            total, bad = 0.0, []
            with learner.field.active(), learner.precision():
                for part in parts:
                    condition = encoded.condition(part.rows, device)
                    condition = drop_prompts(backbone, condition, empty, part.dropped)
                    clean, noise, sigma = (
                        encoded.target(part.rows, device),
                        part.noise.to(device),
                        part.sigma.to(device),
                    )
                    losses = flow_matching_loss(backbone, learner.field.network, clean, condition, noise, sigma)
                    learner.backward(losses.sum() / len(rows), sync=part is parts[-1])
                    values = losses.tolist()
                    total += sum(values) / len(rows)
                    bad += [row for row, value in zip(part.rows, values, strict=True) if not math.isfinite(value)]
            norm = learner.update()
            found = processes.gather((total, bad))
            total = sum(of for of, _ in found)
            good = guard.good(step, norm, [row for _, of in found for row in of], rows)
            progress.show(step, loss=total)
            if good and ((step + 1) % spec.log_every == 0 or step + 1 == spec.steps):
                history.append({"step": step + 1, "loss": total, "grad_norm": norm})
                record(history[-1])
            keeper.after(step + 1, step + 1 == spec.steps, history=history, skipped=guard.skipped)
    learner.check_finite()
    return learner.finish(), history


@dataclass(frozen=True)
class _Part:
    """Samples of one shape processed at once: rows, whose prompt is dropped, noise eps, noise level sigma."""

    rows: list[int]
    dropped: Tensor
    noise: Tensor
    sigma: Tensor


def _parts(
    backbone: Backbone,
    encoded: EncodedRecords,
    rows: list[int],
    spec: FinetuneRecipe,
    generator: torch.Generator,
    processes: Processes,
) -> Iterator[_Part]:
    """This process's share of a batch, drawn for all of them, so that no draw depends on who takes which."""
    before = 0
    for group in encoded.shape_groups(rows):
        count = len(group)
        dropped = torch.zeros(count, dtype=torch.bool)
        if spec.prompt_dropout:
            dropped = torch.rand(count, generator=generator) < spec.prompt_dropout
        shape = backbone.latent_shape(*encoded.size(rows[group[0]]))
        noise = torch.randn(count, *shape, generator=generator)
        sigma = torch.rand(count, generator=generator)
        for part in share(count, processes, spec.accumulate, before):
            yield _Part([rows[group[i]] for i in part], dropped[part], noise[part], sigma[part])
        before += count
