"""Making the small world's base, at the smallest scale, and what shipped."""

from __future__ import annotations

import json
import random

import pytest
import torch

from danceopd.backbones.bases import shipped_folder
from danceopd.data import world
from danceopd.pretraining import world_base as wb


def test_every_word_of_the_world_is_one_token():
    tokenizer = wb.new_tokenizer()
    for text in world.corpus():
        for word in text.replace(",", "").split():
            assert 1 in (len(tokenizer.tokenize(word)), len(tokenizer.tokenize(f" {word}"))), word


def test_unknown_words_are_spelt_and_not_lost():
    tokenizer = wb.new_tokenizer()
    text = "draw a zebra in Ünicode, please"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_longest_prompts_fit():
    tokenizer = wb.new_tokenizer()
    longest = max(
        (r.prompt for r in world.world_records({t: {"test": 300} for t in world.TASKS}, open_share=0.5)), key=len
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": longest}], tokenize=False, add_generation_prompt=True
    )
    assert len(tokenizer(text)["input_ids"]) <= wb.PROMPT_TOKENS


def test_a_word_keeps_its_identity_in_any_context(backbone):
    def embed(prompt, place):
        return backbone.encode_prompts([prompt])[0, place]

    same = torch.cosine_similarity(
        embed("red ring top left on white", 1), embed("red cross bottom right on sand", 1), 0
    )
    other = torch.cosine_similarity(embed("red ring top left on white", 1), embed("blue ring top left on white", 1), 0)
    assert same > 0.7 > other


def test_the_start_averages_down_and_repeats_up():
    vae = wb.new_vae()
    wb.start_near_identity(vae)
    seen = {}
    for name, module in (("down", vae.encoder.conv_norm_out), ("up", vae.decoder.conv_norm_out)):
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    picture, latents = torch.rand(2, 3, 64, 64), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        vae.encoder(picture)
        vae.decoder(latents)
    torch.testing.assert_close(seen["down"][:, :3], torch.nn.functional.avg_pool2d(picture, 8))
    torch.testing.assert_close(seen["up"][:, :4], torch.nn.functional.interpolate(latents, scale_factor=8.0))


@pytest.mark.slow
def test_a_base_is_built_measured_and_pinned(tmp_path):
    figures = wb.build_base(
        tmp_path / "base", wb.BuildPlan(vae_steps=3, vae_batch=2, steps=3, open_steps=3, batch=2), count=8
    )
    assert set(figures["figures"]) == {
        "reconstruction_psnr_plain",
        "reconstruction_psnr_styled",
        "valid_by_steps",
        "repeat_psnr",
    }
    assert json.loads((tmp_path / "base.json").read_text())["plan"]["steps"] == 3
    assert len((tmp_path / "base.sha256").read_text().strip()) == 64
    assert (tmp_path / "base" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_shipped_base_reconstructs_and_draws():
    figures = json.loads(shipped_folder("world").with_suffix(".json").read_text())["figures"]
    assert figures["reconstruction_psnr_plain"] > 32
    backbone = wb.Flux2Klein.load(shipped_folder("world"), wb.SHAPE)
    measured = wb.measure_base(backbone, count=24)
    assert measured["reconstruction_psnr_styled"] > 32
    assert measured["valid_by_steps"]["closed"][8] >= 0.9
    assert measured["repeat_psnr"] > 26


def test_one_step_fails_where_sixteen_succeed_and_words_leave_something_open():
    figures = json.loads(shipped_folder("world_open").with_suffix(".json").read_text())["figures"]
    by_steps = figures["valid_by_steps"]["open"]
    assert by_steps["1"] < by_steps["16"] / 2 and by_steps["16"] > 0.5


def test_a_base_learns_captions_that_leave_something_open_and_some_that_do_not():
    for drawings, share in ((wb._closed_drawings, 0), (wb._open_drawings, 0.5)):
        prompts, scenes = drawings(random.Random(0), 400)
        empty = prompts.count("")
        named = sum(p.count(t.name) for p, s in zip(prompts, scenes, strict=True) for t in s.things if p)
        assert 5 < empty < 40 and not any(world.is_held_out(t) for s in scenes for t in s.things)
        whole = sum(all(f"{t.name} {t.position}" in p for t in s.things) for p, s in zip(prompts, scenes, strict=True))
        assert named and abs(whole / (400 - empty) - (1 - share)) < 0.1
