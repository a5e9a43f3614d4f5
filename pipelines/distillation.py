"""The chain as one pipeline: recipe, base and data, teachers in parallel, student, evaluation, registration, summary.

The same function compiles to YAML for a cluster (`compile.py`) and runs on one machine (`local.py`). No postponed
annotations here: kfp reads the pipeline function's annotations themselves.
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
from pipelines.options import CHAMPION_NEEDS, MOUNT, NEEDS, Needs, PipelineOptions


def build_pipeline(options: PipelineOptions) -> Callable:
    """Compose the pipeline function; see `PipelineOptions` for what is fixed here and not at run time."""

    def place(task: dsl.PipelineTask) -> dsl.PipelineTask:
        return place_task(task, options)

    @dsl.pipeline(name="danceopd", display_name="DanceOPD: many teachers, one student")
    def danceopd_pipeline(
        recipe: str,
        data_revision: str,
        code_revision: str = options.image,
        workspace: str = MOUNT,
        tracking_uri: str = "",
    ):
        """Fine-tune teachers, distill them into one student, evaluate it, and register it if its gates hold.

        Args:
            recipe: The recipe as JSON text, as `Recipe.model_dump_json()` gives it.
            data_revision: Identity of the data and of weights behind a path; steps are reused only for the same one.
            code_revision: Identity of the code or image; steps are reused only for the same one.
            workspace: Folder on the shared volume for datasets, weights and reports.
            tracking_uri: MLflow tracking server; empty for a store in the workspace.
        """
        code = {"workspace": workspace, "code_revision": code_revision}
        common = {**code, "data_revision": data_revision}
        summary = place(summarize(**common))
        with dsl.ExitHandler(summary, name="chain"):
            check = place(check_recipe(recipe=recipe, **code))
            base = place(resolve_base(recipe=recipe, **common).after(check)).outputs["base"]
            data = place(build_data(recipe=recipe, **common).after(check)).outputs["data"]
            start = {"recipe": recipe, "base": base, "data": data, **common}
            with dsl.ParallelFor(check.output) as teacher:
                field = place(finetune(teacher=teacher, tracking_uri=tracking_uri, **start)).outputs["field"]
            # a Collected is used up by its one consumer, so each gets its own
            student = place(distill(teachers=dsl.Collected(field), **start)).outputs["student"]
            made = {"student": student, **start}
            evaluation = place(evaluate(teachers=dsl.Collected(field), **made)).outputs["evaluation"]
            judged = {"evaluation": evaluation, "tracking_uri": tracking_uri, **made}
            place(register(teachers=dsl.Collected(field), **judged))

    return danceopd_pipeline


def place_task(task: dsl.PipelineTask, options: PipelineOptions) -> dsl.PipelineTask:
    """Give a task its image, resources, volume, time limit, retries and caching."""
    step = task.name.replace("-", "_")
    needs = (NEEDS | CHAMPION_NEEDS)[step]
    task.set_container_image(options.image).set_caching_options(needs.cached)
    task.set_cpu_request(str(needs.cpu[0])).set_cpu_limit(str(needs.cpu[1]))
    task.set_memory_request(f"{needs.memory[0]}Gi").set_memory_limit(f"{needs.memory[1]}Gi")
    if options.gpu and needs.gpu:
        task.set_accelerator_type(options.gpu).set_accelerator_limit(options.gpu_count)
    if options.retries and needs.retried:
        task.set_retry(options.retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")
    task.set_env_variable("OMP_NUM_THREADS", str(_threads(step, needs, options)))
    task.set_env_variable("TQDM_DISABLE", "1")  # a bar is noise in a log
    kubernetes.use_field_path_as_env(task, RUN_ID, "metadata.labels['pipeline/runid']")
    kubernetes.set_security_context(task, run_as_non_root=True)
    kubernetes.set_timeout(task, needs.hours * 3600)
    if options.workspace_claim:
        kubernetes.mount_pvc(task, pvc_name=options.workspace_claim, mount_path=MOUNT)
    return task


def _threads(step: str, needs: Needs, options: PipelineOptions) -> int:
    if options.threads is None:
        return needs.cpu[1]
    return options.threads.finetune if step == "finetune" else options.threads.others


danceopd_pipeline = build_pipeline(PipelineOptions())
