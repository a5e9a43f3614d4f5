"""Flow-OPD: the stochastic path, its reward, its clipped surrogate."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from danceopd.methods.danceopd import DanceOPD
from danceopd.methods.flow_opd import CLIP, FlowOPD, Transition, clipped_surrogate
from danceopd.training.checkpoints import Checkpoints
from danceopd.training.learner import Learner

GRID = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])


def test_it_counts_its_forwards_and_leaves_the_teachers_alone(bench):
    assert bench.check_counting_and_teachers(FlowOPD()).forwards_per_sample == 2 * 4  # the last of 3 steps is left out


@pytest.mark.slow
def test_it_learns(bench):
    bench.check_learning("local_edit", method="flow_opd")


@pytest.mark.parametrize("step", range(4))
def test_the_transition_is_flow_grpos(step):
    sigma, width = float(GRID[step]), float(GRID[step] - GRID[step + 1])
    s = 0.7 * (sigma / (1 - (0.9 if step == 0 else sigma))) ** 0.5
    z, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    drift = v + s**2 / (2 * sigma) * (z + (1 - sigma) * v)
    transition = Transition.at(GRID, step)
    torch.testing.assert_close(transition.mean(z, v), z - width * drift)
    assert transition.deviation == pytest.approx(s * width**0.5)


@pytest.mark.parametrize("step", range(4))
def test_the_reward_is_the_kl_of_the_two_gaussians_as_in_the_paper(step):
    z, v, w = (torch.randn(2, 3, 4) for _ in range(3))
    transition = Transition.at(GRID, step)
    mine, other = transition.mean(z, v), transition.mean(z, w)
    exact = kl_divergence(Normal(mine, transition.deviation), Normal(other, transition.deviation)).mean((1, 2))
    torch.testing.assert_close(transition.kl(mine, other), exact)
    sigma, width = float(GRID[step]), float(GRID[step] - GRID[step + 1])
    s = transition.deviation / width**0.5
    factor = width / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2
    torch.testing.assert_close(exact, factor * (v - w).square().mean((1, 2)), rtol=1e-4, atol=1e-6)


def test_the_sde_keeps_the_marginals_of_the_ode():
    """Data N(0, 0.25): the velocity is known, and the SDE's states have the variance of the interpolation."""
    grid, state = torch.linspace(1, 0, 201), torch.randn(20_000, 1, 1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 150):  # from the second level, where the state is still nearly noise
        sigma = float(grid[step])
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        velocity = (sigma - (1 - sigma) * 0.25) / variance * state
        transition = Transition.at(grid, step)
        state = transition.mean(state, velocity)
        state = state + transition.deviation * torch.randn(state.shape, generator=generator)
    sigma = float(grid[150])
    assert state.var() == pytest.approx((1 - sigma) ** 2 * 0.25 + sigma**2, rel=0.04)


def test_the_log_density_is_the_gaussians_but_for_a_constant():
    transition = Transition.at(GRID, 1)
    mean, value = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    exact = Normal(mean, transition.deviation).log_prob(value).mean((1, 2))
    difference = transition.log_density(value, mean) - exact
    torch.testing.assert_close(difference[0], difference[1])


def test_the_clip_ends_the_gradient_where_the_ratio_has_gone_far_enough():
    far = 10 * CLIP
    log_ratio = torch.tensor([far, -far, far, -far, CLIP / 2], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    losses = clipped_surrogate(advantage, log_ratio)
    losses.sum().backward()
    moves = log_ratio.grad != 0
    assert moves.tolist() == [False, True, True, False, True]
    assert float(losses[0].detach()) == pytest.approx(-(1 + CLIP))
    assert float(losses[2].detach()) == pytest.approx(float(log_ratio[2].detach().exp()))


@pytest.mark.slow
def test_the_mean_gradient_over_paths_is_that_of_the_kl(bench):
    """One step: the reward's gradient is (KL's factor) x the velocity loss's; the policy-gradient term averages out."""
    setup = bench.setup(1)
    learner, method = bench.learner(), FlowOPD()
    samples, total = 60, 0
    for seed in range(samples):
        [group] = bench.groups(setup, method, learner, tasks=("local_edit",))
        group.seeds[:] = [2 * seed, 2 * seed + 1]
        bench.update(method, [group], setup, learner)
    total = torch.cat([p.grad.flatten() for p in learner.parameters]) / samples
    transition = Transition.at(setup.grid(64, 64), 0)
    factor = transition.of_velocity**2 / (2 * transition.deviation**2)
    wanted = factor * bench.gradient(DanceOPD(), setup, tasks=("local_edit",))
    assert (total - wanted).norm() < 0.1 * wanted.norm()
    assert torch.nn.functional.cosine_similarity(total, wanted, dim=0) > 0.99


def test_its_paths_hang_on_the_seeds_alone(bench):
    whole, parts = bench.gradient(FlowOPD(), parts=1), bench.gradient(FlowOPD(), parts=2)
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(whole, bench.gradient(FlowOPD(), seed=1))


@pytest.mark.slow
def test_no_state_of_the_path_outlives_its_step(bench, monkeypatch):
    """When a step begins, only the state it starts from has a graph or a name: earlier ones are gone."""
    import gc
    import weakref

    setup, learner, method = bench.setup(5), bench.learner(), FlowOPD()
    [group] = bench.groups(setup, method, learner, tasks=("t2i",))
    seen, alive, real = [], [], bench.base.velocity

    def velocity(network, z, *rest):
        if network is learner.field.network:
            gc.collect()
            alive.append(sum(ref() is not None for ref in seen[1:]))  # the first is the group's own noise
            seen.append(weakref.ref(z))
        return real(network, z, *rest)

    monkeypatch.setattr(bench.base, "velocity", velocity)
    bench.update(method, [group], setup, learner)
    assert alive == [0, 0, 0, 0]


@pytest.mark.slow
def test_it_resumes_bit_for_bit(bench, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def run(folder=None):
        saves = None if folder is None else Checkpoints(folder, 2, "a run")
        field, history = bench.distill(saves, method="flow_opd", steps=6, checkpoint_every=2)
        return [p.detach().clone() for p in field.network.parameters()], history

    wanted = run()
    update, count = Learner.update, itertools.count()

    def crashing(self):
        if next(count) == 5:
            raise Crash
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", crashing)
        with pytest.raises(Crash):
            run(tmp_path)
    found = run(tmp_path)
    assert found[1] == wanted[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], wanted[0], strict=True))
