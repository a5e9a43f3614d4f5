"""The `evaluate` component: scores base, teachers and student on held-out records and writes the report.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it.
"""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    recipe: str,
    base: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    teachers: dsl.Input[list[dsl.Model]],
    student: dsl.Input[dsl.Model],
    workspace: str,
    tracking_uri: str,
    data_revision: str,
    code_revision: str,
    evaluation: dsl.Output[dsl.Artifact],
    figures: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Score base, every teacher and the student on every task's held-out records.

    Args:
        recipe: JSON text of the recipe.
        base: card of the base.
        data: card of the dataset.
        teachers: cards of the teachers.
        student: card of the student.
        workspace: folder all steps share.
        tracking_uri: MLflow tracking server with the champion, for comparison; empty: a store in the workspace.
        data_revision: identity of the data, for the cache.
        code_revision: identity of the code, for the cache.
        evaluation: card of the evaluation.
        figures: what the gates look at.
        report: the report with pictures, one self-contained page.
        notes: the report's figures as text.
    """
    from components.cards import publish_evaluation, read_card, read_cards, write_card
    from components.running import running
    from danceopd import steps

    with running("evaluate", recipe, workspace, tracking_uri=tracking_uri) as step:
        run = steps.Run(step.recipe, step.workspace, read_card(base), read_card(data), tracking_uri or None)
        drawn = read_card(student)
        product = steps.evaluate_student(run, read_cards(teachers), drawn)
        steps.measure_champion(run, drawn, product)  # where the accelerator is; the registration finds it made
        write_card(evaluation, product)
        publish_evaluation(product, report, notes, figures)
