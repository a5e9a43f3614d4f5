"""Fields made of fields: guidance in one pass or two, what it costs, and how it lies on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from danceopd.backbones import load_backbone
from danceopd.backbones.base import Condition
from danceopd.backbones.lora import adapter_parameters, add_lora
from danceopd.config.recipe import DistillRecipe, LoraRecipe
from danceopd.data.assemble import open_dataset
from danceopd.data.encode import encode_empty, encode_records
from danceopd.distill import distill
from danceopd.errors import UserError
from danceopd.flow.field_io import field_guidance, load_field, load_fields, probe, save_field
from danceopd.flow.fields import Field, VelocityField
from danceopd.flow.guidance import GuidedField, OperatorField, Term
from danceopd.methods.routing import routed_velocity
from danceopd.pretraining.world_base import SHAPE


@pytest.fixture
def fresh(own_backbone):
    """A tiny base of one's own, which counts the samples of every forward pass in `passed`."""
    base = own_backbone
    base.passed = []
    real = base.velocity
    base.velocity = lambda network, z, *rest: (base.passed.append(len(z)), real(network, z, *rest))[1]
    return base


def question(backbone, source=True, count=3):
    generator = torch.Generator().manual_seed(5)
    shape = backbone.latent_shape(64, 64)
    state = torch.randn(count, *shape, generator=generator)
    sources = torch.randn(count, *shape, generator=generator) if source else None
    prompts = backbone.encode_prompts([f"add a red ring at the top left {i}" for i in range(count)])
    return state, torch.linspace(0.2, 0.9, count), Condition(prompts, sources, 64, 64)


def plain_field(backbone, kind):
    if kind == "lora":
        add_lora(backbone.transformer, "t", LoraRecipe(rank=4, alpha=4), backbone.lora_targets, 0)
        for parameter in adapter_parameters(backbone.transformer, "t"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        return VelocityField("t", backbone, backbone.transformer, "t")
    if kind == "base":
        return VelocityField("t", backbone, backbone.transformer)
    network = backbone.new_transformer()
    with torch.no_grad():
        network.proj_out.weight.mul_(1.5)
    return VelocityField("t", backbone, network)


@pytest.mark.parametrize("source", [False, True])
@torch.no_grad()
def test_guidance_is_its_formula_in_one_pass_or_two(fresh, source):
    field, empty = plain_field(fresh, "full"), fresh.encode_prompts([""])[0]
    state, sigma, condition = question(fresh, source)
    with_prompt = field(state, sigma, condition)
    without = field(state, sigma, replace(condition, prompt=empty.expand_as(condition.prompt)))
    expected = without + 3.5 * (with_prompt - without)
    assert not torch.allclose(expected, with_prompt, atol=1e-3)
    for batched, passes in ((True, [6]), (False, [3, 3])):
        fresh.passed.clear()
        guided = GuidedField(field, 3.5, empty, batched)
        torch.testing.assert_close(guided(state, sigma, condition), expected, atol=1e-5, rtol=1e-5)
        assert fresh.passed == passes
        assert guided.forwards * len(state) == sum(passes)


@torch.no_grad()
def test_scale_one_is_the_field_itself(fresh):
    field = plain_field(fresh, "base")
    asked = question(fresh)
    guided = GuidedField(field, 1.0, fresh.encode_prompts([""])[0])
    torch.testing.assert_close(guided(*asked), field(*asked))
    assert guided.identity != field.identity
    assert guided.identity == GuidedField(replace(field, name="other"), 1.0, guided.empty).identity


@dataclass(frozen=True)
class Mean(OperatorField):
    """The mean of several fields."""

    fields: tuple[Field, ...]
    batched: bool = True

    def terms(self, condition):
        return [Term(1 / len(self.fields), field, condition) for field in self.fields]


@torch.no_grad()
def test_an_operator_on_several_fields_asks_each_on_its_own(fresh):
    adapted = plain_field(fresh, "lora")
    bare, other = VelocityField("b", fresh, fresh.transformer), plain_field(fresh, "full")
    asked = question(fresh)
    expected = sum(field(*asked) for field in (adapted, bare, other)) / 3
    fresh.passed.clear()
    torch.testing.assert_close(Mean((adapted, bare, other))(*asked), expected, atol=1e-5, rtol=1e-5)
    assert fresh.passed == [3, 3, 3]


def test_a_guided_teacher_is_routed_to_like_any_other(fresh):
    empty = fresh.encode_prompts([""])[0]
    plain = VelocityField("plain", fresh, fresh.transformer)
    fields = {"plain": plain, "guided": GuidedField(plain, 4.0, empty)}
    state, sigma, condition = question(fresh)
    routed = routed_velocity(fields, ["guided", "plain", "guided"], state, sigma, condition)
    with torch.no_grad():
        torch.testing.assert_close(routed[1:2], plain(state, sigma, condition)[1:2], atol=1e-5, rtol=1e-5)
        expected = fields["guided"](state, sigma, condition)
    torch.testing.assert_close(routed[::2], expected[::2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["base", "full", "lora"])
def test_a_guided_field_comes_back_guided_without_a_text_encoder(fresh, tiny_base, tmp_path, kind):
    empty = fresh.encode_prompts([""])[0]
    field = GuidedField(plain_field(fresh, kind), 3.5, empty, batched=False)
    save_field(field, tmp_path / "t")
    _, _, condition = question(fresh)
    other = load_backbone(tiny_base, SHAPE)
    other.free_encoders()
    found = load_field(other, "t", tmp_path / "t", lambda: empty)
    assert (found.scale, found.batched, found.name) == (3.5, False, "t")
    torch.testing.assert_close(probe(found, condition), probe(field, condition))
    assert other.pipeline.text_encoder is None
    encoded_now = load_field(load_backbone(tiny_base, SHAPE), "t", tmp_path / "t")
    torch.testing.assert_close(encoded_now.empty, empty)


@pytest.mark.parametrize("guidance", ["3.5", {"scale": 3.5}, {"scale": "much", "batched": True}])
def test_a_guidance_that_does_not_fit_is_refused(tmp_path, guidance):
    (tmp_path / "field.json").write_text(json.dumps({"kind": "base", "guidance": guidance}))
    with pytest.raises(UserError, match=r"guidance is .*; write \{\"scale\": 3.5, \"batched\": true\}"):
        field_guidance(tmp_path)


def test_the_empty_prompt_is_encoded_once(fresh, tmp_path):
    first = encode_empty(fresh, tmp_path, "key")
    fresh.free_encoders()
    torch.testing.assert_close(encode_empty(fresh, tmp_path, "key"), first)
    assert fresh.pipeline.text_encoder is None
    torch.testing.assert_close(encode_empty(fresh, tmp_path, "other"), first)  # read again, for another key
    assert fresh.pipeline.text_encoder is not None


@pytest.mark.slow
def test_a_student_absorbs_guidance(fresh, small_data, tmp_path):
    records = open_dataset(small_data).records("train", "t2i")
    encoded = encode_records(fresh, records, 64, 64, tmp_path, "k", targets=False)
    base = VelocityField("g", fresh, fresh.transformer)
    guided = GuidedField(base, 8.0, encode_empty(fresh, tmp_path, "k"))
    spec = DistillRecipe(lr=0.01, steps=60, batch=6, rollout_steps=3, log_every=5, warmup=2, optimizer="muon")
    fresh.free_encoders()
    student, history = distill(fresh, encoded, {"g": guided}, {"t2i": "g"}, {"t2i": 1.0}, spec)
    assert history[-1]["loss"]["t2i"] < 0.5 * history[0]["loss"]["t2i"]
    condition = encoded.condition(list(range(6)))
    target = probe(guided, condition)
    assert (probe(student, condition) - target).norm() < 0.9 * (probe(base, condition) - target).norm()


def test_two_teachers_of_one_folder_share_one_network(fresh, tmp_path):
    save_field(plain_field(fresh, "full"), tmp_path / "a")
    save_field(GuidedField(plain_field(fresh, "full"), 2.0, fresh.encode_prompts([""])[0]), tmp_path / "b")
    network = fresh.new_transformer()
    save_field(VelocityField("c", fresh, network), tmp_path / "c")
    device = torch.device("cpu")
    fields = load_fields(fresh, {name: tmp_path / name for name in "abc"}, offload=device)
    assert fields["a"].network is fields["b"].network
    assert fields["a"].offloaded is fields["b"].field.offloaded
    assert fields["c"].network is not fields["a"].network
    assert [fields[name].name for name in "abc"] == ["a", "b", "c"]


def test_offloaded_weights_are_away_between_queries_and_answer_the_same(fresh, tmp_path, monkeypatch):
    save_field(plain_field(fresh, "full"), tmp_path / "t")
    asked = question(fresh)
    kept = load_field(fresh, "t", tmp_path / "t")
    away = load_fields(fresh, {"t": tmp_path / "t"}, offload=torch.device("cpu"))["t"]
    home = {p.data_ptr() for p in away.network.parameters()}
    # One device only here: a copy stands for the visit, and its addresses show where the weights are.
    real, visits = torch.Tensor.to, []
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda t, *a, **k: (visits.append(1), t.clone())[1] if "non_blocking" in k else real(t, *a, **k),
    )
    seen = []
    fresh.velocity = lambda network, *rest: seen.append({p.data_ptr() for p in network.parameters()} & home)
    away(*asked)
    assert seen == [set()]
    assert {p.data_ptr() for p in away.network.parameters()} == home
    once = len(visits)
    with away.resident():
        away(*asked)
        away(*asked)
    assert len(visits) == 2 * once
    del fresh.velocity
    with torch.no_grad():
        torch.testing.assert_close(away(*asked), kept(*asked))


def test_a_failed_query_sends_the_weights_home(fresh, tmp_path):
    save_field(plain_field(fresh, "full"), tmp_path / "t")
    away = load_fields(fresh, {"t": tmp_path / "t"}, offload=torch.device("meta"))["t"]
    home = [p.data_ptr() for p in away.network.parameters()]
    with pytest.raises(RuntimeError), away.resident():
        assert all(p.is_meta for p in away.network.parameters())
        raise RuntimeError
    assert [p.data_ptr() for p in away.network.parameters()] == home
