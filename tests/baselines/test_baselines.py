"""The table of methods is the recipe's, and each knob is for those that read it."""

from __future__ import annotations

import pytest

from danceopd.baselines import BASELINES
from danceopd.baselines.merges import Merge
from danceopd.distill import HardRoutedOnPolicy, method_of
from danceopd.recipe import MERGES, METHODS


def test_the_recipes_names_are_the_tables(bench):
    assert set(METHODS) == {"danceopd", *BASELINES}
    assert isinstance(method_of(bench.spec()), HardRoutedOnPolicy)
    for name in METHODS:
        assert isinstance(method_of(bench.spec(method=name)), Merge) == (name in MERGES)


@pytest.mark.parametrize(("name", "needs"), [("off_policy", True), ("joint", True), ("soft", False), ("dense", False),
                                             ("merge_ties", False), ("danceopd", False)])  # fmt: skip
def test_who_trains_on_target_images_says_so(bench, name, needs):
    assert method_of(bench.spec(method=name)).needs_targets == needs
