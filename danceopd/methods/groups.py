"""Every random draw of a global batch, and each process's share of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from danceopd.backbones.base import Condition
from danceopd.flow.guidance import drop_prompts
from danceopd.methods.base import Distillation, Group, Method
from danceopd.methods.queries import QueryWindow
from danceopd.methods.routing import sample_weights
from danceopd.training.learner import Learner
from danceopd.training.processes import share


def draw_groups(
    setup: Distillation,
    method: Method,
    learner: Learner,
    rows: list[int],
    tags: list[str],
    weights: dict[str, float],
    window: QueryWindow,
    generator: torch.Generator,
    parts: int = 1,
) -> list[Group]:
    """Make every random draw of a global batch, and give this process its groups.

    Every process draws for the whole batch from its own copy of one generator and then keeps every n-th sample of a
    shape, so that the batch, its routes and its draws are the same however many processes share it.

    Args:
        setup: records and grids.
        method: how many draws a sample needs.
        learner: whose process and device.
        rows: row numbers of the batch.
        tags: their tasks.
        weights: task -> weight in the loss.
        window: where on the grid to ask.
        generator: for noise and query states, on the CPU.
        parts: pieces each shape's samples are split into, so that less lies in memory at once.
    """
    by_sample = sample_weights(tags, weights)
    device = learner.device
    groups: list[Group] = []
    before = 0
    for positions in setup.encoded.shape_groups(rows):
        count = len(positions)
        size = setup.encoded.size(rows[positions[0]])
        grid, levels, shape = setup.grid(*size), setup.levels(*size), setup.backbone.latent_shape(*size)
        stop = method.draw_queries(window, count, grid, generator)
        noise = torch.randn(count, *shape, generator=generator)
        dropped = _draw_dropped(setup.prompt_dropout, count, generator)
        seeds = torch.randint(2**62, (count,), generator=generator).tolist() if method.seeded else []
        for part in share(count, learner.processes, parts, before):
            where = [positions[i] for i in part]
            picked = [rows[i] for i in where]
            condition = setup.encoded.condition(picked, device)
            groups.append(
                Group(
                    rows=picked,
                    tags=[tags[i] for i in where],
                    weights=by_sample[where],
                    condition=condition,
                    dropped=dropped[part],
                    trained=_without(setup, condition, dropped[part]),
                    noise=noise[part].to(device),
                    grid=grid,
                    levels=levels,
                    stop=stop[part],
                    seeds=[seeds[i] for i in part] if seeds else [],
                    last=False,
                )
            )
        before += count
    if groups:
        groups[-1] = replace(groups[-1], last=True)
    return groups


def _draw_dropped(share_of: float, count: int, generator: torch.Generator) -> Tensor:
    """Which of the samples are trained with the empty prompt, (count,), bool; nothing is drawn where none is."""
    if share_of == 0:
        return torch.zeros(count, dtype=torch.bool)
    return torch.rand(count, generator=generator) < share_of


def _without(setup: Distillation, condition: Condition, dropped: Tensor) -> Condition:
    if not bool(dropped.any()):
        return condition
    assert setup.empty is not None, "dropping prompts needs the empty prompt's embedding"
    return drop_prompts(setup.backbone, condition, setup.empty, dropped)
