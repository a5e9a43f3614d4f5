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
    workspace: str,
    data_revision: str,
    code_revision: str,
    student: dsl.Output[dsl.Model],
):
    """Distill the teachers into one student, exported as a complete diffusers pipeline folder.

    Args:
        recipe: JSON text of the recipe.
        base: card of the base.
        data: card of the dataset.
        teachers: cards of the teachers.
        workspace: folder all steps share.
        data_revision: identity of the data, for the cache.
        code_revision: identity of the code, for the cache.
        student: card of the student.
    """
    from components.cards import read_card, read_cards, write_card
    from components.running import running
    from danceopd import steps

    with running("distill", recipe, workspace) as step:
        fields = read_cards(teachers)
        product = steps.distill_student(step.recipe, read_card(base), read_card(data), fields, step.workspace)
        write_card(student, product)
