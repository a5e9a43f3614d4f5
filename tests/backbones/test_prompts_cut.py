"""A prompt that is longer than its encoder takes is counted, by every family, and exactly."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, SD3

from danceopd.backbones import load_backbone, open_outline
from danceopd.errors import UserError

ROOM = 60  # tokens for a prompt beside its template


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def base(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / family.name
    family.make(folder)
    settings = with_room(load_backbone(folder, family.shape()), family, 0)
    return load_backbone(folder, settings), open_outline(folder, settings)


def with_room(backbone, family, sources):
    """Settings under which a prompt has `ROOM` tokens."""
    return family.shape().model_copy(update={"max_sequence_length": backbone._length("", sources) + ROOM})


def words(count: int, last: str = "red") -> str:
    return " ".join(["small"] * count + [last])


def first_cut(backbone) -> int:
    """The least number of words of which some are lost."""
    return next(n for n in range(400) if backbone.tokens_lost([words(n)])[0])


def test_a_prompt_is_seen_to_its_last_token_and_no_further(base, family):
    backbone, _ = base
    edge = first_cut(backbone)
    seen, other = (backbone.encode_prompts([words(edge - 1, last)]) for last in ("red", "green"))
    assert not torch.equal(seen, other)
    far = edge + 120  # beyond what a template puts behind the prompt
    assert backbone.tokens_lost([words(far)])[0] > 60
    if family is SD3:
        pytest.skip("CLIP's encoders have a limit of their own, beside T5's")
    seen, other = (backbone.encode_prompts([words(far, last)]) for last in ("red", "green"))
    assert torch.equal(seen, other)


def test_every_further_word_is_one_more_that_is_lost(base):
    backbone, _ = base
    edge = first_cut(backbone)
    lost = backbone.tokens_lost([words(n) for n in range(edge - 8, edge + 8)])
    assert lost == sorted(lost)
    assert lost[:8] == [0] * 8 and lost[8] > 0


def test_the_configuration_alone_counts_as_well(base):
    backbone, outline = base
    prompts = [words(n) for n in range(0, 240, 16)]
    assert outline.tokens_lost(prompts) == backbone.tokens_lost(prompts)


def test_a_source_image_takes_its_share(base, family):
    backbone, _ = base
    alone = backbone.tokens_lost([words(300)])[0]
    with_source = backbone.tokens_lost([words(300)], sources=1)[0] if family.edits else alone
    assert (with_source > alone) == backbone.prompt_sees_source
    if not backbone.prompt_sees_source:
        return
    shown = [torch.zeros(3, 64, 64)]
    with pytest.raises(UserError, match="source image"):
        backbone.encode_prompts([words(1)], [shown])
    roomy = type(backbone)(backbone.pipeline, with_room(backbone, family, 1), backbone._folder)
    edge = next(n for n in range(1, 200) if roomy.tokens_lost([words(n)], sources=1)[0])
    seen, other = (roomy.encode_prompts([words(edge - 1, last)], [shown]) for last in ("red", "green"))
    assert not torch.equal(seen, other)
    seen, other = (roomy.encode_prompts([words(edge, last)], [shown]) for last in ("red", "green"))
    assert torch.equal(seen, other)
