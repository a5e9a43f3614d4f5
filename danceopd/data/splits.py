"""Which split a record falls into when it names none, and what lies on two sides of a split.

Records that share a picture belong together: all edits of one source, and a chain of edits whose next source is the
last target. A held-out record whose picture was trained on measures memory, not skill; so a group goes to one split,
chosen by a stable hash of its first source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from danceopd.data.dedup import BITS, DuplicateFinder, picture_hash
from danceopd.data.pictures import read_picture
from danceopd.data.records import SPLITS, UNDECIDED, Record, split_of

NEAR = 8  # bits by which the hashes of pictures that look alike may differ
Pictures = tuple[str | None, str | None]  # names of a record's source and target; equal pictures, equal names


class _Groups:
    """Names that belong together, by union and find."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def find(self, name: str) -> str:
        """The name that stands for a name's group."""
        self._above.setdefault(name, name)
        while (above := self._above[name]) != name:
            self._above[name] = name = self._above[above]
        return name

    def join(self, one: str, other: str) -> None:
        """Make two groups one."""
        self._above[self.find(other)] = self.find(one)


def settle_splits(records: Sequence[Record], pictures: Sequence[Pictures]) -> list[str]:
    """The split of each record: the one it names, else its group's.

    A group takes the split that its records name; `train`, if they name several. One that names none is put where the
    hash of its first source says (the least of those that are nobody's target), so that further edits of that source
    move nothing.

    Args:
        records: all of a dataset; `split` may be `UNDECIDED`.
        pictures: of each record.
    """
    groups = _Groups()
    for source, target in pictures:
        if source is not None and target is not None:
            groups.join(source, target)
    named: dict[str, set[str]] = {}
    members: dict[str, set[str]] = {}
    made = {target for source, target in pictures if source is not None}
    for record, names in zip(records, pictures, strict=True):
        for name in filter(None, names):
            group = groups.find(name)
            members.setdefault(group, set()).add(name)
            if record.split != UNDECIDED:
                named.setdefault(group, set()).add(record.split)

    def split(record: Record, names: Pictures) -> str:
        if record.split != UNDECIDED:
            return record.split
        name = names[0] or names[1]
        if name is None:
            return split_of(record.id)
        group = groups.find(name)
        if group in named:
            return min(named[group], key=SPLITS.index)
        return split_of(min(members[group] - made or members[group]))

    return [split(record, names) for record, names in zip(records, pictures, strict=True)]


def group_records(ids: Sequence[str], pictures: Sequence[Pictures]) -> list[str]:
    """A name for each record's group: records that share a picture, be it source or target, have one.

    Args:
        ids: of the records; one without pictures is a group of its own.
        pictures: of each record.
    """
    groups = _Groups()
    for source, target in pictures:
        if source is not None and target is not None:
            groups.join(source, target)
    named = [next((name for name in names if name is not None), None) for names in pictures]
    return [f"record {record}" if name is None else groups.find(name) for record, name in zip(ids, named, strict=True)]


class StreamedSplits:
    """Splits of records that come one by one, by the perceptual hashes of their pictures."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def remember(self, hashes: tuple[int, ...], split: str) -> None:
        """Note where a record's pictures lie."""
        self._known.update(dict.fromkeys(hashes, split))

    def settle(self, hashes: tuple[int, ...]) -> str | None:
        """The split of a record with these pictures, the source first; None if they lie in two splits already."""
        known = {self._known[value] for value in hashes if value in self._known}
        if len(known) > 1:
            return None
        split = known.pop() if known else split_of(f"{hashes[0]:0{BITS // 4}x}")
        self.remember(hashes, split)
        return split


@dataclass(frozen=True)
class TwoSides:
    """What lies in more than one split.

    Attributes:
        sources: distinct pictures that are edited in two splits.
        targets: distinct pictures that are wanted in two splits.
        chained: distinct pictures that are wanted in one split and edited in another.
        alike: held-out records with a picture that looks like one of another split; None: not looked for.
    """

    sources: int
    targets: int
    chained: int
    alike: int | None = None

    def __bool__(self) -> bool:
        return bool(self.sources or self.targets or self.chained or self.alike)

    def __str__(self) -> str:
        parts = [
            f"{self.sources} source(s)",
            f"{self.targets} target(s)",
            f"{self.chained} picture(s) wanted on one side and edited on the other",
        ]
        parts += [] if self.alike is None else [f"{self.alike} held-out record(s) with a picture like one elsewhere"]
        return "on two sides of a split: " + ", ".join(parts)


def on_two_sides(splits: Sequence[str], pictures: Sequence[Pictures]) -> TwoSides:
    """Count the pictures that lie in more than one split, by their names."""
    edited: dict[str, set[str]] = {}
    wanted: dict[str, set[str]] = {}
    for split, (source, target) in zip(splits, pictures, strict=True):
        if source is not None:
            edited.setdefault(source, set()).add(split)
        if target is not None:
            wanted.setdefault(target, set()).add(split)
    return TwoSides(
        sum(len(found) > 1 for found in edited.values()),
        sum(len(found) > 1 for found in wanted.values()),
        sum(len(found | edited[name]) > 1 for name, found in wanted.items() if name in edited),
    )


def count_alike(records: Iterable[tuple[str, Record]]) -> int:
    """Held-out records with a picture that looks like one of the records before them in another split.

    Args:
        records: (split, record), those of `train` first.
    """
    seen: dict[str, DuplicateFinder] = {split: DuplicateFinder(NEAR) for split in SPLITS}
    alike = 0
    for split, record in records:
        hashes = [
            picture_hash(read_picture(data, f"record {record.id!r}").image)
            for data in (record.source, record.target)
            if data is not None
        ]
        others = [finder for name, finder in seen.items() if name != split]
        alike += any(finder.find((value,), "") is not None for finder in others for value in hashes)
        for value in hashes:
            seen[split].seen((value,), "", record.id)
    return alike
