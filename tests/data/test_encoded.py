"""Encoding once: the cache gives back the same tensors, and only for the same content."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from danceopd.data.assemble import open_dataset
from danceopd.data.cache import EncodingCache
from danceopd.data.columns import table_of
from danceopd.data.encode import encode_cached, encode_records
from danceopd.data.encoded import Sizing, cut_prompts, load_pixels
from danceopd.data.png import encode_png
from danceopd.errors import UserError


@pytest.fixture
def records(small_data):
    return open_dataset(small_data).records("val")


def test_rows_lead_to_their_own_prompt_source_and_target(backbone, records):
    encoded = encode_records(backbone, records, 64, 64, None, "k", targets=True)
    for row, record in enumerate(records):
        torch.testing.assert_close(
            encoded.prompts[encoded.prompt_row[row]], backbone.encode_prompts([record.prompt])[0], atol=1e-5, rtol=1e-4
        )
        assert (encoded.source_row[row] < 0) == (record.source is None)
        target = backbone.encode_images(load_pixels(record.target, 64, 64, "")[None])
        torch.testing.assert_close(encoded.target([row]), target, atol=1e-4, rtol=1e-4)


def test_shape_groups_part_drawing_from_editing_and_lose_nobody(backbone, records):
    encoded = encode_records(backbone, records, 64, 64, None, "k", targets=False)
    rows = list(range(len(records)))
    groups = encoded.shape_groups(rows)
    assert sorted(i for group in groups for i in group) == rows
    assert [encoded.condition(group).source is None for group in groups] == [True, False]
    part = encoded.subset([3, 1])
    assert part.tasks == [records[3].task, records[1].task]
    torch.testing.assert_close(part.condition([1]).prompt, encoded.condition([1]).prompt)


def test_the_cache_is_read_back_and_hangs_on_the_content(backbone, records, tmp_path):
    first = encode_records(backbone, records, 64, 64, tmp_path, "k", targets=False)
    assert len(list(tmp_path.iterdir())) == 1

    class Deaf:
        """A back end that cannot encode: only the cache can answer."""

        prompt_sees_source = False

        def tokens_lost(self, prompts, sources=0):
            return [0] * len(prompts)

    again = encode_records(Deaf(), records, 64, 64, tmp_path, "k", targets=False)
    rows = torch.arange(len(first.prompts))
    assert torch.equal(first.prompts[rows], again.prompts[rows])
    rows = first.source_row[first.source_row >= 0]
    assert torch.equal(first.sources[rows], again.sources[rows])
    changed = [replace(records[0], prompt="another wish"), *records[1:]]
    for other, key in ((changed, "k"), (records, "another base")):
        with pytest.raises(AttributeError):
            encode_records(Deaf(), other, 64, 64, tmp_path, key, targets=False)


def test_pictures_of_another_size_are_cropped_to_fit():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    assert load_pixels(encode_png(wide), 64, 64, "x").shape == (3, 64, 64)
    assert load_pixels(encode_png(wide), 64, 64, "x").mean() > 0.9


def test_nothing_to_encode_is_refused(backbone):
    with pytest.raises(UserError, match="no records to encode"):
        encode_records(backbone, [], 64, 64, None, "k", targets=False)


def test_prompts_that_are_cut_are_counted_each_time(backbone, records, tmp_path, caplog):
    limit = backbone.settings.max_sequence_length
    long = "draw " + "a small green square and " * limit
    many = [replace(records[0], prompt=long), replace(records[1], prompt=long), *records[2:]]
    for _ in range(2):  # what lies in the cache is told again
        caplog.clear()
        encode_records(backbone, many, 64, 64, tmp_path / "a", "k", targets=False)
        distinct = len({r.prompt for r in many})
        assert f"1 of {distinct} prompts are cut at {limit} tokens (model.max_sequence_length); 'draw a" in caplog.text
        caplog.clear()
        cache = EncodingCache(tmp_path / "b")
        encode_cached(backbone, table_of(many), Sizing(64, 64), cache, "k", targets=False)
        assert f"1 of {distinct} prompts are cut at {limit} tokens" in caplog.text
    caplog.clear()
    encode_records(backbone, records, 64, 64, None, "k", targets=False)
    assert "cut" not in caplog.text
    assert cut_prompts(backbone, [(r.prompt, 0) for r in records]) is None
