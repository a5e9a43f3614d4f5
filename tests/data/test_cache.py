"""The shared cache of encodings: bit for bit what encoding gives, filled by several, never half, found by content."""

from __future__ import annotations

import sys
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from safetensors import safe_open

from danceopd import steps
from danceopd.cli import main as cli
from danceopd.config.load import load_recipe
from danceopd.data import cache as cache_module
from danceopd.data import encode as encoding
from danceopd.data.assemble import open_dataset
from danceopd.data.cache import CachedRows, EncodingCache, fetch_cache, strangers
from danceopd.data.columns import KEY, key_of, table_of
from danceopd.data.encode import encode_cached, encode_records, fill_cache, picture_group, wanted_by
from danceopd.data.encoded import Sizing
from danceopd.errors import UserError

SIZING = Sizing(64, 64)


@pytest.fixture(scope="module")
def records(small_data):
    return open_dataset(small_data).records("train")


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of one batch each, so that a few records make several."""
    monkeypatch.setattr(encoding, "SHARD_BYTES", 1)


class Deaf:
    """A back end that cannot encode: only the cache can answer."""

    encode_prompts = None
    prompt_sees_source = False

    def latent_shape(self, height, width):
        return (64, 48)

    def tokens_lost(self, prompts, sources=0):
        return [0] * len(prompts)


def through(folder, backbone, records, targets=True, share=(0, 1), key="k", size=64, keeps=torch.float32):
    sizing, cache = Sizing(size, size), EncodingCache(folder, keeps)
    return encode_cached(backbone, table_of(records), sizing, cache, key, targets, share)


def places_of(cache, group, keys):
    return cache.places(group, pa.array(keys, KEY))


def all_of(encoded, name):
    rows = getattr(encoded, f"{name}_row")
    return getattr(encoded, f"{name}s")[rows[rows >= 0]]


def test_a_cache_gives_what_encoding_gives_to_the_bit(backbone, records, tmp_path, small_shards):
    plain = encode_records(backbone, records, 64, 64, None, "k", targets=True)
    cached = through(tmp_path, backbone, records)
    assert cached.tasks == plain.tasks
    assert len(list(tmp_path.rglob("*.safetensors"))) > 4
    for name in ("prompt", "source", "target"):
        assert torch.equal(all_of(cached, name), all_of(plain, name))
        assert torch.equal(getattr(cached, f"{name}_row") >= 0, getattr(plain, f"{name}_row") >= 0)
    edit = [row for row in range(len(records)) if plain.source_row[row] >= 0][3:7]
    one, other = cached.condition(edit), plain.condition(edit)
    assert torch.equal(one.prompt, other.prompt)
    assert torch.equal(one.source, other.source)
    assert torch.equal(cached.subset(edit).target([1, 2]), plain.subset(edit).target([1, 2]))


def test_what_was_encoded_in_other_company_is_the_same(backbone, records, tmp_path):
    through(tmp_path, backbone, records[5:9])
    plain = encode_records(backbone, records, 64, 64, None, "k", targets=True)
    cached = through(tmp_path, backbone, records)
    for name in ("prompt", "source", "target"):
        assert torch.equal(all_of(cached, name), all_of(plain, name))


def test_it_is_read_without_an_encoder_and_hangs_on_content_model_and_size(backbone, records, tmp_path):
    through(tmp_path, backbone, records)
    again = through(tmp_path, Deaf(), list(reversed(records))[:7])
    assert again.tasks == [r.task for r in reversed(records)][:7]
    changed = [replace(records[0], prompt="another wish"), *records[1:]]
    for other, options in ((changed, {}), (records, {"key": "another base"}), (records, {"size": 32})):
        with pytest.raises((TypeError, AttributeError)):
            through(tmp_path, Deaf(), other, **options)


def test_workers_share_the_work_and_make_one_cache(backbone, records, tmp_path, small_shards):
    wanted, cache = wanted_by(backbone, table_of(records), True, SIZING), EncodingCache(tmp_path)
    made = []
    for worker in (1, 0, 2):
        before = set(tmp_path.rglob("*.safetensors"))
        assert fill_cache(backbone, wanted, SIZING, cache, "k", (worker, 3))
        made.append(len(set(tmp_path.rglob("*.safetensors")) - before))
        assert cache.places(picture_group(cache, "k", (64, 64)), wanted.pictures).there.all() == (worker == 2)
    assert min(made) > 0
    through(tmp_path, Deaf(), records)
    alone = tmp_path / "alone"
    fill_cache(backbone, wanted, SIZING, EncodingCache(alone), "k", (0, 1))
    names = sorted(p.relative_to(alone) for p in alone.rglob("*.safetensors"))
    assert all((tmp_path / name).read_bytes() == (alone / name).read_bytes() for name in names)


def test_work_that_was_stopped_is_gone_on_with(backbone, records, tmp_path, small_shards, monkeypatch):
    class Tired:
        """Encodes two batches of pictures."""

        calls = 0

        def __getattr__(self, name):
            return getattr(backbone, name)

        def encode_images(self, pixels):
            self.calls += 1
            if self.calls > 3:
                raise KeyboardInterrupt
            return backbone.encode_images(pixels)

    with pytest.raises(KeyboardInterrupt):
        through(tmp_path, Tired(), records)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert any("latents" in str(path) for path in done)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    through(tmp_path, backbone, records)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_a_damaged_shard_is_named_and_its_loss_mended(backbone, records, tmp_path):
    through(tmp_path, backbone, records)
    rows = EncodingCache(tmp_path).write_index()
    wanted = wanted_by(backbone, table_of(records), True, SIZING)
    assert sum(rows.values()) == len(wanted.prompts) + len(wanted.pictures)
    shard = next(tmp_path.glob("latents-*/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"damaged \(.* the index says .*delete it"):
        through(tmp_path, backbone, records)
    (tmp_path / "index.arrow").unlink()
    with pytest.raises(UserError, match="damaged"):
        through(tmp_path, backbone, records)
    shard.unlink()
    through(tmp_path, backbone, records)
    assert shard.is_file()


def test_a_worker_that_is_missing_is_noticed(backbone, records, tmp_path, small_shards):
    with pytest.raises(UserError, match="encodings are missing; did a worker fail"):
        through(tmp_path, backbone, records, share=(0, 2))
    with pytest.raises(UserError, match="no records to encode"):
        through(tmp_path, backbone, [])


def test_values_that_bfloat16_holds_take_half_the_bytes(tmp_path):
    cache = EncodingCache(tmp_path)
    exact, fine = torch.randn(4, 8).bfloat16().float(), torch.randn(4, 8)
    for name, rows, dtype in (("exact", exact, "BF16"), ("fine", fine, "F32")):
        keys = [key_of(letter) for letter in "abcd"]
        path = cache.write(name, keys, rows[:, None])
        with safe_open(path, framework="pt") as file:
            assert file.get_slice("values").get_dtype() == dtype
        assert torch.equal(CachedRows(places_of(cache, name, keys))[torch.arange(4)], rows[:, None])
    narrow = EncodingCache(tmp_path, torch.bfloat16)
    with safe_open(narrow.write("narrow", keys, fine[:, None]), framework="pt") as file:
        assert file.get_slice("values").get_dtype() == "BF16"
    assert torch.equal(CachedRows(places_of(narrow, "narrow", keys))[torch.arange(4)], fine.bfloat16().float()[:, None])


def test_padding_with_zeros_is_not_kept_and_any_other_is(tmp_path):
    """Rows come back to the bit: also one that is all zeros, ends with a negative zero, or has zeros inside."""
    cache, full = EncodingCache(tmp_path), torch.randn(5, 6, 3)
    full[1, 2:], full[2] = 0, 0
    full[3, 5], full[4, 1] = -0.0, 0
    keys = [key_of(str(number)) for number in range(5)]
    with safe_open(cache.write("g", keys, full, [0, 3, 0, 0, 1]), framework="pt") as file:
        assert file.get_tensor("starts").diff().tolist() == [6, 2, 0, 6, 6]
    places = places_of(cache, "g", [*keys[::-1], key_of("none")])
    assert places.there.tolist() == [True] * 5 + [False] and places.lost.tolist() == [1, 0, 0, 3, 0, 0]
    found = CachedRows(places)[torch.arange(5)].flip(0)
    assert torch.equal(found.view(torch.int32), full.view(torch.int32))


def test_only_so_many_shards_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "MOST_OPEN", 3)
    cache, keys = EncodingCache(tmp_path), [key_of(str(number)) for number in range(8)]
    for number, key in enumerate(keys):
        cache.write("g", [key], torch.full((1, 2, 4), number + 0.1))
    rows = CachedRows(places_of(cache, "g", keys))
    assert rows[torch.tensor([0, 7, 0, 3, 5, 1, 0, 6])][:, 0, 0].round().int().tolist() == [0, 7, 0, 3, 5, 1, 0, 6]
    assert len(rows._open) == 3


def test_a_cache_that_keeps_bfloat16_is_another_than_one_that_keeps_all(backbone, records, tmp_path):
    plain, narrow = (through(tmp_path, backbone, records, keeps=keeps) for keeps in (torch.float32, torch.bfloat16))
    for name in ("prompt", "source", "target"):
        assert torch.equal(all_of(narrow, name), all_of(plain, name).bfloat16().float())
    assert not torch.equal(all_of(narrow, "target"), all_of(plain, "target"))


def test_the_index_names_every_row_and_a_shard_it_lacks_is_found(backbone, records, tmp_path, small_shards):
    through(tmp_path, backbone, records[:9])
    cache = EncodingCache(tmp_path)
    indexed = cache._index()
    assert sorted(indexed) == sorted(f"{p.parent.name}/{p.name}" for p in tmp_path.rglob("*.safetensors"))
    fill_cache(backbone, wanted_by(backbone, table_of(records), True, SIZING), SIZING, cache, "k", (0, 1))
    assert len(list(tmp_path.rglob("*.safetensors"))) > len(indexed), "the index is older"
    through(tmp_path, Deaf(), records)
    assert strangers(tmp_path) == []
    (tmp_path / "notes.txt").write_text("")
    assert strangers(tmp_path) == ["notes.txt"]


def test_a_cache_in_an_object_store_is_brought_here(backbone, records, tmp_path):
    import fsspec

    through(tmp_path / "made", backbone, records)
    EncodingCache(tmp_path / "made").write_index()
    fsspec.filesystem("memory").put(str(tmp_path / "made"), "/shared", recursive=True)
    folder = fetch_cache("memory://shared", tmp_path / "work")
    through(folder, Deaf(), records)
    assert fetch_cache("memory://shared", tmp_path / "work") == folder
    assert fetch_cache(str(tmp_path), tmp_path / "work") == tmp_path


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["danceopd", "data", "cache", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.slow
def test_training_is_the_same_with_a_cache_made_by_the_command(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [
        f"model.base={tiny_base}",
        "data.world={t2i: {train: 6, val: 2, test: 2}, local_edit: {train: 6, val: 2, test: 2}}",
        "tasks={t2i: {teacher: base, needs_source: false, metrics: [psnr]}, "
        "local_edit: {teacher: base, needs_source: true, metrics: [psnr]}}",
        "teachers={base: {kind: base}}",
        "distill.steps=2",
        "distill.batch=4",
        "distill.rollout_steps=2",
        "distill.select=null",
        "distill.start=base",
    ]
    options = [option for setting in settings for option in ("--set", setting)]
    for worker in ("0/2", "1/2"):
        assert run_command(monkeypatch, "--out", "shared", "--worker", worker, "--workspace", "w", *options) == 0
    assert "rows" in capsys.readouterr().out
    made = sorted(p.name for p in (tmp_path / "shared").rglob("*.safetensors"))
    losses = []
    for more in ([], [f"cache={tmp_path / 'shared'}"]):
        recipe = load_recipe("world", settings + more)
        base, data = steps.resolve_base(recipe, tmp_path / "w"), steps.build_data(recipe, tmp_path / "w")
        teachers = {"base": steps.finetune_teacher(steps.Run(recipe, tmp_path / "w", base, data), "base")}
        place = tmp_path / f"w{len(losses)}"
        student = steps.distill_student(steps.Run(recipe, place, base, data), teachers)
        losses.append((student.facts["loss"], student.digest))
    assert losses[0] == losses[1]
    assert sorted(p.name for p in (tmp_path / "shared").rglob("*.safetensors")) == made  # nothing was missing
    assert run_command(monkeypatch, "--out", "x", "--worker", "2/2") == 2
    assert "write K/N with 0 <= K < N" in capsys.readouterr().err
