"""The `check_recipe` component: refuses a bad recipe in seconds, before anything costs.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it. The teachers are the step's plain output because kfp's local runner
loops over no other, and each brings recipe and revision along because that runner hands a loop nothing else of a step.
"""

# mypy: disable-error-code="valid-type"
# A plain output is announced by a call: kfp reads its type from what `OutputPath(...)` returns.

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def check_recipe(
    recipe: str,
    overrides: list,
    distill_on: str,
    nodes: int,
    gpus: int,
    placement: dict,
    workspace: str,
    tracking_uri: str,
    data_revision: str,
    code_revision: str,
    resolved: dsl.OutputPath(str),
    revision: dsl.OutputPath(str),
    pod_gpus: dsl.OutputPath(str),
    pod_cpu: dsl.OutputPath(str),
    pod_memory: dsl.OutputPath(str),
    pod_nodes: dsl.OutputPath(dict),
) -> list:
    """Check what a run was given, settle what it left open, and name the teachers.

    Args:
        recipe: name of a shipped recipe, a file on the workspace volume, or a recipe as YAML or JSON text.
        overrides: settings of the recipe to change, each `key.sub=value`.
        distill_on: step, Job or TrainJob.
        nodes: that distill together.
        gpus: of each of them.
        placement: what the pipeline was compiled with for the distillation step.
        workspace: folder all steps share.
        tracking_uri: MLflow tracking server that hears of it, and may hold a champion; empty: a store in the workspace.
        data_revision: identity of the data; empty: found by looking.
        code_revision: identity of the code, shown with the step.
        resolved: the whole recipe as JSON text, which every later step reads.
        revision: identity of the data and of weights that lie behind a path.
        pod_gpus: GPUs of the distillation step's own pod.
        pod_cpu: cores it asks for.
        pod_memory: memory it asks for.
        pod_nodes: labels of the nodes it may run on.

    Returns:
        For each teacher its name (`teacher`) with `recipe` and `revision`, as settled.
    """
    from components.checking import check, of_each_teacher, write_checked
    from components.running import running

    with running("check-recipe", recipe, workspace, overrides=overrides, tracking_uri=tracking_uri) as step:
        found = check(step, data_revision, tracking_uri, distill_on, nodes, gpus, placement)
        write_checked(found, resolved, revision, pod_gpus, pod_cpu, pod_memory, pod_nodes)
        return of_each_teacher(step.recipe, found)
