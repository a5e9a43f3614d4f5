"""The `check_recipe` component: refuses a bad recipe in seconds, before anything costs.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it.
"""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def check_recipe(recipe: str, workspace: str, code_revision: str) -> list:
    """Check the recipe and name its teachers.

    Args:
        recipe: JSON text of the recipe.
        workspace: folder all steps share.
        code_revision: identity of the code, for the cache.

    Returns:
        Names of the teachers.
    """
    from components.running import running

    with running("check-recipe", recipe, workspace) as step:
        return list(step.recipe.teachers)
