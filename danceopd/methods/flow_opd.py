"""Flow-OPD: a stochastic rollout, the negative KL to the teacher as each step's reward, a clipped policy gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.methods.base import Distillation, Group, Method, UpdateFigures
from danceopd.methods.routing import routed_velocity
from danceopd.training.learner import Learner

NOISE_LEVEL = 0.7  # a of the SDE: Flow-GRPO's and Flow-OPD's
CLIP = 1e-4  # the published code's bound on the ratio
MAX_ADVANTAGE = 5.0  # and on the reward's size


@dataclass(frozen=True)
class Transition:
    """One Euler-Maruyama step of the SDE as a Gaussian policy: N(mean, deviation^2 I).

    Flow-GRPO (arXiv 2505.05470, eq. 9), in this project's sigma: with s = a sqrt(sigma / (1 - sigma)),
    mean = z (1 - s^2 dt / (2 sigma)) - dt v (1 + s^2 (1 - sigma) / (2 sigma)), deviation = s sqrt(dt), where dt > 0 is
    the step's width. It keeps the marginals of the ODE. At sigma = 1, where s is infinite, the grid's next level
    stands in for sigma in 1 - sigma.

    Attributes:
        of_state: factor of z in the mean.
        of_velocity: factor of v in the mean.
        deviation: standard deviation of each entry.
    """

    of_state: float
    of_velocity: float
    deviation: float

    @classmethod
    def at(cls, grid: Tensor, step: int) -> Transition:
        """The transition from `grid[step]` to `grid[step + 1]` of a sampling grid (steps + 1,), falling."""
        sigma, after, second = (float(grid[i]) for i in (step, step + 1, 1))
        width = sigma - after
        square = NOISE_LEVEL**2 * sigma / (1 - (second if sigma >= 1 else sigma))
        return cls(
            1 - square * width / (2 * sigma),
            -width * (1 + square * (1 - sigma) / (2 * sigma)),
            (square * width) ** 0.5,
        )

    def mean(self, state: Tensor, velocity: Tensor) -> Tensor:
        """The policy's mean (B, N, C), float32."""
        return self.of_state * state.float() + self.of_velocity * velocity.float()

    def kl(self, mean: Tensor, other: Tensor) -> Tensor:
        """KL between two such Gaussians with these means, per entry of the latent: (B,)."""
        return (mean - other).square().mean(dim=(1, 2)) / (2 * self.deviation**2)

    def log_density(self, value: Tensor, mean: Tensor) -> Tensor:
        """Log-density of `value` per entry of the latent, up to a constant: (B,)."""
        return -(value - mean).square().mean(dim=(1, 2)) / (2 * self.deviation**2)


def clipped_surrogate(advantage: Tensor, log_ratio: Tensor, clip: float = CLIP) -> Tensor:
    """PPO's clipped objective as a loss, of each sample: -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), (B,).

    Args:
        advantage: A, (B,).
        log_ratio: log-density of the action under the policy that learns, less that under the one that acted, (B,).
        clip: how far the ratio may move from 1 before a further gain counts no more.
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


class FlowOPD(Method):
    """Flow-OPD (arXiv 2605.08063): policy gradient on the student's stochastic path, each step rewarded with -KL.

    At each step the student's policy is the Gaussian of `Transition`; the routed teacher's, at the same state, has the
    same variance, so the KL of the two is closed: (dt / 2) (s (1 - sigma) / (2 sigma) + 1 / s)^2 |v - v_teacher|^2. Its
    negative is the step's reward and, clamped, stands in for the advantage in PPO's clipped surrogate.

    Where paper and release differ, the release is followed, but for one divisor. The paper detaches the reward; but
    this reward depends on the state alone, not on the action, so that its policy gradient by itself has mean zero and
    teaches nothing. The release differentiates the KL within the surrogate: the gradient's mean is then that of the
    KL, and the policy-gradient term adds variance. Also as released: log-density and KL are means over the latent's
    entries, the last step of the grid is left out, the loss is the mean over steps, no normalisation within groups. Not
    as released: the KL here is the one of the two Gaussians, divided by 2 s^2 dt; the release, like Flow-GRPO's,
    divides by 2 s^2, which weighs each step by its width once more.

    Not taken: the cold start (the recipe's `start` is the same for every method compared) and the anchor to an
    aesthetic teacher, an extra teacher the others lack. Each rollout makes one update, so the policy that acted is the
    one that learns: the ratio is 1 and the clip does not bind. So the pass that learns at a step also takes the step,
    and its state is freed then. The query window has no say. A sample costs, for every step but the last,
    1 teacher and 3 student forwards.
    """

    seeded = True

    def accumulate(self, setup: Distillation, learner: Learner, group: Group, figures: UpdateFigures) -> None:
        """See `Method`."""
        paths = [torch.Generator().manual_seed(seed) for seed in group.seeds]
        state, routes, divergences = group.noise, setup.routes(group.tags), []
        steps = max(len(group.grid) - 2, 1)
        for step in range(steps):
            sigma = group.grid[step].expand(len(group.rows)).to(state)
            transition = Transition.at(group.grid, step)
            target = routed_velocity(setup.teachers, routes, state, sigma, group.condition)
            noise = torch.stack([torch.randn(state.shape[1:], generator=path) for path in paths]).to(state)
            with learner.field.active():
                velocity = setup.backbone.velocity(learner.field.network, state, sigma, group.condition)
                mean = transition.mean(state, velocity)
                action = mean.detach() + transition.deviation * noise
                divergence = transition.kl(mean, transition.mean(state, target))
                log_density = transition.log_density(action, mean)
                advantage = (-divergence).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
                losses = clipped_surrogate(advantage, log_density - log_density.detach()) / steps
                sync = group.last and step == steps - 1
                learner.backward((losses * group.weights.to(losses)).sum(), sync=sync)
            divergences.append(divergence.detach())
            state = action.to(group.noise.dtype)
        sigmas = group.grid[:steps].to(group.noise).repeat(len(group.rows))
        spent = steps * (setup.teacher_forwards(group.tags) + len(group.rows) * learner.update_forwards)
        figures.add(group.tags, torch.stack(divergences, dim=1).flatten(), sigmas, spent)
