"""The `build_data` component: makes the task-tagged dataset, or finds it under version control.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it.
"""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def build_data(
    recipe: str, workspace: str, data_revision: str, code_revision: str, data: dsl.Output[dsl.Dataset]
) -> None:
    """Make the task-tagged dataset, or find it.

    Args:
        recipe: JSON text of the recipe.
        workspace: folder all steps share.
        data_revision: identity of the data, for the cache.
        code_revision: identity of the code, for the cache.
        data: card of the dataset.
    """
    from components.cards import write_card
    from components.running import running
    from danceopd import steps

    with running("build-data", recipe, workspace) as step:
        write_card(data, steps.build_data(step.recipe, step.workspace))
