"""What fine-tuning and distillation share: the network that learns, its optimizer, one step of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from danceopd.adapters import adapter_parameters, add_lora, plain_copy
from danceopd.backbones.base import Backbone
from danceopd.fields import VelocityField
from danceopd.optim import build_optimizer, lr_factor
from danceopd.recipe import TrainRecipe


@dataclass
class Learner:
    """A field under training.

    Attributes:
        field: the student or teacher to be; its `network` is the plain module, for everything but the forward pass
            that is trained through.
        accelerator: Accelerate's, which owns the device and the backward pass.
        parameters: the weights that train.
    """

    field: VelocityField
    accelerator: Accelerator
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float

    def update(self) -> float:
        """Clip the gradients, step optimizer and schedule, clear the gradients; returns the norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> dict:
        """Weights, optimizer and schedule: all that an update changes."""
        weights = [parameter.detach() for parameter in self.parameters]
        return {
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` gave for a learner of the same recipe."""
        for parameter, saved in zip(self.parameters, state["weights"], strict=True):
            parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def new_learner(backbone: Backbone, name: str, spec: TrainRecipe, start: VelocityField | None = None) -> Learner:
    """Start a field from the base: a copy of all its weights, or a fresh LoRA on the shared base.

    Args:
        backbone: the model family and base.
        name: the field's name.
        spec: what trains and how.
        start: a field whose weights are copied instead of the base's (full weights only).

    Raises:
        UserError: if nothing would train.
    """
    accelerator = Accelerator()
    if spec.trainable == "lora":
        network = backbone.transformer
        add_lora(network, name, spec.lora, backbone.lora_targets, spec.seed)
        field, parameters = VelocityField(name, backbone, network, adapter=name), adapter_parameters(network, name)
    else:
        network = backbone.new_transformer() if start is None else plain_copy(start.network, merge=start.adapter)
        network = network.float().requires_grad_(True)
        field, parameters = VelocityField(name, backbone, network), list(network.parameters())
    optimizer = accelerator.prepare_optimizer(build_optimizer(parameters, spec.optimizer, spec.lr, spec.weight_decay))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer.optimizer, lambda step: lr_factor(step, spec.steps, spec.warmup)
    )
    return Learner(field, accelerator, parameters, optimizer, schedule, spec.max_grad_norm)


def batch_noise(count: int, shape: tuple[int, int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Fresh noise (count, N, C) on `like`'s device, drawn on the CPU so that every device sees the same."""
    return torch.randn(count, *shape, generator=generator).to(like)
