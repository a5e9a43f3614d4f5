"""The `register` component: puts the student into the model registry if its gates hold.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it.
"""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    recipe: str,
    base: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    teachers: dsl.Input[list[dsl.Model]],
    student: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    workspace: str,
    tracking_uri: str,
    data_revision: str,
    code_revision: str,
) -> dict:
    """Register the student in MLflow if its gates hold; never cached, since the registry changes under it.

    Args:
        recipe: JSON text of the recipe.
        base: card of the base.
        data: card of the dataset.
        teachers: cards of the teachers.
        student: card of the student.
        evaluation: card of the evaluation.
        workspace: folder all steps share.
        tracking_uri: MLflow tracking server; empty: a store in the workspace.
        data_revision: identity of the data, shown with the step.
        code_revision: identity of the code, shown with the step.

    Returns:
        What was registered, and where; a student that fails a gate ends the step, and so the run, as failed.
    """
    from components.cards import read_card, read_cards
    from components.running import running
    from danceopd import steps

    with running("register", recipe, workspace, tracking_uri=tracking_uri) as step:
        made, judged = read_card(student), read_card(evaluation)
        step.results["evaluation"] = str(judged.folder)
        run = steps.Run(step.recipe, step.workspace, read_card(base), read_card(data), tracking_uri or None)
        step.results["shortfalls"] = steps.shortfalls(step.recipe, judged)
        result = steps.register_student(run, read_cards(teachers), made, judged)
        step.results["registration"] = steps.registration_facts(result)
        steps.require_registered(result, judged)
        return step.results["registration"]
