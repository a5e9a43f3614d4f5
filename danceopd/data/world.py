"""The small world: captioned pixel-art scenes and three tasks made from them.

A scene is a 2x2 board on a plain background; each place holds nothing or one colored shape. It is drawn as pixel-art
on an 8x8 grid and shown at 64x64 pixels, so that one latent of a factor-8 autoencoder sees one grid pixel: a nearest
upsampling decoder cannot tell apart the grid pixels inside one latent, and learns them very slowly. From scenes come
three tasks, written as the same records a user would bring:

- `t2i`: draw a scene that a caption describes;
- `local_edit`: recolor, remove or add one object, everything else preserved;
- `global_style`: the whole picture in one of the styles.

Words may leave something open, in as large a share of captions and instructions as is asked for: "ring on white" (any
color, any place), "add a red cross", "paint the blue ring". What such words allow is a set of scenes (`Wanted`), and a
record's target is one of them, drawn evenly. A picture that mixes two of them is wrong, so an average of the possible
pictures, which is all that one sampling step can draw, does not pass.

A fourth, `outline`, is kept for a student that has learned these and is taught one more (recipe `world_outline`): every
object as a line drawing in black ink on white paper.

The grammar is held out on purpose: one in ten (color, shape, position) combinations and one wording of every
kind of instruction occur in the test split only; one in 32 captions and source scenes, by a hash, in `val` only. Every
draw comes from `random.Random` seeded by the record's own name, so a record does not depend on its neighbours, nor on a
library's version. Where words leave something open, `DRAWS` held-out records in a row share them (and the source), so
that diversity can be measured.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from danceopd.data.png import encode_png
from danceopd.data.records import Record
from danceopd.errors import unknown_name

GRID, SCALE = 8, 8
SIZE = GRID * SCALE
CELL = GRID // 2

COLORS = {
    "red": (220, 50, 47),
    "green": (60, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 200, 40),
    "purple": (150, 60, 190),
}
BACKGROUNDS = {"white": (240, 240, 240), "black": (24, 24, 28), "sand": (205, 180, 140)}
POSITIONS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
_SHAPE_ROWS = {
    "square": ("###", "###", "###"),
    "ring": ("###", "#.#", "###"),
    "cross": (".#.", "###", ".#."),
    "triangle": ("#..", "##.", "###"),
}
SHAPES = {n: np.array([[c == "#" for c in row] for row in rows]) for n, rows in _SHAPE_ROWS.items()}

TASKS = ("t2i", "local_edit", "global_style")
LATER_TASKS = ("outline",)  # of the recipes that add to a champion; neither the base's maker nor `world` knows them
OPEN_TASKS = ("t2i", "local_edit")  # those whose words may leave something open
EDITS = ("recolor", "remove", "add")
DRAWS = 4  # held-out records in a row that ask for the same, where that leaves something open

_LUMA = np.array([0.299, 0.587, 0.114])
_SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
STYLES = {
    "grayscale": lambda x: np.repeat((x @ _LUMA)[..., None], 3, axis=-1),
    "negative": lambda x: 255.0 - x,
    "night": lambda x: x * np.array([0.35, 0.45, 0.75]) + np.array([0.0, 5.0, 40.0]),
    "sepia": lambda x: x @ _SEPIA.T,
}

# Wordings: the last of each list is held out of training, of a long list the last two, so that not all depends on one
# phrase. Each is made of words that training does contain.
LONG_LIST = 8
# The shipped bases were made before those with "put" and understand them all the same (`world` draws 128 of 128 right,
# `world_open` 95 and 99 % of 288, and 99 % of the others): what teaches a wording needs no targets.
CAPTIONS = (
    "{objects} on {background}",
    "draw {objects} on {background}",
    "put {objects} on {background}",
    "on {background}, {objects}",
    "on {background}, put {objects}",
    "on {background}, draw {objects}",
)
WORDINGS = {
    "recolor": (
        "make the {object} {color}",
        "change the {object} to {color}",
        "paint the {object} {color}",
        "change the color of the {object} to {color}",
        "make the color of the {object} {color}",
    ),
    "remove": ("remove the {object}", "delete the {object}", "take away the {object}", "take the {object} away"),
    "add": (
        "add a {object} at the {position}",
        "put a {object} at the {position}",
        "at the {position}, put a {object}",
        "at the {position}, add a {object}",
    ),
    # Every verb with two objects but for two pairs, and three more verbs than those, so that a field can tell what each
    # of the words does: with fewer, some students learned phrases and failed at "turn it".
    "style": (
        "make it {style}",
        "make the picture {style}",
        "change it to {style}",
        "change the picture to {style}",
        "color it {style}",
        "color the picture {style}",
        "draw it in {style}",
        "draw the picture in {style}",
        "paint the picture {style}",
        "turn the picture {style}",
        "paint it {style}",
        "turn it {style}",
    ),
}
OPEN_WORDINGS = {
    "recolor": (
        "change the color of the {object}",
        "paint the {object}",
        "color the {object}",
        "paint the color of the {object}",
    ),
    "add": (
        "add a {object}",
        "put a {object} in the picture",
        "in the picture, put a {object}",
        "in the picture, add a {object}",
    ),
}
OUTLINE_WORDINGS = (
    "make it an outline",
    "turn the picture into an outline",
    "draw the outline of the picture",
    "turn it into an outline",
)
REPEATS = ("the same picture", "keep the picture")  # what the base is taught to do with a reference
NOVELTIES = ("combination", "wording", "both")
FREEDOMS = {"": (False, False), "place": (True, False), "color": (False, True), "place and color": (True, True)}
# A place is harder to settle than a color: it takes two places of the board, one that is filled and one that is not.
OPENINGS = ("color", "color", "color", "color", "place", "place and color")


@dataclass(frozen=True, order=True)
class Thing:
    """One object: a color, a shape, a place on the board."""

    position: str
    color: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and one to four things, at most one per place, no two of the same name."""

    background: str
    things: tuple[Thing, ...]

    def at(self, position: str) -> Thing | None:
        return next((t for t in self.things if t.position == position), None)

    def to_json(self) -> dict:
        return {"background": self.background, "things": [[t.position, t.color, t.shape] for t in self.things]}

    @classmethod
    def from_json(cls, data: dict) -> Scene:
        return cls(data["background"], tuple(Thing(*t) for t in data["things"]))


@dataclass(frozen=True)
class Wish:
    """One thing that words ask for, with every place and every color that they allow."""

    positions: tuple[str, ...]
    colors: tuple[str, ...]
    shape: str

    @classmethod
    def of(cls, thing: Thing, free: str = "") -> Wish:
        """The wish for a thing of which `free`, a key of `FREEDOMS`, is left open."""
        place, color = FREEDOMS[free]
        return cls(
            tuple(POSITIONS) if place else (thing.position,), tuple(COLORS) if color else (thing.color,), thing.shape
        )

    @property
    def words(self) -> str:
        """How it is said: what is open is not named."""
        color = f"{self.colors[0]} " if len(self.colors) == 1 else ""
        place = f" {self.positions[0]}" if len(self.positions) == 1 else ""
        return f"{color}{self.shape}{place}"


@dataclass(frozen=True)
class Wanted:
    """The scenes that words allow: on this background, one thing for every wish, and nothing else."""

    background: str
    wishes: tuple[Wish, ...]

    @classmethod
    def exactly(cls, scene: Scene) -> Wanted:
        return cls(scene.background, tuple(Wish.of(t) for t in scene.things))

    def scenes(self) -> list[Scene]:
        """Every allowed scene, in a fixed order."""
        things = [[Thing(p, c, wish.shape) for p in wish.positions for c in wish.colors] for wish in self.wishes]
        found = [c for c in itertools.product(*things) if _differ(c)]
        return sorted({Scene(self.background, tuple(sorted(c))) for c in found}, key=lambda s: s.things)

    def to_json(self) -> dict:
        wishes = [[list(w.positions), list(w.colors), w.shape] for w in self.wishes]
        return {"background": self.background, "wishes": wishes}

    @classmethod
    def from_json(cls, data: dict) -> Wanted:
        return cls(data["background"], tuple(Wish(tuple(p), tuple(c), s) for p, c, s in data["wishes"]))


def _differ(things: tuple[Thing, ...]) -> bool:
    """Whether no two things share a place, and no two a name."""
    return len({t.position for t in things}) == len(things) == len({t.name for t in things})


@dataclass(frozen=True)
class Edit:
    """A local edit: what is done, to which thing, (recolor) the new color, and what the instruction leaves open."""

    kind: str
    thing: Thing
    color: str | None = None
    free: str = ""

    def allows(self, scene: Scene) -> Wanted:
        """Every scene that does what the instruction asks of this one."""
        if not self.free:
            return Wanted.exactly(self.apply(scene))
        kept = Wanted.exactly(replace(scene, things=tuple(t for t in scene.things if t != self.thing)))
        wish = Wish.of(self.thing, self.free)
        if self.kind == "recolor":
            wish = replace(wish, colors=tuple(c for c in wish.colors if c != self.thing.color))
        return replace(kept, wishes=(*kept.wishes, wish))

    def apply(self, scene: Scene) -> Scene:
        rest = tuple(t for t in scene.things if t.position != self.thing.position)
        if self.kind == "remove":
            return replace(scene, things=rest)
        thing = self.thing
        if self.kind == "recolor":
            assert self.color is not None
            thing = replace(thing, color=self.color)
        return replace(scene, things=tuple(sorted((*rest, thing))))


def is_held_out(thing: Thing) -> bool:
    """Whether this (color, shape, position) is kept for the test split: 8 of the 80."""
    c, s, p = list(COLORS).index(thing.color), list(SHAPES).index(thing.shape), list(POSITIONS).index(thing.position)
    return (c + 2 * s + 3 * p) % 10 == 0


ALL_THINGS = tuple(Thing(p, c, s) for p, c, s in itertools.product(POSITIONS, COLORS, SHAPES))
HELD_OUT = tuple(t for t in ALL_THINGS if is_held_out(t))
TRAINED = tuple(t for t in ALL_THINGS if not is_held_out(t))


@functools.cache
def draw_cell(background: str, position: str, thing: Thing | None) -> np.ndarray:
    """One place of the board on the grid: (4, 4, 3) float64 in [0, 255], read-only; shapes keep to the outer corner."""
    cell = np.tile(np.array(BACKGROUNDS[background], dtype=np.float64), (CELL, CELL, 1))
    if thing is not None:
        row, col = POSITIONS[position]
        cell[row : row + 3, col : col + 3][SHAPES[thing.shape]] = COLORS[thing.color]
    cell.flags.writeable = False
    return cell


def cell_slice(position: str, scale: int = SCALE) -> tuple[slice, slice]:
    """Where a place lies in the picture, as (rows, columns) in pixels."""
    row, col = POSITIONS[position]
    side = CELL * scale
    return slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)


def render(scene: Scene, style: str | None = None) -> np.ndarray:
    """Draw a scene: (64, 64, 3) uint8; `style` is a key of `STYLES` or None."""
    grid = np.empty((GRID, GRID, 3))
    for position in POSITIONS:
        grid[cell_slice(position, scale=1)] = draw_cell(scene.background, position, scene.at(position))
    if style is not None:
        if style not in STYLES:
            raise unknown_name("style", style, STYLES)
        grid = STYLES[style](grid)
    return _enlarge(grid)


def render_outline(scene: Scene) -> np.ndarray:
    """Draw a scene's objects as lines, black on white: (64, 64, 3) uint8. What a line encloses is left empty."""
    grid = np.tile(np.array(BACKGROUNDS["white"], dtype=np.float64), (GRID, GRID, 1))
    for thing in scene.things:
        row, col = (CELL * place + place for place in POSITIONS[thing.position])  # at the outer corner of its place
        grid[row : row + 3, col : col + 3][_border(SHAPES[thing.shape])] = BACKGROUNDS["black"]
    return _enlarge(grid)


def _border(shape: np.ndarray) -> np.ndarray:
    """The pixels of a shape (3, 3) that have a neighbour above, below, left or right outside of it."""
    around = np.pad(shape, 1)
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return shape & ~inside


def _enlarge(grid: np.ndarray) -> np.ndarray:
    """The picture of a grid (8, 8, 3) of colors in [0, 255]: (64, 64, 3) uint8."""
    pixels = np.clip(np.floor(grid + 0.5), 0, 255).astype(np.uint8)
    return pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def random_scene(rng: random.Random, novel: bool = False, most: int = 3, fewest: int = 1) -> Scene:
    """Draw a scene of `fewest` to `most` things; `novel` puts at least one held-out combination in it."""
    count = rng.randint(fewest, most)
    places = rng.sample(list(POSITIONS), count)
    things: list[Thing] = []
    if novel:
        things.append(rng.choice(HELD_OUT))
        places = [things[0].position, *[p for p in places if p != things[0].position][: count - 1]]
    for place in places[len(things) :]:
        taken = {t.name for t in things}
        things.append(rng.choice([t for t in TRAINED if t.position == place and t.name not in taken]))
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(sorted(things)))


def held_out_wordings(wordings: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a list that occur in the test split only."""
    return wordings[-2 if len(wordings) >= LONG_LIST else -1 :]


def _wording(rng: random.Random, wordings: tuple[str, ...], novel: bool) -> str:
    held_out = held_out_wordings(wordings)
    if novel and len(held_out) == 1:  # no draw, so that what is drawn after it stays as it is
        return held_out[0]
    return rng.choice(held_out if novel else wordings[: -len(held_out)])


def random_wishes(rng: random.Random, novel: bool = False) -> Wanted:
    """Draw words for one or two things, of which one is left open; `novel` names a held-out combination in full.

    A color is left open only where no other thing has the shape: of "ring, red ring" nobody could tell which is which.
    """
    scene = random_scene(rng, novel=novel, most=2, fewest=2 if novel else 1)
    thing = rng.choice([t for t in scene.things if not (novel and is_held_out(t))] or scene.things)
    free = rng.choice(OPENINGS)
    alone = [t.shape for t in scene.things].count(thing.shape) == 1
    wanted = Wanted(scene.background, tuple(Wish.of(t, free if t == thing else "") for t in scene.things))
    ambiguous = "color" in free and not alone
    named = not novel or not is_held_out(thing)
    return wanted if named and not ambiguous and len(wanted.scenes()) > 1 else random_wishes(rng, novel)


def allowed_scene(wanted: Wanted, rng: random.Random) -> Scene:
    """One of the allowed scenes; one that training may show, unless the words themselves name a held-out thing."""
    scenes = wanted.scenes()
    known = [s for s in scenes if not any(is_held_out(t) for t in s.things)]
    return rng.choice(known or scenes)


def caption(wanted: Wanted, rng: random.Random, novel: bool = False) -> str:
    """A caption naming every wish, in random order; `novel` takes the held-out wording."""
    objects = ", ".join(w.words for w in rng.sample(wanted.wishes, len(wanted.wishes)))
    return _wording(rng, CAPTIONS, novel).format(objects=objects, background=wanted.background)


def _random_edit(rng: random.Random, novel: bool) -> tuple[Scene, Edit]:
    kind = rng.choice(EDITS)
    if kind == "add":
        scene = random_scene(rng)
        names = {t.name for t in scene.things}
        pool = HELD_OUT if novel else TRAINED
        free = [t for t in pool if scene.at(t.position) is None and t.name not in names]
        return (scene, Edit("add", rng.choice(free))) if free else _random_edit(rng, novel)
    scene = random_scene(rng, novel=novel, fewest=2 if kind == "remove" else 1)
    thing = rng.choice([t for t in scene.things if is_held_out(t)] if novel else scene.things)
    if kind == "remove":
        return scene, Edit("remove", thing)
    names = {t.name for t in scene.things}
    changed = [replace(thing, color=c) for c in COLORS if f"{c} {thing.shape}" not in names]
    changed = changed if novel else [t for t in changed if not is_held_out(t)]
    return scene, Edit("recolor", thing, rng.choice(changed).color)


def _random_open_edit(rng: random.Random, novel: bool) -> tuple[Scene, Edit]:
    """An edit whose instruction leaves something open; `novel` puts a held-out thing in the source."""
    scene = random_scene(rng, novel=novel)
    if rng.random() < 0.5:
        thing = rng.choice([t for t in scene.things if is_held_out(t)] if novel else scene.things)
        edit = Edit("recolor", thing, free="color")
    else:
        thing = rng.choice([t for t in TRAINED if scene.at(t.position) is None])
        edit = Edit("add", thing, free=rng.choice(OPENINGS))
    return (scene, edit) if len(edit.allows(scene).scenes()) > 1 else _random_open_edit(rng, novel)


def instruction(edit: Edit, rng: random.Random, novel: bool = False) -> str:
    """What a person would type for this edit."""
    place, color = FREEDOMS[edit.free]
    unsaid = color if edit.kind == "recolor" else place
    text = _wording(rng, (OPEN_WORDINGS if unsaid else WORDINGS)[edit.kind], novel)
    name = edit.thing.shape if edit.kind == "add" and color else edit.thing.name
    return text.format(object=name, color=edit.color, position=edit.thing.position)


@dataclass(frozen=True)
class _Order:
    """What one record is to hold: its words' freedom, what is new in it, and where its draws come from."""

    split: str
    asked: random.Random  # draws words and source
    drawn: random.Random  # draws one of the allowed targets
    leaves_open: bool
    novelty: str

    @property
    def new_combination(self) -> bool:
        return self.novelty in ("combination", "both")

    @property
    def new_wording(self) -> bool:
        return self.novelty in ("wording", "both")


def _order(task: str, split: str, index: int, seed: int, open_share: float) -> _Order:
    """Records with open words are spread evenly over a split; those that are held out come `DRAWS` at a time."""
    share = open_share if task in OPEN_TASKS else 0.0
    before = math.floor(index * share)
    leaves_open = math.floor((index + 1) * share) > before
    asked, kind = index, ""
    if leaves_open:
        asked, kind = before if split == "train" else before // DRAWS, "open/"
    name = f"danceopd-world/{seed}/{task}/{split}/{kind}{asked}"
    novelty = NOVELTIES[asked % len(NOVELTIES)] if split == "test" else "none"
    return _Order(split, random.Random(name), random.Random(f"{name}/{index}"), leaves_open, novelty)


def _in_its_split(split: str, what: object) -> bool:
    """Whether this caption's meaning or source scene may occur in the split: one in 32 is for `val` alone."""
    for_val = hashlib.sha256(repr(what).encode()).digest()[0] < 8
    return split == "test" or for_val == (split == "val")


def _draw_caption(order: _Order) -> tuple[Wanted, Scene]:
    while True:
        if order.leaves_open:
            wanted = random_wishes(order.asked, order.new_combination)
        else:
            wanted = Wanted.exactly(random_scene(order.asked, novel=order.new_combination))
        if _in_its_split(order.split, (wanted.background, sorted(w.words for w in wanted.wishes))):
            return wanted, allowed_scene(wanted, order.drawn)


def _draw_edit(order: _Order) -> tuple[Scene, Edit, Wanted, Scene]:
    while True:
        draw = _random_open_edit if order.leaves_open else _random_edit
        scene, edit = draw(order.asked, order.new_combination)
        if _in_its_split(order.split, scene):
            wanted = edit.allows(scene)
            return scene, edit, wanted, allowed_scene(wanted, order.drawn)


def _draw_source(order: _Order) -> Scene:
    while True:
        scene = random_scene(order.asked, novel=order.new_combination)
        if _in_its_split(order.split, scene):
            return scene


def _record(task: str, split: str, index: int, seed: int, open_share: float) -> Record:
    order = _order(task, split, index, seed, open_share)
    facts: dict = {"maker": "danceopd.data.world", "seed": seed, "novelty": order.novelty}
    source = None
    if task == "t2i":
        wanted, scene = _draw_caption(order)
        prompt, target = caption(wanted, order.asked, order.new_wording), render(scene)
        facts |= {"scene": scene.to_json(), "wanted": wanted.to_json()}
    elif task == "local_edit":
        before, edit, wanted, scene = _draw_edit(order)
        prompt, source, target = instruction(edit, order.asked, order.new_wording), render(before), render(scene)
        facts |= {"scene": scene.to_json(), "wanted": wanted.to_json(), "edit": edit.kind}
        if not order.leaves_open:
            facts["position"] = edit.thing.position
    elif task == "global_style":
        scene, style = _draw_source(order), order.asked.choice(list(STYLES))
        prompt = _wording(order.asked, WORDINGS["style"], order.new_wording).format(style=style)
        source, target = render(scene), render(scene, style)
        facts |= {"scene": scene.to_json(), "style": style}
    elif task == "outline":
        scene = _draw_source(order)
        prompt = _wording(order.asked, OUTLINE_WORDINGS, order.new_wording)
        source, target = render(scene), render_outline(scene)
        facts["scene"] = scene.to_json()
    else:
        raise unknown_name("task of the small world", task, (*TASKS, *LATER_TASKS))
    if task in OPEN_TASKS:
        facts["open"] = order.leaves_open
    return Record(
        id=f"world-{task}-{split}-{index:06d}",
        task=task,
        prompt=prompt,
        source=None if source is None else encode_png(source),
        target=encode_png(target),
        split=split,
        provenance=json.dumps(facts, sort_keys=True),
    )


def world_records(sizes: dict[str, dict[str, int]], seed: int = 0, open_share: float = 0.0) -> Iterator[Record]:
    """Yield the world's records: `sizes[task][split]` of each, in a fixed order.

    Args:
        sizes: how many.
        seed: of every draw.
        open_share: share of the records of `OPEN_TASKS` whose words leave something open, in [0, 1].

    Raises:
        UserError: if a task is neither in `TASKS` nor in `LATER_TASKS`.
    """
    for task, splits in sizes.items():
        for split, count in splits.items():
            for index in range(count):
                yield _record(task, split, index, seed, open_share)


def corpus() -> list[str]:
    """Every wording filled with every word once: what the small tokenizer is trained on."""
    words = {
        "objects": ", ".join(f"{t.name} {t.position}" for t in ALL_THINGS),
        "object": " ".join(t.name for t in ALL_THINGS),
        "background": " ".join(BACKGROUNDS),
        "color": " ".join(COLORS),
        "position": " ".join(POSITIONS),
        "style": " ".join(STYLES),
    }
    return [w.format(**words) for w in itertools.chain(CAPTIONS, REPEATS, *WORDINGS.values())]
