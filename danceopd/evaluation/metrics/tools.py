"""What metrics look with: networks from folders the recipe names, and the judge; opened when first asked for.

Nothing is ever downloaded. What is not on the machine is told by `lacks`, before anything is drawn or opened.
"""

from __future__ import annotations

import os
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from danceopd.config.recipe import EvaluateRecipe
from danceopd.files import at_home, hash_file, hash_folder

if TYPE_CHECKING:
    import torch

    from danceopd.evaluation.judge import Judge
    from danceopd.evaluation.metrics.networks import Clip, Dino, Inception, Lpips

_WHAT = {
    "clip": "a folder with a CLIP model",
    "dino": "a folder with a DINOv2 model",
    "inception": "torch-fidelity's Inception weights",
}
_PACKAGES = {"inception": ("torch_fidelity", "torch-fidelity"), "lpips": ("torchvision", "torchvision")}
ALEXNET = "alexnet-owt-7be5be79.pth"  # as torchvision names it


def alexnet_path() -> Path:
    """Where torchvision keeps the AlexNet weights that LPIPS is built on."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
    return Path(home).expanduser() / "hub" / "checkpoints" / ALEXNET


def lacks(tool: str, spec: EvaluateRecipe) -> str | None:
    """Why a tool cannot be used on this machine, or None if it can; nothing is opened."""
    if tool == "judge":
        return _lacks_judge(spec)
    if tool in _PACKAGES and find_spec(_PACKAGES[tool][0]) is None:
        return f"the package {_PACKAGES[tool][1]} is not installed"
    if tool == "lpips":
        return None if alexnet_path().is_file() else f"{alexnet_path()}: no such file (torchvision's AlexNet weights)"
    place = getattr(spec.networks, tool)
    if place is None:
        return f"evaluate.networks.{tool} does not name {_WHAT[tool]}"
    there = at_home(place).is_file() if tool == "inception" else at_home(place).is_dir()
    return None if there else f"{place}: not there (evaluate.networks.{tool}: {_WHAT[tool]})"


def _lacks_judge(spec: EvaluateRecipe) -> str | None:
    if spec.judge is None:
        return "evaluate.judge does not name an endpoint"
    if spec.judge.key_env is not None and not os.environ.get(spec.judge.key_env):
        return f"the environment variable {spec.judge.key_env} is not set (evaluate.judge.key_env)"
    return None


def weights_of(tool: str, spec: EvaluateRecipe) -> str | None:
    """A hash of the weights a tool that is there looks with; None for the judge."""
    if tool == "judge":
        return None
    place = alexnet_path() if tool == "lpips" else at_home(getattr(spec.networks, tool))
    return hash_folder(place) if place.is_dir() else hash_file(place)


class Tools:
    """The tools of one evaluation.

    Args:
        spec: where networks lie, and the judge's endpoint.
        device: where networks run; default: the accelerator if there is one.
        cache: folder for the judge's answers, or None.
    """

    def __init__(self, spec: EvaluateRecipe, device: torch.device | str | None = None, cache: Path | None = None):
        self._spec, self._device, self._cache = spec, device, cache

    def lacks(self, names: tuple[str, ...]) -> str | None:
        """Why not all of some tools can be used, or None if they can."""
        reasons = [reason for name in names if (reason := lacks(name, self._spec)) is not None]
        return "; ".join(reasons) or None

    @cached_property
    def device(self) -> torch.device | str:
        """Where networks run."""
        from danceopd.devices import best_device

        return best_device() if self._device is None else self._device

    def _place(self, tool: str) -> Path:
        return at_home(getattr(self._spec.networks, tool))

    @cached_property
    def clip(self) -> Clip:
        """CLIP; raises UserError if its folder does not hold one."""
        from danceopd.evaluation.metrics.networks import Clip

        return Clip(self._place("clip"), self.device)

    @cached_property
    def dino(self) -> Dino:
        """DINO; raises UserError if its folder does not hold one."""
        from danceopd.evaluation.metrics.networks import Dino

        return Dino(self._place("dino"), self.device)

    @cached_property
    def inception(self) -> Inception:
        """The Inception network of FID and KID."""
        from danceopd.evaluation.metrics.networks import Inception

        return Inception(self._place("inception"), self.device)

    @cached_property
    def lpips(self) -> Lpips:
        """LPIPS over AlexNet."""
        from danceopd.evaluation.metrics.networks import Lpips

        return Lpips(self.device)

    @cached_property
    def judge(self) -> Judge:
        """The vision-language judge."""
        from danceopd.evaluation.judge import Judge

        assert self._spec.judge is not None  # else it is lacking, and not asked for
        return Judge(self._spec.judge, self._cache)

    @property
    def judge_usage(self) -> dict | None:
        """What the judge was asked and cost so far; None if it was not asked."""
        return self.judge.usage() if "judge" in self.__dict__ else None
