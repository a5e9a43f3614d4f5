"""Processes that share a network's weights pass through it together, though each has samples of its own.

Every pass gathers weights from all processes, so all must make it. But how far a rollout goes, which teachers a batch
asks, and how many groups of samples there are differ from process to process. So before each pass they tell each other
which one they are about to make. The first in a fixed order is made by all: those that wanted another one, or have
nothing left to do, make it on the inputs they had last, and drop the answer. They would have to wait anyway.

The order: passes without a gradient first, and of those through the student before those through teachers, so that all
have rolled out when the first teacher is asked; a backward pass when nobody wants one of those; the pass that learns
when nobody is in the middle of one; the end of the update when nobody wants anything. So all learn together, and a
process that has no more samples adds a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from danceopd.training.processes import Processes

# What a process is about to do; the least is done by all. Below these is the pass without a gradient through a network:
# minus its number, so that the one that joined last, the student, comes first.
_BACKWARD, _LEARN, _END = 1, 2, 3


class Lockstep:
    """Keeps the passes of some processes together.

    Args:
        processes: those; every one makes one of these and lets the same networks join in the same order.
    """

    def __init__(self, processes: Processes):
        self._processes = processes
        self._networks: list[nn.Module | None] = []
        self._passed: set[int] = set()  # since the last update's end
        self._inputs: tuple[tuple, dict[str, Any]] = ((), {})  # of this process's last own pass
        self._waits: Tensor | None = None  # for a backward pass: what a pass on behalf of the others gave
        self._helps = False
        self._learner: nn.Module | None = None
        self._learning: Callable[[], AbstractContextManager[Any]] | None = None

    def join(self, network: nn.Module) -> None:
        """Let a sharded network's passes be made by all."""
        number = len(self._networks)
        self._networks.append(network)
        network.register_forward_pre_hook(partial(self._before, number), prepend=True, with_kwargs=True)

    def leave(self, network: nn.Module) -> None:
        """Let go of a network that makes no more passes; every process must."""
        self._networks = [None if other is network else other for other in self._networks]

    def learns(self, network: nn.Module, within: Callable[[], AbstractContextManager[Any]]) -> None:
        """Name the one network that trains.

        Args:
            network: it has joined.
            within: gives the context that its pass is made in: precision, adapter.
        """
        self._learner, self._learning = network, within

    def ends_learning(self) -> None:
        """Let go of the network that trained, which may make other passes still, and of its optimizer."""
        self._learner, self._learning, self._inputs = None, None, ((), {})

    def before_backward(self) -> None:
        """Call before the backward pass of each pass that learns."""
        self._take_turns(_BACKWARD)

    def end(self) -> None:
        """Call when this process has made all its passes of an update: it makes those of the others with them."""
        self._take_turns(_END)
        for number in self._passed:
            network = self._networks[number]
            if isinstance(network, FSDPModule):
                network.reset_iter_state()  # it would note the order of all passes without a gradient for ever
        self._passed.clear()

    def _before(self, number: int, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._passed.add(number)
        if self._helps:
            return
        self._inputs = (args, kwargs)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in network.parameters())
        if learns and network is not self._learner:
            raise RuntimeError("a pass that would learn through a network that does not train here")
        self._take_turns(_LEARN if learns else -number)

    def _take_turns(self, mine: int) -> None:
        """Help the others until it is this process's turn."""
        while (turn := self._processes.least(mine)) != mine:
            with self._helping():
                self._help(turn)

    @contextmanager
    def _helping(self) -> Iterator[None]:
        self._helps = True
        try:
            yield
        finally:
            self._helps = False

    def _help(self, turn: int) -> None:
        args, kwargs = self._inputs
        if turn == _BACKWARD:
            if self._waits is None:
                raise RuntimeError("a method made two passes that learn before one backward pass, or none; sharded")
            assert self._learning is not None, "no network was named as the learner"
            waits, self._waits = self._waits, None
            # Activations that are computed again must be those of the pass: with the learner's adapter on.
            with self._learning(), torch.autocast(self._processes.device.type, enabled=False):
                waits.backward()
        elif turn == _LEARN:
            assert self._learner is not None and self._learning is not None, "no network was named as the learner"
            with torch.enable_grad(), self._learning():
                answer = self._learner(*args, **kwargs)
                answers = [t.float().sum() for t in tree_leaves(answer) if isinstance(t, Tensor)]
                self._waits = 0 * torch.stack(answers).sum()
        else:
            network = self._networks[-turn]
            assert network is not None, "a pass through a network that all let go of"
            with torch.no_grad():
                network(*args, **kwargs)
