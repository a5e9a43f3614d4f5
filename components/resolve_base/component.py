"""The `resolve_base` component: brings the base model to the workspace.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it.
"""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def resolve_base(
    recipe: str, workspace: str, data_revision: str, code_revision: str, base: dsl.Output[dsl.Model]
) -> None:
    """Bring the base model's pipeline folder to where every later step can read it.

    Args:
        recipe: JSON text of the recipe.
        workspace: folder all steps share.
        data_revision: identity of the data and of weights that lie behind a path, for the cache.
        code_revision: identity of the code, for the cache.
        base: card of the base.
    """
    from components.cards import write_card
    from components.running import running
    from danceopd import steps

    with running("resolve-base", recipe, workspace) as step:
        write_card(base, steps.resolve_base(step.recipe, step.workspace))
