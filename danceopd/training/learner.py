"""What fine-tuning and distillation share: the network that learns, its optimizer, one step of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danceopd.backbones.base import Backbone
from danceopd.backbones.kernels import compile_blocks
from danceopd.backbones.lora import adapter_parameters, add_lora, plain_copy
from danceopd.backbones.sharded import local, rows_here, sharded_like, whole
from danceopd.config.recipe import DistillRecipe, TrainRecipe
from danceopd.errors import UserError
from danceopd.flow.fields import Field, VelocityField
from danceopd.training.fsdp import Shares, mixed_precision, share_out
from danceopd.training.merged import MergedCopy
from danceopd.training.optim import build_optimizer, lr_factor
from danceopd.training.processes import Processes, this_process
from danceopd.training.shard_files import SavedTensor

if TYPE_CHECKING:
    from diffusers import ModelMixin


@dataclass
class Learner:
    """A field under training.

    Attributes:
        field: the student or teacher to be.
        processes: those that train it together.
        parameters: the weights that train, in float32.
        optimizer: over `parameters`.
        schedule: of the learning rate.
        spec: the recipe's section.
        average: exponential moving average of `parameters`, or None.
        best: the weights that validated best so far, or None.
        shares: what the processes share, of every weight; None: each holds all weights.
        merged: what rollouts follow in the field's place; None: the field itself.
    """

    field: VelocityField
    processes: Processes
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    spec: TrainRecipe
    average: list[Tensor] | None = None
    best: list[Tensor] | None = None
    shares: Shares | None = None
    merged: MergedCopy | None = None

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.processes.device

    @property
    def update_forwards(self) -> int:
        """What one forward and backward pass cost, in forwards; recomputed activations are one more."""
        return 4 if self.spec.activation_checkpointing else 3

    @property
    def walker(self) -> Field:
        """What the student's rollouts follow, as the last update left it."""
        return self.field if self.merged is None else self.merged.renewed()

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Run the block's matrix products in the recipe's precision; weights and their updates stay float32."""
        low = self.spec.precision == "bfloat16"
        # Casts kept from the rollout, which has no gradient, would cut the gradient of the pass that learns. PEFT would
        # cast a layer's input to the adapter's float32, for autocast to cast it back: two passes over it for nothing.
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=low, cache_enabled=False),
            disable_input_dtype_casting(self.field.network, active=low),
        ):
            yield

    @contextmanager
    def learning(self) -> Iterator[None]:
        """What a pass that learns is made in: the recipe's precision, with this field's adapter on."""
        with self.precision(), self.field.active():
            yield

    def backward(self, loss: Tensor, sync: bool = True) -> None:
        """Add a loss's gradient to what there is.

        Args:
            loss: this process's part of the global loss: parts add up, over calls and processes.
            sync: whether this is the process's last call before `update`. Shards are added up at every call, so that
                no whole gradient is kept.
        """
        if self.shares is not None:
            self.shares.lockstep.before_backward()
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()

    def update(self) -> float:
        """Add up the processes' gradients, clip them, step optimizer and schedule; returns the norm before clipping.

        With a norm that is not finite, the same in all processes, no weight changes: only the schedule goes on.
        """
        if self.shares is None:
            self.processes.sum_gradients(self.parameters)
        else:
            with self.precision():
                self.shares.lockstep.end()
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, self.spec.max_grad_norm)))
        if math.isfinite(norm):
            self.optimizer.step()
        with warnings.catch_warnings():  # torch warns where the first batch of all is left out
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if math.isfinite(norm):
            self._follow()
        if self.merged is not None:
            self.merged.stale = True
        return norm

    @torch.no_grad()
    def _follow(self) -> None:
        if self.average is None or self.spec.ema is None:
            return
        # A short memory at first: the start is not what should be remembered.
        done = self.schedule.last_epoch
        decay = min(self.spec.ema, done / (9 + done))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @property
    def section(self) -> str:
        """What the recipe calls the section that it trains by, for messages."""
        return "distill" if isinstance(self.spec, DistillRecipe) else f"teachers.{self.field.name}.train"

    def check_finite(self) -> None:
        """Look at every weight that trains; every process must call it.

        Raises:
            UserError: if one is not a finite number.
        """
        broken = any(not bool(torch.isfinite(p.detach()).all()) for p in map(local, self.parameters))
        if self.processes.any(broken):
            raise UserError(
                f"{self.section}: weights are not finite numbers any more; nothing is saved or exported. Lower "
                f"{self.section}.lr ({self.spec.lr:g})"
            )

    @contextmanager
    def shown(self) -> Iterator[VelocityField]:
        """The field as it would be handed over now: with the averaged weights, if there is an average.

        Shares that are gathered in 16 bits need the products in those, too.
        """
        with nullcontext() if self.shares is None else self.precision():
            if self.average is None:
                yield self.field
                return
            kept = [p.detach().clone() for p in self.parameters]
            self._put(self.average)
            try:
                yield self.field
            finally:
                self._put(kept)

    @torch.no_grad()
    def keep_best(self) -> None:
        """Remember the weights that `shown` shows as the best so far."""
        self.best = [w.detach().clone() for w in self.average or self.parameters]

    @torch.no_grad()
    def _put(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.copy_(weight)

    def finish(self) -> VelocityField:
        """The trained field, frozen: the best weights if any were kept, else the average, else the last.

        A field whose processes share it stays shared; its weights are float32 and gathered as that.
        """
        final = self.best or self.average
        if final is not None:
            self._put(final)
        network: ModelMixin = self.field.network
        if self.shares is not None:
            self.shares.lockstep.ends_learning()
            if self.field.adapter is None and self.spec.precision == "bfloat16":
                self.shares.lockstep.leave(network)
                network = self.shares.copy(network, self.field.backbone.settings.attention, torch.float32)
        if self.spec.activation_checkpointing:
            network.disable_gradient_checkpointing()
        network.requires_grad_(False).eval()
        return replace(self.field, network=network)

    def state_dict(self) -> dict:
        """Weights, averages, optimizer and schedule: all that an update changes; what is shared, as it is shared."""
        return {
            "weights": [p.detach() for p in self.parameters],
            "average": self.average,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` gave for a learner of the same recipe, however many processes shared that one."""
        self._put([_like(saved, p) for saved, p in zip(state["weights"], self.parameters, strict=True)])
        for name in ("average", "best"):
            saved = state[name]
            setattr(self, name, saved and [_like(w, p) for w, p in zip(saved, self.parameters, strict=True)])
        by_shape = {p.shape: p for p in self.parameters}
        if self.merged is not None:
            self.merged.stale = True
        self.optimizer.load_state_dict(_mapped(state["optimizer"], lambda t: _like(t, by_shape.get(t.shape))))
        self.schedule.load_state_dict(state["schedule"])


def _like(saved: Tensor | SavedTensor, parameter: Tensor | None) -> Tensor:
    """A saved tensor, or of one that is shared the rows that lie here, laid out as a parameter is."""
    if not isinstance(parameter, DTensor):
        tensor = saved.rows() if isinstance(saved, SavedTensor) else saved
        return tensor if parameter is None else tensor.to(parameter.device)
    start, stop = rows_here(parameter)
    rows = saved.rows(start, stop) if isinstance(saved, SavedTensor) else saved[start:stop].clone()
    return sharded_like(rows, parameter)


def _mapped(value: Any, change: Callable[[Any], Tensor]) -> Any:
    """A tree of dicts and lists with `change` made to each tensor."""
    if isinstance(value, Tensor | SavedTensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value


def new_learner(backbone: Backbone, name: str, spec: TrainRecipe, start: Field | None = None) -> Learner:
    """Start a field from the base: a copy of all its weights, or a fresh LoRA on the shared base.

    Args:
        backbone: the model family and base.
        name: the field's name.
        spec: what trains and how.
        start: a field whose weights are copied instead of the base's (full weights only).

    Raises:
        UserError: if nothing would train.
    """
    processes = this_process()
    shares = share_out(backbone, [] if start is None else [start], spec, name, processes)
    network: ModelMixin = backbone.transformer
    if spec.trainable == "lora":
        if shares is None:
            add_lora(network, name, spec.lora, backbone.lora_targets, spec.seed)
        field, parameters = VelocityField(name, backbone, network, adapter=name), adapter_parameters(network, name)
    else:
        if shares is not None:
            origin, merge = (network, None) if start is None else (start.network, start.adapter)
            attention, policy = backbone.settings.attention, mixed_precision(spec)
            network = shares.copy(origin, attention, torch.float32, merge, policy).requires_grad_(True)
        else:
            network = backbone.new_transformer() if start is None else plain_copy(start.network, merge=start.adapter)
            network = network.to(processes.device).float().requires_grad_(True)
        field, parameters = VelocityField(name, backbone, network), list(network.parameters())
    if spec.activation_checkpointing:
        network.enable_gradient_checkpointing()
    if spec.compile != "off":
        compile_blocks(network, spec.compile)
    optimizer = build_optimizer(parameters, spec.optimizer, spec.lr, spec.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, spec.steps, spec.warmup))
    average = None if spec.ema is None else [p.detach().clone() for p in parameters]
    merged = None
    if isinstance(spec, DistillRecipe) and spec.rollout_weights == "merged":
        merged = MergedCopy(field, spec.rollout_compile)
    learner = Learner(field, processes, parameters, optimizer, schedule, spec, average, shares=shares, merged=merged)
    if shares is not None:
        shares.lockstep.learns(network, learner.learning)
    return learner
