"""What is fixed when the pipeline is composed rather than when it runs: image, accelerators, volume, threads."""

from __future__ import annotations

from dataclasses import dataclass

from components.image import IMAGE
from danceopd.errors import UserError

MOUNT = "/workspace"


@dataclass(frozen=True)
class Threads:
    """OMP threads of the steps of a run on one machine."""

    finetune: int
    others: int


@dataclass(frozen=True)
class PipelineOptions:
    """How the pipeline is composed.

    Attributes:
        image: container image of every step.
        gpu: accelerator resource of the steps that train or draw, for example `nvidia.com/gpu`; None: CPU only.
        gpu_count: accelerators of each such step.
        workspace_claim: persistent volume claim that holds the workspace, mounted in every step; None: no volume.
        retries: how often a failed step is tried again.
        threads: OMP threads; None: each step's CPU limit.
    """

    image: str = IMAGE
    gpu: str | None = None
    gpu_count: int = 1
    workspace_claim: str | None = "danceopd-workspace"
    retries: int = 2
    threads: Threads | None = None

    def __post_init__(self):
        if not self.image.strip():
            raise UserError("pipeline image: empty; name one, for example registry.example.com/danceopd@sha256:...")
        if self.gpu_count < 1:
            raise UserError(f"pipeline gpu count {self.gpu_count}: at least 1; leave out the gpu for CPU only")
        if self.retries < 0:
            raise UserError(f"pipeline retries {self.retries}: 0 or more")


@dataclass(frozen=True)
class Needs:
    """What one step takes.

    Attributes:
        cpu: cores requested and at most.
        memory: GiB requested and at most.
        hours: it is ended after this long.
        gpu: whether it uses an accelerator where there is one.
        cached: whether an unchanged step's outputs are reused.
        retried: whether trying again can help.
    """

    cpu: tuple[int, int]
    memory: tuple[int, int]
    hours: int
    gpu: bool = False
    cached: bool = True
    retried: bool = True


NEEDS = {
    "check_recipe": Needs(cpu=(1, 1), memory=(1, 2), hours=1, retried=False),
    "resolve_base": Needs(cpu=(1, 2), memory=(1, 8), hours=6),
    "build_data": Needs(cpu=(1, 4), memory=(2, 16), hours=12),
    "finetune": Needs(cpu=(2, 8), memory=(4, 64), hours=48, gpu=True),
    "distill": Needs(cpu=(2, 8), memory=(4, 64), hours=96, gpu=True),
    "evaluate": Needs(cpu=(2, 8), memory=(4, 64), hours=24, gpu=True),
    "register": Needs(cpu=(1, 2), memory=(2, 16), hours=2, cached=False),
    "summarize": Needs(cpu=(1, 1), memory=(1, 2), hours=1, cached=False),
}
# The step of the pipeline that moves the registry's aliases (`champion.py`). A rollback done twice undoes itself.
CHAMPION_NEEDS = {"move_champion": Needs(cpu=(1, 1), memory=(1, 4), hours=1, cached=False, retried=False)}
