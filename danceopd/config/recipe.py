"""Every knob of a run, as one tree of pydantic models; recipes are YAML files of it (`danceopd/config/recipes/`).

A field that does not exist is an error that lists the right ones; a value out of range says its range.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, model_validator

from danceopd.config.parts import MODULE_WORDS, Name, Part, StoredName, TeacherName
from danceopd.config.sampling import Sampling
from danceopd.files import content_key

Fraction = Annotated[float, Field(ge=0, le=1)]


# How often training is saved and how much of that is kept.
KEEPING = {"checkpoint_every": True, "checkpoint_minutes": True, "keep_checkpoints": True}


# Where weights wait, and how much is processed at once.
PLACING = {"offload": True}


class _Part(Part):
    def decisive(self) -> dict[str, Any]:
        """The part as plain data, without the knobs that do not change the result: what a product is named by."""
        return self.model_dump(mode="json", exclude={"train": KEEPING, **KEEPING, **PLACING})


OUT_LAYERS = (9, 18, 27)


DRAW_ONLY = ("sd3",)  # families that cannot edit a source image


class ModelRecipe(_Part):
    """The base: where it lies and how its prompts are encoded."""

    base: str = Field(
        description="`world` or `world_open` (they ship with the package), a folder, a hub id, or an object-store URI"
    )
    revision: str | None = Field(None, description="hub revision")
    transformer: str | None = Field(
        None, description="weights in the place of the base's transformer: a folder, a safetensors file, or a URI"
    )
    backbone: Literal["flux2_klein", "z_image", "sd3", "qwen_image"] = "flux2_klein"
    height: int = Field(gt=0, description="of every picture that is drawn, in pixels")
    width: int = Field(gt=0)
    sizes: Literal["one", "own"] = Field(
        "one", description="training pictures: cropped to height and width, or each at its own size (buckets)"
    )
    max_sequence_length: int = Field(512, gt=0, description="prompt tokens, padding included")
    text_encoder_out_layers: tuple[int, ...] = Field(
        OUT_LAYERS, description="flux2_klein: hidden states that make the embedding"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the frozen base and full-checkpoint teachers; what trains is float32"
    )
    attention: str = Field("native", description="diffusers' attention backend: native (torch's SDPA), flash, ...")
    quantize: Literal["int8", "float8"] | None = Field(
        None, description="weights of the frozen base, by torchao; everything that trains is then a LoRA"
    )
    offload: bool = Field(
        False, description="full-checkpoint teachers wait in CPU memory and visit the accelerator for their queries"
    )

    @model_validator(mode="after")
    def _layers_fit_the_family(self) -> Self:
        if self.backbone != "flux2_klein" and self.text_encoder_out_layers != OUT_LAYERS:
            raise ValueError(f"text_encoder_out_layers is for flux2_klein, and backbone is {self.backbone}; remove it")
        return self


class DataRecipe(_Part):
    """The task-tagged dataset. Either inputs to assemble, or the sizes of the generated world."""

    inputs: tuple[str, ...] = Field((), description="Parquet files or folders in the schema, image folders")
    world: dict[Name, dict[Literal["train", "val", "test"], Annotated[int, Field(gt=0)]]] | None = None
    open_words: Fraction = Field(
        0.0, description="share of the generated drawings and edits whose words leave something open"
    )
    seed: int = 0

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if bool(self.inputs) == bool(self.world):
            raise ValueError("give either 'inputs' (your data) or 'world' (generated data)")
        if self.open_words and not self.world:
            raise ValueError("open_words is for 'world' (generated data); leave it out for your own")
        return self


class LoraRecipe(_Part):
    """Low-rank adapter on the transformer; `targets` defaults to the back end's own list."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(16, gt=0)
    targets: tuple[str, ...] | None = None


Compile = Literal["off", "default", "reduce-overhead", "max-autotune"]  # mode of torch.compile


class TrainRecipe(_Part):
    """What fine-tuning and distillation share."""

    trainable: Literal["full", "lora"] = "full"
    lora: LoraRecipe = LoraRecipe()
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: float = Field(gt=0, le=10)
    weight_decay: float = Field(0.0, ge=0)
    steps: int = Field(gt=0)
    batch: int = Field(gt=0, description="samples per optimizer step, over all processes")
    accumulate: int = Field(1, gt=0, description="parts a batch is processed in: less memory, the same update")
    warmup: int = Field(20, gt=0)
    max_grad_norm: float = Field(
        1.0,
        gt=0,
        description="longer gradients are scaled down to this norm; Muon uses a gradient's length only for its share "
        "of the momentum",
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights that are handed over")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of matrix products, by autocast")
    compile: Compile = Field(
        "off", description="torch.compile of the trained transformer's blocks; reduce-overhead uses CUDA graphs"
    )
    activation_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    parallel: Literal["replicate", "shard"] = Field(
        "replicate", description="many processes: whole weights in each, or each a part of base, teachers and student"
    )
    skip_bad_batches: int = Field(
        0, ge=0, description="batches whose loss or gradient is not a number that may be left out; one more ends it"
    )
    log_every: int = Field(50, gt=0)
    checkpoint_every: int = Field(200, ge=0, description="steps between saves to resume from; 0: none")
    checkpoint_minutes: float = Field(15, ge=0, description="a save is due after so long too; 0: by steps alone")
    keep_checkpoints: int = Field(2, gt=0, description="how many of the last saves to keep")
    seed: int = 0

    @model_validator(mode="after")
    def _sharding_fits(self) -> Self:
        if self.parallel == "shard" and self.optimizer == "adamw8bit":
            raise ValueError("parallel: shard cannot share out the state of optimizer adamw8bit; use adamw or muon")
        return self


class FinetuneRecipe(TrainRecipe):
    """Flow-matching fine-tuning of one teacher on one task's paired targets."""

    prompt_dropout: Fraction = Field(0.0, description="share of samples trained with the empty prompt")


def check_phases(what: str, ends: list[float]) -> None:
    """Raise ValueError unless a schedule's phases follow each other to the end of training."""
    if ends != sorted(set(ends)) or ends[-1] != 1:
        raise ValueError(f"{what}: the phases end at {ends}; 'until' must rise and the last be 1")


Window = (
    Literal["semantic", "mid", "low_noise", "uniform", "early_steps", "late_steps", "every_step"]
    | tuple[Fraction, Fraction]
)


class WindowPhase(_Part):
    """One stretch of a schedule of query windows: `window` holds until this share of the steps is done."""

    until: Fraction
    window: Window


class SelectRecipe(_Part):
    """Which of the student's states on the way is handed over: the one that holds its gates best on `val`.

    A state's score is the smallest margin over all gates, as a share of what the gate allows; it holds them at >= 0.
    """

    every: int = Field(gt=0, description="steps between validations")
    per_task: int = Field(48, gt=0, description="validation records per task")
    patience: int | None = Field(None, gt=0, description="end after this many validations without a better one")
    stop_when_held: bool = Field(False, description="end at the first validation that holds every gate")


MERGES = ("merge_average", "merge_task_arithmetic", "merge_ties")  # methods that train nothing


Method = Literal[
    "danceopd",
    "off_policy",
    "soft",
    "dense",
    "diffusion_opd",
    "flow_opd",
    "joint",
    "merge_average",
    "merge_task_arithmetic",
    "merge_ties",
]
METHODS: tuple[str, ...] = get_args(Method)


ROLL_OUT = ("danceopd", "soft", "dense")  # of these, those that ask on the student's own path
# Which methods read a knob that the others have no use for.
ASKS = ("danceopd", "off_policy", "soft", "dense")  # methods that ask the routed teachers at one state or several
READ_BY = {
    "queries": ("dense",),
    "target_steps": ("danceopd", "dense", "off_policy"),
    "target_solver": ("danceopd", "dense", "off_policy"),
    "rollout_drift": ROLL_OUT,
    "merge_scale": ("merge_task_arithmetic", "merge_ties"),
    "merge_density": ("merge_ties",),
}


class GuidanceRecipe(_Part):
    """Classifier-free guidance in the student, in one of two ways; the number is its scale, as teachers' `guidance`.

    `keep`: both sides are distilled, each from plain teachers, on the student's own guided paths; guidance stays a knob
    when the student draws, at two forwards per step. `absorb`: every teacher that names no guidance of its own is asked
    at this scale, and the student's plain field becomes the guided one, at one forward per step.
    """

    keep: float | None = Field(None, gt=1)
    absorb: float | None = Field(None, gt=1)
    batched: bool = Field(True, description="both sides in one forward pass; false: two, in less memory")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.absorb is None):
            raise ValueError("give exactly one of 'keep' and 'absorb', with the scale")
        return self


class DistillRecipe(TrainRecipe):
    """On-policy distillation: one query (K = 1) per sample, from `window`, on a grid of `rollout_steps`.

    `window` is a name, a range `[sigma_lo, sigma_hi]`, or a schedule: a list of phases, the last until 1.
    `method` is `danceopd`, or one that it is compared with (`danceopd.methods.table`).
    """

    method: Method = "danceopd"
    queries: int | None = Field(None, gt=0, description="dense: query states per sample (K); default 8")
    merge_scale: float | None = Field(
        None, gt=0, description="of the merged task vectors; default 0.4 for merge_task_arithmetic, 1 for merge_ties"
    )
    merge_density: float | None = Field(
        None, gt=0, le=1, description="merge_ties: share of each task vector's entries kept; default 0.2"
    )
    start: str = Field("base", description="`base`, or a teacher whose weights the student starts from (full only)")
    rollout_steps: int = Field(16, gt=0, description="of the student's own sampling grid")
    rollout_stride: int = Field(
        1,
        gt=0,
        description="grid steps in one step of the rollout: a coarser way to query states that stay on the grid, for "
        "fewer forwards; from rollout_steps on, one step to every query",
    )
    rollout_weights: Literal["own", "merged"] = Field(
        "own",
        description="what the rollout follows: the student itself, or a copy with its LoRA merged, in model.dtype: "
        "faster, for one more copy of the weights that the LoRA changes",
    )
    rollout_compile: Compile = Field(
        "off", description="merged: torch.compile of the copy's blocks alone; no gradient, so one variant of each"
    )
    rollout_drift: float | None = Field(
        None,
        gt=0,
        description="merged: how far its query states may be from the student's own, as a share of the way from the "
        "noise; beyond, the rollout follows the student itself; default 0.05",
    )
    target: Literal["velocity", "displacement"] = Field(
        "velocity",
        description="what the student matches at its query state: the teacher's velocity there, or its mean velocity "
        "over the student's next grid interval, for a student that draws in rollout_steps",
    )
    target_steps: int | None = Field(
        None, gt=0, description="displacement: the teacher's small steps per interval; default 4"
    )
    target_solver: Literal["euler", "heun"] | None = Field(
        None, description="displacement: of the small steps; heun asks twice a step; default euler"
    )
    window: Window | Annotated[tuple[WindowPhase, ...], Field(min_length=1)] = "uniform"
    guidance: GuidanceRecipe | None = Field(None, description="classifier-free guidance: kept, or absorbed")
    prompt_dropout: Fraction | None = Field(
        None,
        description="share of samples trained with the empty prompt, on the routed teacher's side of it; default 0.1 "
        "where guidance is kept, else 0",
    )
    preview_every: int = Field(0, ge=0, description="steps between sample grids; 0: at the end only")
    select: SelectRecipe | None = Field(None, description="keep the best state rather than the last")

    @property
    def phases(self) -> tuple[WindowPhase, ...]:
        """The schedule of query windows; a single window is one phase."""
        if isinstance(self.window, tuple) and isinstance(self.window[0], WindowPhase):
            return self.window
        return (WindowPhase(until=1.0, window=self.window),)

    @model_validator(mode="after")
    def _knobs_fit_the_method(self) -> Self:
        for knob, methods in READ_BY.items():
            if getattr(self, knob) is not None and self.method not in methods:
                raise ValueError(f"{knob} is for method {' or '.join(methods)}, and method is {self.method}; remove it")
        return self

    @property
    def dropout(self) -> float:
        """The share of samples trained with the empty prompt."""
        kept = self.guidance is not None and self.guidance.keep is not None
        return (0.1 if kept else 0.0) if self.prompt_dropout is None else self.prompt_dropout

    @model_validator(mode="after")
    def _guidance_fits(self) -> Self:
        if self.guidance is not None and self.guidance.keep is not None and self.method not in ASKS:
            raise ValueError(f"guidance.keep is for method {' or '.join(ASKS)}, and method is {self.method}; remove it")
        if self.guidance is not None and self.guidance.absorb is not None and self.method in ("joint", *MERGES):
            raise ValueError(f"guidance.absorb: method {self.method} asks no teacher's field; remove it")
        if self.dropout and self.method not in (*ASKS, "joint"):
            takes = " or ".join((*ASKS, "joint"))
            raise ValueError(f"prompt_dropout is for method {takes}, and method is {self.method}; remove it")
        return self

    @property
    def drift_limit(self) -> float:
        """How far a merged student's query states may be from its own."""
        return 0.05 if self.rollout_drift is None else self.rollout_drift

    @model_validator(mode="after")
    def _rollout_fits(self) -> Self:
        if self.rollout_weights == "own":
            if self.rollout_drift is not None:
                raise ValueError("rollout_drift is for rollout_weights: merged; remove it")
            if self.rollout_compile != "off":
                raise ValueError("rollout_compile is for rollout_weights: merged; remove it, or set compile")
            return self
        if self.method not in ROLL_OUT:
            raise ValueError(f"rollout_weights: merged is for method {' or '.join(ROLL_OUT)}, not {self.method}")
        if self.trainable != "lora":
            raise ValueError("rollout_weights: merged is for trainable: lora; full weights have nothing to merge")
        if self.parallel == "shard":
            raise ValueError("rollout_weights: merged holds whole weights, and parallel: shard does not; choose one")
        return self

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if self.target == "displacement" and self.method not in READ_BY["target_steps"]:
            raise ValueError(
                f"target: displacement is for method {' or '.join(READ_BY['target_steps'])}, and method is "
                f"{self.method}; take one of them, or target: velocity"
            )
        for knob in ("target_steps", "target_solver"):
            if getattr(self, knob) is not None and self.target != "displacement":
                raise ValueError(f"{knob} is for target: displacement, and target is {self.target}; remove it")
        return self

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        for window in (phase.window for phase in self.phases):
            if isinstance(window, tuple) and window[0] >= window[1]:
                raise ValueError(f"window {list(window)}: write [sigma_lo, sigma_hi] with sigma_lo < sigma_hi")
        check_phases("window", [phase.until for phase in self.phases])
        return self


class _Guided(_Part):
    """A teacher whose field may be the guided one, v_empty + guidance (v_cond - v_empty), for the student to absorb."""

    guidance: float | None = Field(None, gt=1, description="scale of classifier-free guidance; none: the plain field")
    guidance_batched: bool = Field(True, description="both sides in one forward pass; false: two, in less memory")


class BaseTeacher(_Guided):
    """The base itself serves as teacher."""

    kind: Literal["base"]


class FinetunedTeacher(_Guided):
    """A teacher fine-tuned in the run, on one task."""

    kind: Literal["finetune"]
    task: str
    train: FinetuneRecipe


class CheckpointTeacher(_Guided):
    """A teacher that exists already: whole weights, or a LoRA on the base."""

    kind: Literal["checkpoint", "lora"]
    path: str = Field(
        description="checkpoint: a pipeline or transformer folder, or a safetensors file. lora: a PEFT folder, or a "
        "file of diffusers, ComfyUI, kohya or OneTrainer. Or a URI of one (hf://owner/name, s3://, gs://)"
    )


class ChampionTeacher(_Guided):
    """The registered model's champion, as it stands when the run begins: it holds the tasks it was trained for."""

    kind: Literal["champion"]


Teacher = Annotated[BaseTeacher | FinetunedTeacher | CheckpointTeacher | ChampionTeacher, Field(discriminator="kind")]


class Gate(_Part):
    """What the student must hold on one metric to be registered.

    `retain`: at least this share of its teacher's value; `max_drop`: at most this much below it, in the metric's
    unit. `champion_margin`: at most this much below the current champion, in the metric's unit.
    """

    metric: str
    retain: Fraction | None = None
    max_drop: float | None = Field(None, ge=0)
    champion_margin: float = Field(ge=0)

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.retain is None) == (self.max_drop is None):
            raise ValueError("give exactly one of 'retain' and 'max_drop'")
        return self


class WeightPhase(_Part):
    """One stretch of a task's curriculum: `weight` holds until this share of the steps is done."""

    until: Fraction
    weight: float = Field(gt=0)


Weight = Annotated[float, Field(gt=0)] | Annotated[tuple[WeightPhase, ...], Field(min_length=1)]


# Metrics that are minus a distance: of these no share can be kept.
DISTANCES = ("lpips", "fid", "kid", "fd_dino", "kd_dino")


def check_gates(metrics: tuple[str, ...], gates: tuple[Gate, ...]) -> None:
    """Raise ValueError unless every gate is on one of the metrics, and by a rule that suits it."""
    for gate in gates:
        if gate.metric not in metrics:
            raise ValueError(f"gate on {gate.metric!r}, which is not among the task's metrics {metrics}")
        if gate.metric in DISTANCES and gate.retain is not None:
            raise ValueError(
                f"gate on {gate.metric!r}: it is minus a distance, of which no share is kept; "
                "give 'max_drop' instead of 'retain'"
            )


class TaskRecipe(_Part):
    """One capability: its teacher, its weight in the loss, how it is measured, what it must hold.

    `weight` decides the task's share of a batch and of the loss; a list of phases makes it a curriculum.
    """

    teacher: str
    needs_source: bool = Field(description="whether every sample edits a source image")
    weight: Weight = 1.0
    metrics: tuple[str, ...] = Field(min_length=1)
    gates: tuple[Gate, ...] = ()

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Self:
        if isinstance(self.weight, tuple):
            check_phases("weight", [phase.until for phase in self.weight])
        check_gates(self.metrics, self.gates)
        return self


class DriftRecipe(_Part):
    """How far the student's path leaves its teacher's, and what fewer sampling steps cost."""

    records: int = Field(24, gt=0, description="held-out records per task, spread over them")
    steps: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (1, 2, 4, 8), min_length=1, description="numbers of sampling steps whose pictures are compared"
    )


class NetworksRecipe(_Part):
    """Where the networks lie that metrics look with; nothing is downloaded. A metric without its network is skipped."""

    clip: str | None = Field(None, description="folder of a CLIP model with its processor, weights as safetensors")
    dino: str | None = Field(None, description="folder of a DINOv2 (or v3) model with its processor, as safetensors")
    inception: str | None = Field(None, description="file of torch-fidelity's Inception weights, for fid and kid")


class JudgeRecipe(_Part):
    """A vision-language model that judges pictures, behind an OpenAI-compatible endpoint. Pictures are sent there."""

    url: str = Field(description="up to what `/chat/completions` follows, for example http://localhost:8000/v1")
    model: str = Field(min_length=1, description="as the endpoint calls it")
    key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable with the API key; none: no key"
    )
    parameters: dict[str, JsonValue] = Field(
        {"temperature": 0, "max_tokens": 600}, description="sent along with every request"
    )
    requests_per_minute: float | None = Field(None, gt=0, description="at most; none: as fast as it answers")
    parallel: int = Field(4, gt=0, description="requests at once")
    attempts: int = Field(5, gt=0, description="a question, before it is given up")
    timeout: float = Field(120, gt=0, description="seconds an answer may take")
    price_prompt: float | None = Field(None, ge=0, description="of a million prompt tokens")
    price_completion: float | None = Field(None, ge=0, description="of a million completion tokens")
    currency: str = "USD"
    canary_tolerance: float = Field(
        0.1, ge=0, le=10, description="how far its canaries may move, in points of 10, before old figures count no more"
    )

    @model_validator(mode="after")
    def _plain(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url: write it as http://host/v1 or https://host/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "url: holds a user, a password or a query; put the API key into an environment variable "
                "and its name into key_env"
            )
        if (self.price_prompt is None) != (self.price_completion is None):
            raise ValueError("give both 'price_prompt' and 'price_completion', or neither")
        if taken := sorted({"model", "messages", "stream", "n"} & set(self.parameters)):
            raise ValueError(
                f"parameters: {', '.join(taken)} cannot be given; the judge sets what it asks and reads "
                "one whole answer"
            )
        return self


class BenchmarkRecipe(_Part):
    """An evaluation set beside the tasks' own held-out records, with a row of its own in every table."""

    input: str = Field(description="dataset folder, as `danceopd data import-benchmark` writes")
    task: str = Field(description="whose teacher the student is held against")
    metrics: tuple[str, ...] = Field(min_length=1)
    gates: tuple[Gate, ...] = ()
    limit: int | None = Field(None, gt=0, description="records at most, spread evenly over all; none: all")

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Self:
        check_gates(self.metrics, self.gates)
        return self


class FieldSampling(_Part):
    """How one field is drawn, where that is not what follows from the recipe."""

    steps: int | None = Field(None, gt=0)
    guidance: float | None = Field(None, ge=1, description="1: none")


class EvaluateRecipe(_Part):
    """Which held-out records are drawn, and how."""

    split: Literal["val", "test"] = "test"
    per_task: int = Field(128, gt=0)
    steps: int = Field(8, gt=0, description="of every field; a student of displacements takes its rollout_steps")
    guidance: float | None = Field(
        None,
        gt=1,
        description="of the base, and of teachers and a student that have none of their own; default: distill.guidance",
    )
    fields: dict[str, FieldSampling] = Field({}, description="`base`, `student` or a teacher, drawn in another way")
    batch: int = Field(64, gt=0)
    seed: int = 0
    pictures: int = Field(8, gt=0, description="rows of the report's picture grid, a task")
    worst: int = Field(4, ge=0, description="records shown a task that fall furthest below the teacher's")
    drift: DriftRecipe | None = DriftRecipe()
    confidence: float = Field(0.95, gt=0, lt=1, description="of the bootstrap intervals over records")
    resamples: int = Field(2000, ge=100, description="times the records are drawn anew for an interval")
    networks: NetworksRecipe = NetworksRecipe()
    judge: JudgeRecipe | None = None
    benchmarks: dict[Name, BenchmarkRecipe] = Field({})


class RegisterRecipe(_Part):
    """Where a student that holds its gates goes."""

    model: StoredName = Field(description="name in the MLflow model registry")
    experiment: StoredName = "danceopd"
    license: str = Field("other", description="of the student, for its model card; it follows base and teachers")

    @model_validator(mode="after")
    def _names_are_mlflows(self) -> Self:
        for what, name in (("model", self.model), ("experiment", self.experiment)):
            if not name.strip():
                raise ValueError(f"{what}: blank; give it a name")
        # MLflow takes it for a path or a URI, and says so only when the student is registered.
        if set(self.model) & set("/:\\%?#") or self.model in (".", ".."):
            raise ValueError(f"model: {self.model!r} is no name in MLflow's registry; leave out / : \\ % ? #")
        return self


class Recipe(_Part):
    """One run, from data to a registered student."""

    name: Name
    seed: int = Field(0, ge=0, description="of what trains and names no own one: data order, teachers, student")
    model: ModelRecipe
    data: DataRecipe
    tasks: dict[Name, TaskRecipe] = Field(min_length=1)
    teachers: dict[TeacherName, Teacher] = Field(min_length=1)
    distill: DistillRecipe
    evaluate: EvaluateRecipe = EvaluateRecipe()
    register_as: RegisterRecipe
    cache: str | None = Field(
        None,
        description="folder or object-store URI of a cache of encodings (`danceopd data cache`); none: the workspace",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_seed_for_all(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "seed" not in data:
            return data

        def seeded(section: Any) -> Any:
            return {"seed": data["seed"]} | section if isinstance(section, dict) else section

        def taught(teacher: Any) -> Any:
            known = isinstance(teacher, dict) and "train" in teacher
            return teacher | {"train": seeded(teacher["train"])} if known else teacher

        teachers = data.get("teachers")
        if isinstance(teachers, dict):
            data = data | {"teachers": {name: taught(teacher) for name, teacher in teachers.items()}}
        return data | {"distill": seeded(data.get("distill"))}

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        sections = {"distill": self.distill} | {
            f"teachers.{n}.train": t.train for n, t in self.teachers.items() if isinstance(t, FinetunedTeacher)
        }
        for where, spec in sections.items():
            if spec.parallel == "shard" and self.model.quantize is not None:
                raise ValueError(f"{where}.parallel: shard cannot share out a base in 8 bits; remove model.quantize")
        if self.distill.parallel == "shard" and self.model.offload:
            raise ValueError("distill.parallel: shard shares the teachers out as well; remove model.offload")
        if self.distill.rollout_weights == "merged" and self.model.quantize is not None:
            raise ValueError(
                "distill.rollout_weights: merged cannot merge into a base in 8 bits; remove model.quantize"
            )
        return self

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        if self.distill.method not in MERGES and self.distill.batch < len(self.tasks):
            raise ValueError(
                f"distill.batch is {self.distill.batch}, and each of the {len(self.tasks)} tasks takes a sample of "
                "every batch; give at least as many"
            )
        if taken := sorted(set(MODULE_WORDS.split()) & set(self.teachers)):
            raise ValueError(
                f"teachers.{taken[0]}: torch's modules have a part of that name; call the teacher otherwise"
            )
        for task, spec in self.tasks.items():
            if spec.teacher not in self.teachers:
                raise ValueError(f"tasks.{task}.teacher is {spec.teacher!r}; teachers are: {', '.join(self.teachers)}")
            if spec.needs_source and self.model.backbone in DRAW_ONLY:
                raise ValueError(
                    f"tasks.{task}.needs_source: backbone {self.model.backbone} cannot edit a source image; take "
                    "another base, or remove the task"
                )
        if (
            not isinstance(self.teachers.get("base", BaseTeacher(kind="base")), BaseTeacher)
            or "student" in self.teachers
        ):
            raise ValueError("teachers: 'student' is the student's name, and 'base' the base's (kind: base); rename it")
        if "base" in self.teachers and self.teachers["base"].guidance is not None:
            raise ValueError("teachers.base.guidance: 'base' is the plain base; give the guided one another name")
        guided = [name for name, teacher in self.teachers.items() if teacher.guidance is not None]
        if guided and self.distill.guidance is not None and self.distill.guidance.keep is not None:
            raise ValueError(
                f"teachers.{guided[0]}.guidance: distill.guidance.keep distils plain teachers, and guides the student; "
                "remove one of the two"
            )
        starts = dict.fromkeys(("base", *self.teachers))
        if self.distill.start not in starts:
            raise ValueError(f"distill.start is {self.distill.start!r}; choose one of: {', '.join(starts)}")
        if self.distill.start != "base" and self.distill.trainable != "full":
            raise ValueError(
                "distill.start: a LoRA student starts from the base; set trainable: full to start elsewhere"
            )
        if self.model.quantize is not None:
            trained = {"distill": self.distill} | {
                f"teachers.{n}.train": t.train for n, t in self.teachers.items() if isinstance(t, FinetunedTeacher)
            }
            whole = [where for where, spec in trained.items() if spec.trainable != "lora"]
            if whole or self.distill.method in MERGES:
                raise ValueError(
                    f"model.quantize: only a LoRA trains on a quantized base; set trainable: lora in "
                    f"{', '.join(whole) or 'distill, and another method than a merge'}"
                )
        for name, benchmark in self.evaluate.benchmarks.items():
            if name in self.tasks:
                raise ValueError(f"evaluate.benchmarks.{name}: a task has that name already; choose another")
            if benchmark.task not in self.tasks:
                raise ValueError(
                    f"evaluate.benchmarks.{name}.task is {benchmark.task!r}; tasks are: {', '.join(self.tasks)}"
                )
        drawn = ("base", "student", *self.teachers)
        if unknown := sorted(set(self.evaluate.fields) - set(drawn)):
            known = ", ".join(dict.fromkeys(drawn))
            raise ValueError(f"evaluate.fields.{unknown[0]}: no such field; there are: {known}")
        if self.distill.select is not None and not any(spec.gates for spec in self.tasks.values()):
            raise ValueError("distill.select: no task has a gate to select by; add gates, or remove select")
        for name, teacher in self.teachers.items():
            if isinstance(teacher, FinetunedTeacher) and teacher.task not in self.tasks:
                raise ValueError(f"teachers.{name}.task is {teacher.task!r}; tasks are: {', '.join(self.tasks)}")
        return self

    def sampling(self, name: str, stated: Sampling | None = None) -> Sampling:
        """How a field is drawn when it is measured or shown, and a student unless someone says otherwise.

        Args:
            name: `student`, `base`, or a teacher's.
            stated: what the field states of itself: the champion's, which was a student once.
        """
        spec, way = self.evaluate, self.distill.guidance
        kept, absorbed = (None, None) if way is None else (way.keep, way.absorb)
        own = spec.fields.get(name, FieldSampling())
        if name == "student":
            few = self.distill.target == "displacement"
            absorbs = any(self.teachers[task.teacher].guidance is not None for task in self.tasks.values())
            scale = 1.0 if absorbed is not None or absorbs else kept or spec.guidance or 1.0
            steps = self.distill.rollout_steps if few else spec.steps
        else:
            few = stated is not None and stated.fixed
            teacher = self.teachers.get(name)
            theirs = None if teacher is None else teacher.guidance or absorbed
            told = None if stated is None else stated.guidance
            scale = theirs or told or spec.guidance or kept or absorbed or 1.0
            steps = spec.steps if stated is None else stated.steps
        return Sampling(steps=own.steps or steps, guidance=own.guidance or scale, fixed=few)

    def with_benchmarks(self) -> Recipe:
        """The recipe with every benchmark as a further task, to be evaluated and not to be trained."""
        rows = {
            name: TaskRecipe(
                teacher=self.tasks[b.task].teacher,
                needs_source=self.tasks[b.task].needs_source,
                metrics=b.metrics,
                gates=b.gates,
            )
            for name, b in self.evaluate.benchmarks.items()
        }
        return self.model_copy(update={"tasks": self.tasks | rows})

    def digest(self) -> str:
        """A 16-digit name of the whole recipe."""
        return content_key(self.model_dump(mode="json"))
