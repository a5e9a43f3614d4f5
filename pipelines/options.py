"""What is fixed when the pipeline is composed rather than when it runs: image, placement, threads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from components.image import IMAGE
from danceopd.errors import UserError
from pipelines.placement import Placement

# As OCI's references are written: a registry, a path in lower case, a tag, a digest.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::\d+)?/)?{_PART}(?:/{_PART})*(?::\w[\w.-]{{0,127}})?(?:@[\w+.:-]+)?"
)
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
        image: container image of every step, by digest or by a tag that says which one.
        placement: where a cluster runs the steps, and what they get there.
        threads: OMP threads; None: each step's CPU limit.
    """

    image: str = IMAGE
    placement: Placement = field(default_factory=Placement)
    threads: Threads | None = None

    def __post_init__(self) -> None:
        if not self.image.strip():
            raise UserError("pipeline image: empty; name one, for example registry.example.com/danceopd@sha256:...")
        if not _IMAGE.fullmatch(self.image):
            raise UserError(
                f"pipeline image {self.image!r}: no image name; write [registry/]name[:tag][@digest], the name in "
                "lower case and nothing with spaces"
            )
        if not self.by_digest and tag_of(self.image) in ("", "latest"):
            raise UserError(
                f"pipeline image {self.image}: 'latest' is another image tomorrow, and steps would be reused for it; "
                "name a digest (@sha256:...) or a version"
            )

    @property
    def by_digest(self) -> bool:
        """Whether the image is named by its content, so that it cannot change."""
        return "@" in self.image


def tag_of(image: str) -> str:
    """An image's tag; empty if it has none (a registry's port is no tag)."""
    return image.rpartition("/")[2].partition(":")[2]
