"""Where a cluster runs the steps, and what they get there: a readable YAML file, or one that ships (`placements/`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from danceopd.config.load import say_invalid
from danceopd.config.parts import Part
from danceopd.config.shipped import read_settings

PLACEMENTS = "pipelines.placements"  # the package of those that ship
Range = tuple[PositiveInt, PositiveInt]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$", description="of a Kubernetes object")]
Label = Annotated[str, Field(min_length=1)]


class Toleration(Part):
    """Of a taint; as Kubernetes has it.

    Attributes:
        key: of the taint.
        operator: Exists (whatever its value) or Equal.
        value: of the taint, for Equal.
        effect: of the taint.
    """

    key: Label
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str = ""
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"] = "NoSchedule"


class Needs(Part):
    """What one step takes.

    Attributes:
        cpu: cores requested and at most.
        memory: GiB requested and at most.
        hours: it is ended after this long.
        gpu: whether it uses an accelerator where there is one.
        cached: whether an unchanged step's outputs are reused.
        retries: how often it is tried again if it fails; None: as the placement says.
        accelerator: resource name; empty: CPU only.
        node_selector: labels of the nodes it may run on.
        tolerations: of the taints of these nodes.
        shared_memory: GiB at /dev/shm; 0: the container runtime's 64 MiB.
    """

    cpu: Range
    memory: Range
    hours: PositiveInt
    gpu: bool = False
    cached: bool = True
    retries: int | None = None
    accelerator: str = ""
    node_selector: dict[Label, str] = Field({})
    tolerations: tuple[Toleration, ...] = ()
    shared_memory: int = 0


class StepPlacement(Part):
    """What a placement says of a step, or of all that use an accelerator; what is left out stays as it is (`Needs`)."""

    cpu: Range | None = None
    memory: Range | None = None
    hours: PositiveInt | None = None
    retries: int | None = Field(None, ge=0)
    accelerator: Label | None = None
    node_selector: dict[Label, str] | None = None
    tolerations: tuple[Toleration, ...] | None = None
    shared_memory: int | None = Field(None, ge=0)

    @field_validator("cpu", "memory")
    @classmethod
    def _request_first(cls, value: Range | None) -> Range | None:
        if value and value[0] > value[1]:
            raise ValueError(f"{list(value)}: [requested, at most], the first not more than the second")
        return value

    def given(self) -> dict[str, Any]:
        """The fields that were set."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class SecretVariables(Part):
    """Environment variables from a Secret of the run's namespace.

    Attributes:
        name: of the Secret.
        env: variable -> key in the Secret.
        steps: that get them; none named: all.
        optional: whether a step also starts without the Secret.
    """

    name: Name
    env: dict[Label, Label] = Field(min_length=1)
    steps: tuple[str, ...] = ()
    optional: bool = True


# Kubeflow knows no retry by exit code: a recipe that does not fit and a student that fails a gate would do so again.
NEEDS = {
    "check_recipe": Needs(cpu=(1, 1), memory=(1, 2), hours=1, cached=False, retries=0),
    "resolve_base": Needs(cpu=(1, 2), memory=(1, 8), hours=6),
    "build_data": Needs(cpu=(1, 4), memory=(2, 16), hours=12),
    "finetune": Needs(cpu=(2, 8), memory=(4, 64), hours=48, gpu=True),
    "distill": Needs(cpu=(2, 8), memory=(4, 64), hours=96, gpu=True),
    "evaluate": Needs(cpu=(2, 8), memory=(4, 64), hours=24, gpu=True),
    "register": Needs(cpu=(1, 2), memory=(2, 16), hours=2, cached=False, retries=0),
    "summarize": Needs(cpu=(1, 1), memory=(1, 2), hours=1, cached=False),
}
# The step of the pipeline that moves the registry's aliases (`champion.py`). A rollback done twice undoes itself.
CHAMPION_NEEDS = {"move_champion": Needs(cpu=(1, 1), memory=(1, 4), hours=1, cached=False, retries=0)}


class Placement(Part):
    """How a cluster runs the pipeline.

    Attributes:
        claim: persistent volume claim with the workspace, mounted in every step; None: no volume.
        image_pull_policy: Always, IfNotPresent or Never.
        image_pull_secrets: names of Secrets with the registry's credentials.
        secrets: environment variables from Secrets.
        retries: how often a failed step is tried again, with growing pauses.
        gpus: of each node that trains the student, unless a run says otherwise (its parameter `gpus`).
        queue: Kueue's LocalQueue that admits the jobs a run submits and, where Kueue manages plain pods, the steps that
            use an accelerator; empty: none.
        run_as_user: user id of every step; None: the image's own, or what the platform chooses (OpenShift).
        run_as_group: group id of every step: the one that jobs give the volume to (fsGroup); None: as for the user.
        tracking: ConfigMap whose key `uri` names the MLflow server of a run that is not told one; empty: none.
        gpu: of the steps that use an accelerator: finetune, distill, evaluate.
        steps: of single steps, by name; goes before `gpu`.
    """

    claim: Name | None = "danceopd-workspace"
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[Name, ...] = ()
    secrets: tuple[SecretVariables, ...] = ()
    retries: int = Field(2, ge=0)
    gpus: PositiveInt = 1
    queue: str = ""
    run_as_user: PositiveInt | None = 1000
    run_as_group: int | None = Field(1000, ge=0)
    tracking: str = "danceopd-tracking"
    gpu: StepPlacement = StepPlacement()
    steps: dict[str, StepPlacement] = Field({})

    @model_validator(mode="after")
    def _steps_are_known(self) -> Self:
        named = [("steps", step) for step in self.steps]
        named += [(f"secrets.{secret.name}.steps", step) for secret in self.secrets for step in secret.steps]
        for where, step in named:
            if step not in NEEDS:
                raise ValueError(f"{where}: no step is called {step!r}; steps are: {', '.join(NEEDS)}")
        idle = [step for step, given in self.steps.items() if given.accelerator and not NEEDS[step].gpu]
        if idle:
            users = ", ".join(step for step, needs in NEEDS.items() if needs.gpu)
            raise ValueError(f"steps.{idle[0]}.accelerator: it uses none; steps that do: {users}")
        return self

    def needs(self, step: str) -> Needs:
        """What a step takes here."""
        needs, given = (NEEDS | CHAMPION_NEEDS)[step], self.steps.get(step, StepPlacement()).given()
        return needs.model_copy(update=(self.gpu.given() if needs.gpu else {}) | given)

    def retries_of(self, step: str) -> int:
        """How often a step is tried again."""
        own = self.needs(step).retries
        return self.retries if own is None else own


def load_placement(name_or_path: str | None) -> Placement:
    """Load a placement by the name of a shipped one or from a YAML file; none named: CPUs and the workspace's claim.

    Raises:
        UserError: if it cannot be found or read, or does not fit the model.
    """
    if not name_or_path:
        return Placement()
    data = read_settings("placement", PLACEMENTS, name_or_path)
    try:
        return Placement.model_validate(data)
    except ValidationError as error:
        raise say_invalid(error, Placement, f"placement {name_or_path}") from error
