"""The chain as one pipeline: recipe, base and data, teachers in parallel, student, evaluation, registration, summary.

The same function compiles to YAML for a cluster (`compile.py`) and runs on one machine (`local.py`). No postponed
annotations here: kfp reads the pipeline function's annotations themselves.

Where the student is trained is chosen by a run, not by two branches: the check on a CPU sizes the distillation step's
own pod, which holds GPUs only if it trains. (`dsl.OneOf` of artifacts fails in KFP's backend up to 2.16, and in its
local runner.)
"""

from collections.abc import Callable

from kfp import dsl, kubernetes

from components.build_data import build_data
from components.check_recipe import check_recipe
from components.distill import distill
from components.evaluate import evaluate
from components.finetune import finetune
from components.register import register
from components.resolve_base import resolve_base
from components.running import RUN_ID
from components.summarize import summarize
from danceopd.tracking.mlflow_store import ENVIRONMENT
from pipelines.cluster.cli import WORKFLOW
from pipelines.cluster.queues import QUEUE
from pipelines.options import MOUNT, PipelineOptions
from pipelines.placement import Needs

PAUSE = 30  # seconds before the first retry, doubled each time
WAIT_HOURS = 24  # an attempt may wait so long for a node


def build_pipeline(options: PipelineOptions) -> Callable:
    """Compose the pipeline function; see `PipelineOptions` for what is fixed here and not at run time."""
    own = options.placement.needs("distill")

    def place(task: dsl.PipelineTask) -> dsl.PipelineTask:
        return place_task(task, options)

    @dsl.pipeline(name="danceopd", display_name="DanceOPD: many teachers, one student")
    def danceopd_pipeline(
        recipe: str = "world",
        overrides: list = [],  # noqa: B006 (kfp's way)
        data_revision: str = "",
        distill_on: str = "step",
        gpus: int = options.placement.gpus if own.accelerator else 0,
        nodes: int = 1,
        code_revision: str = options.image,
        workspace: str = MOUNT,
        tracking_uri: str = "",
    ) -> None:
        """Fine-tune teachers, distill them into one student, evaluate it, and register it if its gates hold.

        Args:
            recipe: What to run: a shipped recipe's name (world), a YAML file on the volume, or a recipe's text.
            overrides: Settings of the recipe to change, for example ["distill.steps=200", "seed=1"].
            data_revision: Identity of the data and of weights behind a path; empty: found by looking. Steps are
                reused only for the same one.
            distill_on: Where the student is trained: step (the step's own pod), Job or TrainJob (on several nodes).
            gpus: GPUs of each node that trains the student; 0 for CPU.
            nodes: Nodes that train the student together; more than 1 for Job and TrainJob only.
            code_revision: Identity of the code or image; steps are reused only for the same one.
            workspace: Folder on the shared volume for datasets, weights and reports.
            tracking_uri: MLflow tracking server; empty for a store in the workspace.
        """
        way = {"distill_on": distill_on, "nodes": nodes, "gpus": gpus}
        code = {"workspace": workspace, "code_revision": code_revision}
        summary = place(summarize(data_revision=data_revision, tracking_uri=tracking_uri, **code))
        with dsl.ExitHandler(summary, name="chain"):
            given = {
                "recipe": recipe,
                "overrides": overrides,
                "data_revision": data_revision,
                "tracking_uri": tracking_uri,
            }
            check = place(check_recipe(placement=_own_pod(own), **given, **way, **code))
            # everything later reads what the check settled, so that nothing starts before it
            common = {"data_revision": check.outputs["revision"], **code}
            settled = check.outputs["resolved"]
            base = place(resolve_base(recipe=settled, **common)).outputs["base"]
            data = place(build_data(recipe=settled, **common)).outputs["data"]
            start = {"recipe": settled, "base": base, "data": data, **common}
            with dsl.ParallelFor(check.outputs["Output"]) as each:
                of_it = {"teacher": each.teacher, "recipe": each.recipe, "data_revision": each.revision}
                field = place(finetune(tracking_uri=tracking_uri, **start | of_it)).outputs["field"]
            # a Collected is used up by its one consumer, so each gets its own
            wanted = {"job": _job(own, options), "tracking_uri": tracking_uri, **way}
            training = place(distill(teachers=dsl.Collected(field), **wanted, **start))
            _size(training, check, own)
            made = {"student": training.outputs["student"], "tracking_uri": tracking_uri, **start}
            evaluation = place(evaluate(teachers=dsl.Collected(field), **made)).outputs["evaluation"]
            judged = {"evaluation": evaluation, **made}
            place(register(teachers=dsl.Collected(field), **judged))

    return danceopd_pipeline


def place_task(task: dsl.PipelineTask, options: PipelineOptions) -> dsl.PipelineTask:
    """Give a task its image, resources, nodes, volumes, secrets, time limit, retries and caching."""
    step, placement = task.name.replace("-", "_"), options.placement
    needs = placement.needs(step)
    task.set_container_image(options.image).set_caching_options(needs.cached)
    task.set_cpu_request(str(needs.cpu[0])).set_cpu_limit(str(needs.cpu[1]))
    task.set_memory_request(f"{needs.memory[0]}Gi").set_memory_limit(f"{needs.memory[1]}Gi")
    if needs.accelerator:
        task.set_accelerator_type(needs.accelerator).set_accelerator_limit(1)
    if retries := placement.retries_of(step):
        longest = f"{retry_window(retries, needs.hours)}s"
        task.set_retry(retries, backoff_duration=f"{PAUSE}s", backoff_factor=2, backoff_max_duration=longest)
    task.set_env_variable("OMP_NUM_THREADS", str(_threads(step, options)))
    task.set_env_variable("TQDM_DISABLE", "1")  # a bar is noise in a log
    kubernetes.use_field_path_as_env(task, RUN_ID, "metadata.labels['pipeline/runid']")
    kubernetes.set_security_context(
        task, run_as_user=placement.run_as_user, run_as_group=placement.run_as_group, run_as_non_root=True
    )
    kubernetes.set_timeout(task, needs.hours * 3600)
    _place_pod(task, step, needs, options)
    return task


def retry_window(retries: int, hours: int) -> int:
    """Seconds from a step's first start within which all of its attempts must be over.

    Argo measures `maxDuration` from the first attempt's start, tries nothing again after it, and gives each attempt's
    pod what is left of it as its deadline (4.0.8, workflow/controller/operator.go, `processNodeRetries`). So it holds
    every attempt at its longest, the time each may wait for a node, and the pauses between them.
    """
    pauses = sum(PAUSE * 2**attempt for attempt in range(retries))
    return (retries + 1) * (hours + WAIT_HOURS) * 3600 + pauses


def _place_pod(task: dsl.PipelineTask, step: str, needs: Needs, options: PipelineOptions) -> None:
    """What only Kubernetes has: nodes, volumes, pulls and secrets."""
    placement = options.placement
    for label, value in needs.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for taint in needs.tolerations:
        kubernetes.add_toleration(task, **taint.model_dump(exclude={"value"} if taint.operator == "Exists" else None))
    if needs.shared_memory:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=f"{needs.shared_memory}Gi")
    if placement.claim:
        kubernetes.mount_pvc(task, pvc_name=placement.claim, mount_path=MOUNT)
    kubernetes.set_image_pull_policy(task, placement.image_pull_policy)
    if placement.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(placement.image_pull_secrets))
    if placement.tracking:
        kubernetes.use_config_map_as_env(task, placement.tracking, {"uri": ENVIRONMENT}, optional=True)
    if placement.queue and needs.accelerator:
        kubernetes.add_pod_label(task, QUEUE, placement.queue)
    for secret in placement.secrets:
        if not secret.steps or step in secret.steps:
            keys = {key: variable for variable, key in secret.env.items()}
            kubernetes.use_secret_as_env(task, secret.name, keys, optional=secret.optional)


def _own_pod(needs: Needs) -> dict:
    """What the distillation step's pod asks for if it trains; the check decides (`components.training.pod_of`)."""
    return {
        "accelerator": needs.accelerator,
        "node_selector": needs.node_selector,
        "cpu": str(needs.cpu[0]),
        "memory": f"{needs.memory[0]}Gi",
    }


def _size(training: dsl.PipelineTask, check: dsl.PipelineTask, needs: Needs) -> None:
    """Let the distillation step's pod ask for what the check settled: a step that only follows a job needs little."""
    kubernetes.use_field_path_as_env(training, WORKFLOW, "metadata.labels['workflows.argoproj.io/workflow']")
    training.set_cpu_request(check.outputs["pod_cpu"]).set_memory_request(check.outputs["pod_memory"])
    if needs.accelerator:
        training.set_accelerator_limit(check.outputs["pod_gpus"])
    if needs.node_selector:
        kubernetes.add_node_selector_json(training, check.outputs["pod_nodes"])


def _job(needs: Needs, options: PipelineOptions) -> dict:
    """Options of `danceopd job render`: the pods that train the student elsewhere take what the step's own would."""
    job = {
        "image": options.image,
        "cpu": needs.cpu[0],
        "memory": needs.memory[0],
        "hours": needs.hours,
        "retries": options.placement.retries_of("distill"),
        "node-selector": [f"{label}={value}" for label, value in needs.node_selector.items()],
        "toleration": [taint.key for taint in needs.tolerations],
    }
    given = {"gpu": needs.accelerator, "claim": options.placement.claim, "queue": options.placement.queue}
    return job | {name: value for name, value in given.items() if value}


def _threads(step: str, options: PipelineOptions) -> int:
    if options.threads is None:
        return options.placement.needs(step).cpu[1]
    return options.threads.finetune if step == "finetune" else options.threads.others
