"""What the method asks of a model family: one small protocol. Everything particular to a model stays in its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from danceopd.config.recipe import ModelRecipe

if TYPE_CHECKING:  # slow to import
    from diffusers import DiffusionPipeline

LOADING = ("dtype", "attention", "quantize", "offload")  # how weights are loaded here; no matter to an export
SETTINGS = "danceopd.json"  # beside model_index.json: picture size and prompt encoding of an exported pipeline


@dataclass(frozen=True)
class Condition:
    """What a velocity depends on besides state and noise level, for B samples of one shape.

    Attributes:
        prompt: prompt embeddings, (B, L, D): all that the family's transformer takes of a prompt, packed by its back
            end into rows of one number L for every prompt.
        source: source image's latent tokens, (B, S, C), or None when the task draws from nothing. Several source
            images, all of the picture's size, lie one behind the other.
        height: of the picture in pixels.
        width: of the picture in pixels.
    """

    prompt: Tensor
    source: Tensor | None
    height: int
    width: int

    def __len__(self) -> int:
        return self.prompt.shape[0]

    def rows(self, index: Tensor) -> Condition:
        """The conditions of some of the samples."""
        source = None if self.source is None else self.source[index]
        return Condition(self.prompt[index], source, self.height, self.width)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """A transformer's blocks: the modules diffusers lists as repeated, or as never split; none if it lists neither."""
    kinds = set(getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or ())
    return [module for module in network.modules() if kind_of(module).__name__ in kinds]


def kind_of(network: nn.Module) -> type:
    """A network's class as its library has it: sharding puts one of its own, called otherwise, in front."""
    return type(network).__mro__[2] if isinstance(network, FSDPModule) else type(network)


class Backbone(Protocol):
    """A model family around one transformer architecture.

    Latents are packed token sequences (B, N, C); sigma is (B,), 1 = noise, 0 = clean; v = dz/dsigma.
    """

    @property
    def settings(self) -> ModelRecipe: ...

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The stock pipeline it is made of."""
        ...

    @property
    def transformer(self) -> nn.Module: ...

    @property
    def lora_targets(self) -> str:
        """A regular expression over module names."""
        ...

    @property
    def prompt_sees_source(self) -> bool:
        """Whether a prompt's embedding depends on the source images it speaks of."""
        ...

    @property
    def most_sources(self) -> int | None:
        """Source images a sample may have; None: any number."""
        ...

    @property
    def distilled(self) -> bool | None:
        """Whether the base draws without guidance, by its own configuration; None: that does not tell."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(N, C) of a picture of this size."""
        ...

    def prompt_shape(self, edits: bool) -> tuple[int, int]:
        """(L, D): the most rows that the transformer takes of a prompt's embedding, told from configurations alone.

        Args:
            edits: whether a source image comes with it.
        """
        ...

    def encode_prompts(self, prompts: list[str], sources: list[list[Tensor]] | None = None) -> Tensor:
        """Prompt embeddings (B, L, D), float32, without gradient; L is the same in every call.

        Args:
            prompts: B captions or instructions.
            sources: each prompt's source images, (3, H, W) in [-1, 1], any number of them; None: there are none. Only
                a back end that says `prompt_sees_source` looks at them.
        """
        ...

    def tokens_lost(self, prompts: list[str], sources: int = 0) -> list[int]:
        """Tokens at the end of each prompt that no encoder sees, as they lie beyond the recipe's
        `model.max_sequence_length`; 0: it is seen whole.

        Args:
            prompts: captions or instructions.
            sources: how many source images each speaks of; they take tokens, where a back end `prompt_sees_source`.
        """
        ...

    def without_prompt(self, condition: Condition, empty: Tensor) -> Condition:
        """The same samples with the empty prompt in the prompt's place, whose embedding is `empty` (L, D)."""
        ...

    def guide(self, without: Tensor, prompted: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the family's own pipeline does it: (B, N, C) of the two velocities (B, N, C).

        Args:
            without: the velocity under the empty prompt, float32.
            prompted: the velocity under the prompt, float32.
            scale: 1 is `prompted` itself; more goes further the prompt's way.
        """
        ...

    @classmethod
    def stock_guidance(cls, scale: float) -> dict[str, Any]:
        """Arguments by which the family's stock pipeline draws with this scale of ours; 1: without guidance."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to latents (B, N, C), without gradient."""
        ...

    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents (B, N, C) to (B, 3, H, W) in [-1, 1], without gradient."""
        ...

    def velocity(self, transformer: nn.Module, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The velocity (B, N, C) of `transformer`, any network of this family; inputs are cast to its dtype."""
        ...

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """The sampling grid of the family's own scheduler: (steps + 1,), falling to 0."""
        ...

    def new_transformer(self, folder: Path | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """Another transformer of this family: from a checkpoint folder, or a copy of this base's without adapters.

        Args:
            folder: a transformer or pipeline folder, or a single safetensors file; None: copy the base's.
            dtype: of a checkpoint's weights; None: the recipe's `model.dtype`.
        """
        ...

    def free_encoders(self) -> None:
        """Let go of the text encoder; it is read from its folder again if it is needed after all."""
        ...

    def save(self, folder: Path, transformer: nn.Module) -> None:
        """Write a complete pipeline folder with `transformer` in it, which diffusers' own loader opens."""
        ...
