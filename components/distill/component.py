"""The `distill` component: distills all teachers into one student.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it.
"""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def distill(
    recipe: str,
    base: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    teachers: dsl.Input[list[dsl.Model]],
    distill_on: str,
    nodes: int,
    gpus: int,
    job: dict,
    workspace: str,
    tracking_uri: str,
    data_revision: str,
    code_revision: str,
    student: dsl.Output[dsl.Model],
) -> None:
    """Distill the teachers into one student, exported as a complete diffusers pipeline folder.

    Args:
        recipe: JSON text of the recipe.
        base: card of the base.
        data: card of the dataset.
        teachers: cards of the teachers.
        distill_on: step (the step's own pod), Job or TrainJob.
        nodes: that train together.
        gpus: of each of them; 0: CPU.
        job: options of `danceopd job render`: what a job's pods are and take.
        workspace: folder all steps share.
        tracking_uri: MLflow tracking server that hears of it, and may hold a champion; empty: a store in the workspace.
        data_revision: identity of the data, for the cache.
        code_revision: identity of the code, for the cache.
        student: card of the student.
    """
    from components.cards import read_card, read_cards, write_card
    from components.running import running
    from components.training import Way, train_student

    with running("distill", recipe, workspace, tracking_uri=tracking_uri) as step:
        given, way = (read_card(base), read_card(data), read_cards(teachers)), Way(distill_on, nodes, gpus)
        write_card(student, train_student(step, *given, way, job, tracking_uri))
