"""The `finetune` component: makes one teacher; the pipeline runs it once per teacher, in parallel.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it.
"""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finetune(
    recipe: str,
    teacher: str,
    base: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    workspace: str,
    tracking_uri: str,
    data_revision: str,
    code_revision: str,
    field: dsl.Output[dsl.Model],
) -> None:
    """Make one teacher: fine-tune it, or take it from where it lies, and prove it better than the base on its task.

    Args:
        recipe: JSON text of the recipe.
        teacher: its name in the recipe.
        base: card of the base.
        data: card of the dataset.
        workspace: folder all steps share.
        tracking_uri: MLflow tracking server that hears of it, and has the champion; empty: a store in the workspace.
        data_revision: identity of the data, for the cache.
        code_revision: identity of the code, for the cache.
        field: card of the teacher.
    """
    from components.cards import read_card, write_card
    from components.running import running
    from danceopd import steps

    with running("finetune", recipe, workspace, teacher, tracking_uri=tracking_uri) as step:
        run = steps.Run(step.recipe, step.workspace, read_card(base), read_card(data), tracking_uri or None)
        product = steps.finetune_teacher(run, teacher)
        write_card(field, product, teacher)
