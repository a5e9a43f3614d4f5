"""The chain's steps over a workspace folder: base, data, teachers, student, evaluation, registration.

Every step writes one product folder, named by the content of everything it depends on (recipe section, inputs'
digests, code), whole or not at all; a product that exists already is reused. Command line, Kubeflow components and GPU
jobs all call these functions, so that a retried pod and a second run on a laptop pick up what is there.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd import recording
from danceopd.cost import TRAINED, Spent, cost_table
from danceopd.errors import UserError
from danceopd.files import FIELD, atomic_folder, content_key, hash_file, hash_folder, read_json, write_json
from danceopd.journal import FINISHED, Journal, end_run, open_journal
from danceopd.recipe import BaseTeacher, ChampionTeacher, CheckpointTeacher, FinetunedTeacher, Recipe

if TYPE_CHECKING:  # torch and diffusers are slow to import, and some steps need neither
    from torch import Tensor

    from danceopd.backbones.base import Backbone
    from danceopd.data.encoded import EncodedRecords, Sizing
    from danceopd.fields import Field, VelocityField
    from danceopd.processes import Processes
    from danceopd.registry import Registration

log = logging.getLogger(__name__)
STEP = "step.json"
STUDENTS = "students"
NOTHING = 1e-5  # of the velocity: two fields that differ by less differ by rounding
MODELS = ("teachers", STUDENTS)  # steps whose products are models


@dataclass(frozen=True)
class Product:
    """What a step made.

    Attributes:
        folder: where it lies.
        digest: SHA-256 of its files.
        facts: figures and names worth passing on.
    """

    folder: Path
    digest: str
    facts: dict[str, Any]

    @property
    def pipeline(self) -> Path:
        """The diffusers pipeline folder of a base or student product."""
        return self.folder / self.facts["pipeline"]


def open_product(folder: Path) -> Product:
    """Read a product folder back.

    Raises:
        UserError: if it is not there, or not whole.
    """
    folder = Path(folder)
    if not (folder / STEP).is_file():
        raise UserError(f"{folder}: no finished step there ({STEP} is missing); run the step before this one again")
    data = read_json(folder / STEP)
    return Product(folder, data["digest"], data["facts"])


@functools.cache
def code_revision() -> str:
    """A name for the method's own code: the same sources, the same name, with or without git."""
    package = Path(str(resources.files("danceopd")))
    sources = [p for pattern in ("**/*.py", "**/*.j2") for p in package.glob(pattern)]
    return content_key(sorted((p.relative_to(package).as_posix(), hash_file(p)) for p in sources))


def _make(
    workspace: Path, step: str, name: str, inputs: Any, build: Callable[[Path, Path], dict], together: bool = False
) -> Product:
    """Reuse the product, or have `build` write it into the first folder it is given and say its facts.

    The second folder is for what a build that was stopped needs to go on with when it is run again; it is named by the
    product's key and removed once the product is there. Of several processes the main one makes the product; the
    others wait for it, or take part in a build that is done `together` (training) and leave the writing to it.
    """
    key = _key(step, name, inputs)
    folder = Path(workspace) / step / f"{name}-{key}"
    checkpoints = Path(workspace) / "checkpoints" / f"{step}-{name}-{key}"
    there = (folder / STEP).is_file()
    processes = _processes()
    if processes is not None:
        processes.wait()  # all have looked before any writes
        if not processes.main:
            if together and not there:
                with tempfile.TemporaryDirectory() as scratch:
                    build(Path(scratch), checkpoints)
            processes.wait()
            return open_product(folder)
    if there:
        shutil.rmtree(checkpoints, ignore_errors=True)
        log.info("%s %s: reused from %s", step, name, folder)
    else:
        _build(Path(workspace), folder, checkpoints, step, name, key, build)
    if processes is not None:
        processes.wait()
    return open_product(folder)


def _key(step: str, name: str, inputs: Any) -> str:
    return content_key(step, name, inputs, code_revision())


def _build(
    workspace: Path,
    folder: Path,
    checkpoints: Path,
    step: str,
    name: str,
    key: str,
    build: Callable[[Path, Path], dict],
) -> None:
    started = time.monotonic()
    with atomic_folder(folder) as scratch, recording.recorded(workspace, checkpoints.name):
        facts = build(scratch, checkpoints)
        seconds = round(time.monotonic() - started, 1)
        digest = hash_folder(scratch)
        if step in MODELS:
            recording.model_made(open_journal(workspace, checkpoints.name), name, folder, digest, facts)
        write_json(scratch / STEP, {"step": step, "key": key, "digest": digest, "facts": facts, "seconds": seconds})
    shutil.rmtree(checkpoints, ignore_errors=True)
    log.info("%s %s: done in %.0f s, %s", step, name, seconds, folder)


def _processes() -> Processes | None:
    """The processes that run this together, or None if it runs alone (then torch is not imported for the question)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from danceopd.processes import this_process

    return this_process()


def _main_first() -> AbstractContextManager:
    """Of several processes, let the main one run the block first; the others find what it wrote."""
    processes = _processes()
    return nullcontext() if processes is None else processes.main_first()


# ---------------------------------------------------------------------------------------------------------- base, data


def resolve_base(recipe: Recipe, workspace: Path) -> Product:
    """Bring the base's pipeline folder to where every later step can read it.

    Raises:
        UserError: if it cannot be found, or the shipped one is damaged.
    """
    from danceopd.bases import fetch_base, fetch_weights

    source, model = fetch_base(recipe.model.base, recipe.model.revision, Path(workspace)), recipe.model
    other = (
        None if model.transformer is None else fetch_weights(model.transformer, Path(workspace), "model.transformer")
    )

    def build(scratch: Path, checkpoints: Path) -> dict:
        settings = {"model": recipe.model.model_dump(mode="json")}
        recording.begin(recipe, workspace, checkpoints.name, f"base {source.name}", settings)
        if other is not None:
            _join_transformer(recipe, source.folder, other, scratch / "pipeline")
        elif source.shipped:
            shutil.copytree(source.folder, scratch / "pipeline")
        name = "pipeline" if source.shipped or other is not None else str(source.folder)
        # A base that stays where it is leaves nothing else here to tell its product's digest from another's.
        write_json(scratch / "source.json", {"weights": source.digest})
        return {"pipeline": name, "base": recipe.model.base, "weights": source.digest}

    inputs = [source.digest, str(source.folder)]
    return _make(workspace, "base", source.name, inputs + ([_hash(other), model.dtype] if other else []), build)


def _join_transformer(recipe: Recipe, base: Path, weights: Path, folder: Path) -> None:
    """A base's pipeline folder with other weights for its transformer."""
    from danceopd.backbones import load_backbone

    backbone = load_backbone(base, recipe.model.model_copy(update={"quantize": None, "attention": "native"}))
    backbone.save(folder, backbone.new_transformer(weights))


def _hash(weights: Path) -> str:
    return hash_file(weights) if weights.is_file() else hash_folder(weights)


def build_data(recipe: Recipe, workspace: Path, folder: Path | None = None, repo: Path | None = None) -> Product:
    """Make the task-tagged dataset, or find it: under DVC in the repository, in the workspace, or at `folder`.

    Args:
        recipe: its data section says what.
        workspace: where the product's card lies, and the dataset itself if it is not tracked.
        folder: write the dataset here instead.
        repo: the repository whose `data.dvc` may track the dataset; default: the one around the working directory.

    Raises:
        UserError: for invalid records, or data that is not what `data.dvc` names.
    """
    from danceopd.data import versioning
    from danceopd.data.assemble import assemble, open_dataset, recipe_records
    from danceopd.data.records import MANIFEST

    repo = versioning.find_repo(Path.cwd()) if repo is None else repo
    generated, read = _tracked_use(recipe, repo)
    tracked = generated and folder is None
    own = Path(workspace) / "datasets" / f"{recipe.name}-{data_revision(recipe, repo)}"
    home = Path(folder or (repo / "data" if tracked else own)).resolve()
    with _main_first():
        if (tracked or read) and not (repo / "data").is_dir():
            versioning.pull(repo)
        rebuild = folder is not None and (_processes() is None or _processes().main)
        if rebuild or not (home / MANIFEST).is_file():
            log.info("assembling the dataset at %s", home)
            needs_source = {task: spec.needs_source for task, spec in recipe.tasks.items()}
            assemble(recipe_records(recipe.data), home, needs_source)
    dataset = open_dataset(home)
    version = versioning.verify(repo, repo / "data") if tracked or read else None
    facts = {
        "dataset": str(home),
        "content": dataset.content,
        "counts": dataset.manifest["counts"],
        "dvc": version.dvc if version else None,
        "git": versioning.git_revision(repo) if repo else None,
    }

    def build(scratch: Path, checkpoints: Path) -> dict:
        settings = {"data": recipe.data.model_dump(mode="json")}
        recording.begin(recipe, workspace, checkpoints.name, f"data {recipe.name}", settings, facts, "data")
        write_json(scratch / "dataset.json", facts)
        return facts

    return _make(workspace, "data", recipe.name, facts, build)


def _data_key(recipe: Recipe) -> str:
    return content_key(recipe.data.model_dump(mode="json"))


def _tracked_use(recipe: Recipe, repo: Path | None) -> tuple[bool, bool]:
    """What the repository's tracked `data/` is to a recipe: its generated dataset (`data.dvc` says so in its `meta`),
    and the place its inputs lie in."""
    from danceopd.data import versioning

    entry = None if repo is None else versioning.tracked(repo, repo / "data")
    if entry is None:
        return False, False
    inside = [Path(location).resolve().is_relative_to(entry.path) for location in recipe.data.inputs]
    return entry.meta.get("recipe_data") == _data_key(recipe), any(inside)


def track_data(recipe: Recipe, repo: Path) -> str:
    """Build the recipe's dataset anew as the repository's `data/` and record it in `data.dvc`; returns DVC's hash."""
    from danceopd.data import versioning
    from danceopd.data.assemble import assemble, recipe_records

    needs_source = {task: spec.needs_source for task, spec in recipe.tasks.items()}
    assemble(recipe_records(recipe.data), repo / "data", needs_source)
    return versioning.track(repo, repo / "data", recipe_data=_data_key(recipe)).md5


def data_revision(recipe: Recipe, repo: Path | None = None) -> str:
    """A name for the data a run would read, found without reading it: a cache key that never serves stale data."""
    from danceopd.data import versioning

    repo = versioning.find_repo(Path.cwd()) if repo is None else repo
    entry = versioning.tracked(repo, repo / "data") if repo is not None else None
    inputs = [_input_state(Path(location)) for location in recipe.data.inputs]
    return content_key(recipe.data.model_dump(mode="json"), entry.md5 if entry else None, inputs)


def _input_state(path: Path) -> list:
    files = [path] if path.is_file() else sorted(p for p in path.glob("**/*") if p.is_file())
    return [(p.as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


# ------------------------------------------------------------------------------------------------------------ teachers


def _open_backbone(recipe: Recipe, base: Product) -> Backbone:
    from danceopd.backbones import load_backbone
    from danceopd.processes import this_process

    return load_backbone(base.pipeline, recipe.model, this_process().device)


def _encode(
    recipe: Recipe,
    backbone: Backbone,
    base: Product,
    data: Product,
    workspace: Path,
    split: str,
    targets: bool,
    tasks: tuple[str, ...],
    limit: int | None = None,
    own_sizes: bool = False,
) -> tuple[list, EncodedRecords]:
    from danceopd.data.assemble import open_dataset
    from danceopd.data.encoded import encode_records

    dataset = open_dataset(Path(data.facts["dataset"]))
    records = [record for task in tasks for record in dataset.records(split, task, limit)]
    cache = Path(workspace) / "cache"
    model, key = recipe.model, _encoding_key(recipe, base)
    with _main_first():
        encoded = encode_records(backbone, records, model.height, model.width, cache, key, targets, own_sizes)
    return records, encoded


def _encode_train(
    recipe: Recipe,
    backbone: Backbone,
    base: Product,
    data: Product,
    workspace: Path,
    targets: bool,
    tasks: tuple[str, ...],
) -> EncodedRecords:
    """The training records of some tasks, encoded; through the recipe's cache if it names one."""
    if recipe.cache is None:
        own = recipe.model.sizes == "own"
        return _encode(recipe, backbone, base, data, workspace, "train", targets, tasks, own_sizes=own)[1]
    from danceopd.data.assemble import open_dataset
    from danceopd.data.cache import EncodingCache, encode_cached, fetch_cache
    from danceopd.processes import this_process

    with _main_first():
        cache = EncodingCache(fetch_cache(recipe.cache, workspace))
    dataset, processes = open_dataset(Path(data.facts["dataset"])), this_process()
    return encode_cached(
        backbone,
        lambda: dataset.stream("train", tasks),
        _sizing(recipe),
        cache,
        _encoding_key(recipe, base),
        targets,
        (processes.rank, processes.count),
        processes.wait,
    )


def cache_encodings(
    recipe: Recipe, base: Product, data: Product, folder: Path, share: tuple[int, int] | None = None
) -> dict[str, int]:
    """Encode what a recipe's training reads into a cache; returns the rows there by group.

    Args:
        recipe: whose training records, tasks and picture size.
        base: whose encoders.
        data: the dataset.
        folder: the cache; what is there is kept and used.
        share: this worker's number and how many there are; default: those of the processes started together.
    """
    from danceopd.data.assemble import open_dataset
    from danceopd.data.cache import EncodingCache, fill_cache, wanted_by
    from danceopd.distill import method_of
    from danceopd.processes import this_process

    backbone, processes, sizing = _open_backbone(recipe, base), this_process(), _sizing(recipe)
    dataset, cache = open_dataset(Path(data.facts["dataset"])), EncodingCache(folder)
    taught = {t.task for t in recipe.teachers.values() if isinstance(t, FinetunedTeacher)}
    with_targets = tuple(recipe.tasks) if method_of(recipe.distill).needs_targets else tuple(sorted(taught))
    for tasks, targets in ((tuple(recipe.tasks), False), (with_targets, True)):
        stream = functools.partial(dataset.stream, "train", tasks)
        wanted = wanted_by(backbone, stream(), targets, sizing)
        fill_cache(
            backbone,
            wanted,
            stream,
            sizing,
            cache,
            _encoding_key(recipe, base),
            targets,
            share or (processes.rank, processes.count),
        )
    processes.wait()
    return cache.write_index()


def _sizing(recipe: Recipe) -> Sizing:
    from danceopd.data.encoded import Sizing

    return Sizing(recipe.model.height, recipe.model.width, recipe.model.sizes == "own")


def _encoding_key(recipe: Recipe, base: Product) -> str:
    model = recipe.model
    return content_key(base.digest, model.max_sequence_length, model.text_encoder_out_layers)


def _encode_empty(recipe: Recipe, backbone: Backbone, base: Product, workspace: Path) -> Tensor:
    from danceopd.data.encoded import encode_empty

    with _main_first():
        return encode_empty(backbone, Path(workspace) / "cache", _encoding_key(recipe, base))


def _load_teachers(
    recipe: Recipe, backbone: Backbone, base: Product, teachers: dict[str, Product], workspace: Path
) -> dict[str, Field]:
    from danceopd.checkpoint import load_fields
    from danceopd.processes import this_process

    folders = {name: product.folder for name, product in teachers.items()}
    offload = this_process().device if recipe.model.offload else None
    return load_fields(backbone, folders, lambda: _encode_empty(recipe, backbone, base, workspace), offload)


def finetune_teacher(
    recipe: Recipe, teacher: str, base: Product, data: Product, workspace: Path, tracking_uri: str | None = None
) -> Product:
    """Make one teacher's field folder: fine-tuned, or taken from where it lies, and proved better than the base.

    The champion is taken as it is: it was judged when it was registered, and here it only holds what it can do.

    Args:
        recipe: what the teacher is.
        teacher: its name there.
        base: its product.
        data: its product.
        workspace: folder all steps share.
        tracking_uri: store of the registered champion; default: the one in the workspace.

    Raises:
        UserError: if the teacher is unknown, has no training records, is no better than the base on its task, or is
            the champion and there is none.
    """
    if teacher not in recipe.teachers:
        raise UserError(f"teacher {teacher!r} is not in the recipe; teachers are: {', '.join(recipe.teachers)}")
    spec, champion, weights = recipe.teachers[teacher], None, None
    inputs = [base.digest, recipe.model.decisive(), spec.decisive(), recipe.evaluate.steps]
    if isinstance(spec, CheckpointTeacher):
        from danceopd.bases import fetch_weights

        with _main_first():
            weights = fetch_weights(spec.path, Path(workspace), f"teachers.{teacher}.path")
        inputs.append(_hash(weights))
    elif isinstance(spec, ChampionTeacher):
        from danceopd.champion import fetch_champion, find_champion

        champion = find_champion(recipe, _store(tracking_uri, workspace))
        inputs.append(asdict(champion))
    plain_base = isinstance(spec, BaseTeacher) and spec.guidance is None
    if not plain_base:
        inputs.append(data.facts["content"])
        inputs.append([(t, s.metrics) for t, s in recipe.tasks.items() if s.teacher == teacher])

    def build(scratch: Path, checkpoints: Path) -> dict:
        if champion is None:
            return _build_teacher(recipe, teacher, base, data, Path(workspace), scratch, checkpoints, weights)
        with tempfile.TemporaryDirectory(dir=workspace) as fetched:
            folder = fetch_champion(champion, _store(tracking_uri, workspace), Path(fetched))
            facts = _build_teacher(recipe, teacher, base, data, Path(workspace), scratch, checkpoints, folder)
        write_json(scratch / "champion.json", asdict(champion))  # the same weights as another version: another product
        return facts | {"registered": {"model": champion.model, "version": champion.version}}

    return _make(workspace, "teachers", teacher, inputs, build, together=not plain_base)


def _store(tracking_uri: str | None, workspace: Path) -> str:
    from danceopd.tracking import default_tracking_uri

    return tracking_uri or default_tracking_uri(Path(workspace))


def _build_teacher(
    recipe: Recipe,
    teacher: str,
    base: Product,
    data: Product,
    workspace: Path,
    scratch: Path,
    checkpoints: Path,
    fetched: Path | None = None,
) -> dict:
    """Write a teacher's field folder; `fetched` is where the weights lie of one that exists already."""
    spec = recipe.teachers[teacher]
    settings = {"model": recipe.model.model_dump(mode="json"), "teacher": spec.model_dump(mode="json")}
    plain_base = isinstance(spec, BaseTeacher) and spec.guidance is None
    read = None if plain_base else data.facts
    journal = recording.begin(recipe, workspace, checkpoints.name, f"teacher {teacher}", settings, read)
    if plain_base:
        write_json(scratch / FIELD, {"kind": "base", "name": teacher})
        return {"kind": "base", "scores": {}}

    from danceopd.checkpoint import load_field, save_field
    from danceopd.devices import hardware
    from danceopd.fields import VelocityField
    from danceopd.operators import GuidedField
    from danceopd.processes import this_process

    if not isinstance(spec, ChampionTeacher):
        _require_held_out(recipe, data, teacher)
    backbone = _open_backbone(recipe, base)
    device = next(backbone.transformer.parameters()).device
    facts: dict[str, Any] = {"kind": spec.kind, "hardware": hardware(device, this_process().count)}
    if isinstance(spec, FinetunedTeacher):
        from danceopd.finetune import finetune
        from danceopd.resume import Checkpoints

        encoded = _encode_train(recipe, backbone, base, data, workspace, True, (spec.task,))
        _require_targets(encoded, spec.task)
        saves = Checkpoints(checkpoints, spec.train.keep_checkpoints, checkpoints.name)
        field, history = finetune(backbone, teacher, encoded, spec.train, saves, _recorder(journal, teacher))
        write_json(scratch / "history.json", history)
        forwards = TRAINED * spec.train.batch * spec.train.steps
        facts |= {"task": spec.task, "steps": spec.train.steps, "loss": history[-1]["loss"], "forwards": forwards}
    elif isinstance(spec, CheckpointTeacher | ChampionTeacher):
        from danceopd.preflight import check_pipeline, settle

        settle(check_pipeline(teacher, fetched, base.pipeline))
        field = load_field(backbone, teacher, fetched, lambda: _encode_empty(recipe, backbone, base, workspace))
        if isinstance(spec, CheckpointTeacher):
            _check_kind(teacher, spec, field)
    else:
        field = VelocityField(teacher, backbone, backbone.transformer)
    plain = field.field if isinstance(field, GuidedField) else field
    if spec.guidance is not None:  # the recipe's scale goes before the folder's
        field = GuidedField(
            plain, spec.guidance, _encode_empty(recipe, backbone, base, workspace), spec.guidance_batched
        )
    # Guidance would make another field of the base's own weights, too: where there are others, they are looked at.
    _prove_other_than_base(recipe, field if isinstance(spec, BaseTeacher) else plain, base)
    save_field(field, scratch)
    if not isinstance(spec, ChampionTeacher):
        facts["scores"] = _prove_teacher(recipe, field, base, data, workspace)
    return facts


def _require_held_out(recipe: Recipe, data: Product, teacher: str) -> None:
    """Before hours of training: is there anything to prove the teacher on afterwards?"""
    for task, spec in recipe.tasks.items():
        if spec.teacher == teacher and not data.facts["counts"].get(task, {}).get("val"):
            raise UserError(
                f"task {task!r}: no records in split 'val', on which teacher {teacher!r} is "
                "measured against the base; move some there (a record's 'split')"
            )


def _check_kind(teacher: str, spec: CheckpointTeacher, field: Field) -> None:
    found = "checkpoint" if field.adapter is None else "lora"
    if spec.kind != found:
        raise UserError(f"teachers.{teacher}.kind is {spec.kind}, and {spec.path} holds a {found}; write kind: {found}")


def _prove_other_than_base(recipe: Recipe, field: Field, base: Product) -> None:
    """Hold a teacher against the base.

    Raises:
        UserError: if it changes nothing.
    """
    from danceopd.backbones.base import Condition
    from danceopd.backbones.weights import same_weights
    from danceopd.checkpoint import probe
    from danceopd.fields import VelocityField

    spec, backbone, model = recipe.teachers[field.name], field.backbone, recipe.model
    condition = Condition(backbone.encode_prompts(["", recipe.name]), None, model.height, model.width)
    mine, bare = (probe(f, condition) for f in (field, VelocityField("base", backbone, backbone.transformer)))
    change = float((mine - bare).square().mean().sqrt() / bare.square().mean().sqrt())
    if field.network is not backbone.transformer and same_weights(field.network, base.pipeline / "transformer"):
        change = 0.0  # what differs is how the base's weights are rounded
    log.info("teacher %s changes the base's velocity by %.3g of its size", field.name, change)
    if not change > NOTHING:  # NaN is refused, too
        if isinstance(spec, CheckpointTeacher):
            why = f"{spec.path}: an untrained LoRA, or this base's own weights? For the base itself write kind: base"
        elif isinstance(spec, FinetunedTeacher):
            why = f"train it longer, or at a higher rate (teachers.{field.name}.train)"
        elif isinstance(spec, ChampionTeacher):
            why = "the registered champion has this base's own weights; promote another version"
        else:
            why = "guidance finds no difference between a prompt and none; write kind: base without guidance"
        raise UserError(
            f"teachers.{field.name} changes the base's velocity by {change:.1g} of its size, which is nothing; {why}"
        )


def _recorder(journal: Journal, name: str) -> Callable[[dict], None]:
    """What takes a training's history down, entry by entry."""
    return functools.partial(recording.entry, journal, name)


def _require_targets(encoded: EncodedRecords, task: str) -> None:
    lacking = sum(row < 0 for row, of in zip(encoded.target_row.tolist(), encoded.tasks, strict=True) if of == task)
    if lacking:
        raise UserError(
            f"task {task!r}: {lacking} training records have no target image; training on data needs one each"
        )


def _prove_teacher(recipe: Recipe, field: Field, base: Product, data: Product, workspace: Path) -> dict:
    """Score base and teacher on the validation records of every task the teacher serves.

    Raises:
        UserError: with the figures, if the teacher is no better than the base on the first metric that can be
            measured here of a task with gates, or if none can.
    """
    from danceopd.evaluation.evaluate import score_records, skipped_metrics
    from danceopd.evaluation.metrics.tools import Tools
    from danceopd.fields import VelocityField

    backbone = field.backbone
    bare = VelocityField("base", backbone, backbone.transformer)
    tools = Tools(recipe.evaluate, cache=Path(workspace) / "cache" / "judge")
    scores: dict[str, dict] = {}
    for task in [t for t, s in recipe.tasks.items() if s.teacher == field.name]:
        records, encoded = _encode(recipe, backbone, base, data, workspace, "val", False, (task,))
        skipped = skipped_metrics(recipe.tasks[task].metrics, tools)
        metrics = tuple(name for name in recipe.tasks[task].metrics if name not in skipped)
        if not metrics:
            told = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            raise UserError(
                f"task {task!r}: none of its metrics can be measured here ({told}), so teacher "
                f"{field.name!r} cannot be held against the base"
            )
        means = {
            f.name: score_records(f, encoded, records, metrics, recipe.evaluate, tools).means for f in (bare, field)
        }
        scores[task] = {"base": means["base"], "teacher": means[field.name]}
        first = metrics[0]
        figures = f"{first} {means[field.name][first]:.4g}, the base {means['base'][first]:.4g}"
        log.info("teacher %s on %s: %s", field.name, task, figures)
        if means[field.name][first] > means["base"][first]:
            continue
        if not recipe.tasks[task].gates:  # then the metric is there to be looked at
            log.warning("teacher %s is no better than the base on %s, which has no gates", field.name, task)
        else:
            raise UserError(
                f"teacher {field.name!r} is no better than the base on its task {task!r} ({figures}); train it longer "
                f"(teachers.{field.name}.train.steps), or let the base teach this task"
            )
    return scores


# ------------------------------------------------------------------------------------------------------------- student


def distill_student(
    recipe: Recipe, base: Product, data: Product, teachers: dict[str, Product], workspace: Path
) -> Product:
    """Distill the recipe's teachers into one student, exported as a complete pipeline folder.

    Raises:
        UserError: if a teacher's product or a task's training records are missing.
    """
    used, inputs = _student_inputs(recipe, base, data, teachers)

    def build(scratch: Path, checkpoints: Path) -> dict:
        return _build_student(recipe, base, data, used, Path(workspace), scratch, checkpoints)

    return _make(workspace, STUDENTS, recipe.name, inputs, build, together=True)


def student_folder(recipe: Recipe, base: Product, data: Product, teachers: dict[str, Product], workspace: Path) -> Path:
    """Where `distill_student` writes, or wrote, the student: for who lets other processes or pods train it.

    Raises:
        UserError: if a teacher's product is missing.
    """
    _, inputs = _student_inputs(recipe, base, data, teachers)
    return Path(workspace) / STUDENTS / f"{recipe.name}-{_key(STUDENTS, recipe.name, inputs)}"


def _student_inputs(
    recipe: Recipe, base: Product, data: Product, teachers: dict[str, Product]
) -> tuple[dict[str, Product], list]:
    """The teachers a student needs, and all that decides what it becomes."""
    wanted = {task: spec.teacher for task, spec in recipe.tasks.items()}
    needed = set(wanted.values()) | ({recipe.distill.start} - {"base"})  # the start may teach no task
    missing = sorted(needed - set(teachers))
    if missing:
        raise UserError(f"distillation lacks the teacher(s) {', '.join(missing)}; finetune them first")
    used = {name: teachers[name] for name in sorted(needed)}
    tasks = {task: spec.model_dump(mode="json") for task, spec in recipe.tasks.items()}
    judged = {"tasks": tasks, "steps": recipe.evaluate.steps} if recipe.distill.select else {}
    inputs = [
        base.digest,
        data.facts["content"],
        {n: t.digest for n, t in used.items()},
        wanted,
        {task: spec["weight"] for task, spec in tasks.items()},
        judged,
        recipe.model.decisive(),
        recipe.distill.decisive(),
    ]
    return used, inputs


@dataclass(frozen=True)
class Training:
    """What a distillation needs, loaded.

    Attributes:
        backbone: the base.
        encoded: training records of every task.
        fields: the teachers by name.
        teacher_of: task -> teacher's name.
        weights: task -> weight in the loss.
    """

    backbone: Backbone
    encoded: EncodedRecords
    fields: dict[str, Field]
    teacher_of: dict[str, str]
    weights: dict[str, Any]


def open_training(
    recipe: Recipe, base: Product, data: Product, teachers: dict[str, Product], workspace: Path
) -> Training:
    """Load the base, the given teachers and the recipe's training records.

    Raises:
        UserError: if a task has no training records, or they lack the targets that the recipe's method trains on.
    """
    from danceopd.distill import method_of

    backbone = _open_backbone(recipe, base)
    tasks = tuple(recipe.tasks)
    targets = method_of(recipe.distill).needs_targets
    encoded = _encode_train(recipe, backbone, base, data, workspace, targets, tasks)
    if targets:
        for task in tasks:
            _require_targets(encoded, task)
    fields = _load_teachers(recipe, backbone, base, teachers, workspace)
    specs = recipe.tasks
    return Training(
        backbone, encoded, fields, {t: specs[t].teacher for t in tasks}, {t: specs[t].weight for t in tasks}
    )


def open_held_out(
    recipe: Recipe, backbone: Backbone, base: Product, data: Product, workspace: Path, split: str, limit: int
) -> dict[str, tuple[list, EncodedRecords]]:
    """At most `limit` held-out records of each of the recipe's tasks, plain and encoded."""
    return {t: _encode(recipe, backbone, base, data, workspace, split, False, (t,), limit) for t in recipe.tasks}


def _build_student(
    recipe: Recipe,
    base: Product,
    data: Product,
    teachers: dict[str, Product],
    workspace: Path,
    scratch: Path,
    checkpoints: Path,
) -> dict:
    from danceopd.devices import hardware
    from danceopd.distill import distill
    from danceopd.evaluation.validate import GateValidator
    from danceopd.model_card import write_card
    from danceopd.plots import plot_history
    from danceopd.preflight import preflight, settle
    from danceopd.previews import Previewer
    from danceopd.processes import this_process
    from danceopd.resume import Checkpoints

    title, settings = f"distill {recipe.name}", recipe.model_dump(mode="json")
    journal = recording.begin(recipe, workspace, checkpoints.name, title, settings, data.facts)
    for product in teachers.values():
        journal.uses(product.digest)
    ready = open_training(recipe, base, data, teachers, workspace)
    backbone, fields, tasks = ready.backbone, ready.fields, tuple(recipe.tasks)
    shown = _encode(recipe, backbone, base, data, workspace, "val", False, tasks, limit=3)
    # A resumed run does not draw the earlier ones again, so they lie beside the checkpoints until the end.
    previews = checkpoints / "previews" if this_process().main else scratch / "drawn"
    previewer = Previewer(*shown, fields, ready.teacher_of, recipe.evaluate, previews)

    def show(field: Field, step: int) -> None:
        previewer(field, step)
        journal.image("samples", step, previews / f"step-{step:06d}.png")

    saves = Checkpoints(checkpoints, recipe.distill.keep_checkpoints, checkpoints.name)
    validate = None
    if recipe.distill.select is not None:
        limit = recipe.distill.select.per_task
        sets = open_held_out(recipe, backbone, base, data, workspace, "val", limit)
        validate = GateValidator(recipe, fields, sets, Path(workspace) / "cache" / "judge")
    backbone.free_encoders()  # everything is encoded
    facts = {name: product.facts for name, product in teachers.items()}
    counts, processes = data.facts["counts"], this_process()
    settle(preflight(recipe, backbone, base.pipeline, fields, facts, ready.encoded, counts, processes.count))
    student, history = distill(
        backbone,
        ready.encoded,
        fields,
        ready.teacher_of,
        ready.weights,
        recipe.distill,
        show,
        saves,
        validate,
        _recorder(journal, "student"),
    )
    shutil.copytree(previews, scratch / "previews")
    write_json(scratch / "history.json", history)
    plot_history(history, scratch / "previews" / "training.png")
    journal.file(scratch / "previews" / "training.png")
    _export(student, recipe, base, scratch)
    origins = {"data": data.facts["content"], "dvc": data.facts["dvc"], "git": data.facts["git"], "base": base.digest}
    origins |= {f"teacher {name}": product.digest for name, product in teachers.items()}
    write_card(recipe, scratch / "pipeline", student.adapter is not None, origins)
    forwards = sum(entry["forwards_per_sample"] for entry in history) / len(history)
    return {
        "pipeline": "pipeline",
        "steps": history[-1]["step"],
        "loss": history[-1]["loss"],
        "forwards_per_sample": forwards,
        "forwards": round(forwards * recipe.distill.batch * history[-1]["step"]),
        "hardware": hardware(next(backbone.transformer.parameters()).device, processes.count),
        "made_of": {"base": base.digest, "teachers": {n: t.digest for n, t in teachers.items()}},
        "window": recipe.distill.model_dump(mode="json")["window"],
    }


def _export(student: VelocityField, recipe: Recipe, base: Product, scratch: Path) -> None:
    """Write the pipeline folder (a LoRA merged into it, and beside it as it is) and the probe to prove it by."""
    from safetensors.torch import save_file

    from danceopd.adapters import load_lora, plain_copy
    from danceopd.backbones import load_backbone
    from danceopd.backbones.base import Condition
    from danceopd.checkpoint import probe, save_field
    from danceopd.fields import VelocityField
    from danceopd.lora_files import export_lora

    backbone, model = student.backbone, recipe.model
    condition = Condition(backbone.encode_prompts(["", recipe.name]), None, model.height, model.width)
    save_field(student, scratch)
    if student.adapter is None:
        exported = student
        shutil.rmtree(scratch / "transformer")  # the pipeline folder holds it
    else:
        whole = student
        if model.quantize is not None:  # nothing can be merged into 8 bits: take the base as it was
            plain = model.model_copy(update={"quantize": None})
            network = load_backbone(base.pipeline, plain, condition.prompt.device).transformer
            load_lora(network, student.adapter, scratch / "lora")
            whole = VelocityField(student.name, backbone, network, student.adapter)
        export_lora(whole, scratch / "lora", condition)
        exported = VelocityField(student.name, backbone, plain_copy(whole.network, merge=student.adapter))
    backbone.save(scratch / "pipeline", exported.network)
    rounded = model.dtype != "float32" or model.quantize is not None  # the base is, and the export is not
    proved = exported if rounded else student
    save_file({"velocity": probe(proved, condition).contiguous()}, scratch / "probe.safetensors")


# -------------------------------------------------------------------------------------------- evaluation, registration


def evaluate_student(
    recipe: Recipe, base: Product, data: Product, teachers: dict[str, Product], student: Product, workspace: Path
) -> Product:
    """Score base, every teacher and the student on every task's held-out records; write figures and the report."""
    inputs = [
        base.digest,
        data.facts["content"],
        {n: t.digest for n, t in sorted(teachers.items())},
        student.digest,
        recipe.model.decisive(),
        recipe.evaluate.model_dump(mode="json"),
        {t: s.model_dump(mode="json") for t, s in recipe.tasks.items()},
        *_looks_with(recipe),
    ]

    def build(scratch: Path, checkpoints: Path) -> dict:
        sections = recipe.model_dump(mode="json")
        settings = {name: sections[name] for name in ("model", "tasks", "evaluate")}
        title, read = f"evaluate {recipe.name}", data.facts
        journal = recording.begin(recipe, workspace, checkpoints.name, title, settings, read, recording.EVALUATION)
        facts = _build_evaluation(recipe, base, data, teachers, student, Path(workspace), scratch)
        recording.evaluated(journal, read_json(scratch / "metrics.json"), scratch, student.digest)
        return facts

    return _make(workspace, "evaluations", recipe.name, inputs, build)


def _looks_with(recipe: Recipe) -> list:
    """What decides figures besides fields and records: benchmarks' records, and which networks are on this machine.

    An evaluation that skipped a metric is made anew once the metric can be measured.
    """
    from danceopd.data.assemble import open_dataset
    from danceopd.evaluation.metrics import metric
    from danceopd.evaluation.metrics.tools import lacks, weights_of

    names = {name for task in recipe.with_benchmarks().tasks.values() for name in task.metrics}
    states = {}
    for tool in sorted({tool for name in names for tool in metric(name).tools}):
        lacking = lacks(tool, recipe.evaluate)
        states[tool] = [lacking, None if lacking else weights_of(tool, recipe.evaluate)]
    benchmarks = {name: open_dataset(Path(b.input)).content for name, b in recipe.evaluate.benchmarks.items()}
    return [part for part in (states, benchmarks) if part]


def _build_evaluation(
    recipe: Recipe,
    base: Product,
    data: Product,
    teachers: dict[str, Product],
    student: Product,
    workspace: Path,
    scratch: Path,
) -> dict:
    import torch

    from danceopd.data.assemble import open_dataset
    from danceopd.devices import hardware
    from danceopd.evaluation.evaluate import evaluate
    from danceopd.evaluation.report import write_report
    from danceopd.fields import VelocityField

    backbone = _open_backbone(recipe, base)
    fields = {"base": VelocityField("base", backbone, backbone.transformer)}
    fields |= _load_teachers(recipe, backbone, base, teachers, workspace)
    trained = backbone.new_transformer(student.pipeline, torch.float32)
    fields["student"] = VelocityField("student", backbone, trained)
    dataset = open_dataset(Path(data.facts["dataset"]))
    started = time.monotonic()
    evaluation = evaluate(recipe, backbone, fields, dataset, workspace / "cache", _encoding_key(recipe, base))
    training = {name: fact for name, fact in student.facts.items() if name != "made_of"}  # the lineage says it
    spent = _spent(teachers, student)
    machine = hardware(next(backbone.transformer.parameters()).device)
    spent.append(Spent("evaluation", time.monotonic() - started, machine, evaluation.metrics["forwards"]))
    provenance = lineage(recipe, base, data, teachers, student) | {
        "cost": cost_table(spent),
        "software": _software(),
        "training": training,
        "the whole recipe": recipe.model_dump(mode="json"),
    }
    evaluation = replace(evaluation, metrics=evaluation.metrics | {"versions": _versions(teachers)})
    write_report(evaluation, scratch, provenance)
    metrics = read_json(scratch / "metrics.json")
    return {"passed": metrics["passed"], "scores": metrics["scores"]["student"], "report": "report.html"}


def _spent(teachers: dict[str, Product], student: Product) -> list[Spent]:
    """What the products that took time took, each on the machine it was made on."""
    made = {f"teacher {name}": product for name, product in sorted(teachers.items())} | {"distillation": student}
    rows = []
    for name, product in made.items():
        seconds = read_json(product.folder / STEP)["seconds"]
        if seconds > 0:
            rows.append(Spent(name, seconds, product.facts.get("hardware"), product.facts.get("forwards")))
    return rows


def _software() -> dict[str, str]:
    """The versions that figures depend on."""
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    return {"python": platform.python_version()} | packages


def _versions(teachers: dict[str, Product]) -> dict[str, dict]:
    """The teachers that are registered versions: {name: {"model", "version"}}."""
    return {name: product.facts["registered"] for name, product in teachers.items() if "registered" in product.facts}


def lineage(
    recipe: Recipe, base: Product, data: Product, teachers: dict[str, Product], student: Product
) -> dict[str, Any]:
    """Where a student comes from: revisions and digests of everything that made it; `added_to`, if to a champion."""
    champions = {f"{of['model']} version {of['version']}" for of in _versions(teachers).values()}
    added = {"added_to": ", ".join(sorted(champions))} if champions else {}
    return added | {
        "recipe": recipe.digest(),
        "code": code_revision(),
        "git": data.facts["git"],
        "dvc": data.facts["dvc"],
        "data": data.facts["content"],
        "base": base.digest,
        "teachers": {name: product.digest for name, product in sorted(teachers.items())},
        "student": student.digest,
    }


def register_student(
    recipe: Recipe, student: Product, evaluation: Product, lineage: dict, tracking_uri: str | None, workspace: Path
) -> Registration:
    """Register the student in MLflow if its gates hold; the default store lies in the workspace.

    Raises:
        UserError: as `registry.register_student` does.
    """
    from danceopd import delivery, registry

    uri = _store(tracking_uri, workspace)
    delivery.deliver(workspace, uri)  # so that the version can name what it comes from
    done = registry.register_student(recipe, student.folder, evaluation.folder, lineage, uri, Path(workspace))
    end_run(workspace, FINISHED, recording.by_task(evaluation.facts["scores"]))
    delivery.deliver(workspace, uri)
    return done


def move_champion(
    recipe: Recipe, action: str, version: str, force: bool, tracking_uri: str | None, workspace: Path
) -> dict:
    """Promote a version of the recipe's model, or roll back.

    Returns:
        The outcome in one line (`said`) and every version as Markdown (`versions`).

    Raises:
        UserError: as `registry.move_champion` does.
    """
    from danceopd import registry

    model = recipe.register_as.model
    client = registry.open_registry(_store(tracking_uri, workspace), model)
    said = registry.say_champion(model, *registry.move_champion(client, recipe, action, version, force))
    log.info(said)
    return {"said": said, "versions": registry.versions_markdown(client, model)}


def shortfalls(recipe: Recipe, evaluation: Product) -> list[str]:
    """In words: which gates the student fails by how much, and what to try; empty if it holds all."""
    from danceopd.evaluation.shortfalls import say_shortfalls

    return say_shortfalls(read_json(evaluation.folder / "metrics.json"), recipe)


def registration_facts(registration: Registration) -> dict:
    """A registration as plain data."""
    return asdict(registration)
