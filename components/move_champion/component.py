"""The `move_champion` component: promotes a registered version, or rolls back to the champion before.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it.
"""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def move_champion(
    recipe: str,
    action: str,
    version: str,
    force: bool,
    workspace: str,
    tracking_uri: str,
    code_revision: str,
    outcome: dsl.Output[dsl.Markdown],
) -> None:
    """Promote a version of the registered model, or roll back; never cached, since the registry changes under it.

    Args:
        recipe: JSON text of the recipe.
        action: promote or rollback.
        version: what to promote, a number or an alias.
        force: promote it although it is worse than the champion.
        workspace: folder all steps share.
        tracking_uri: MLflow tracking server; empty: a store in the workspace.
        code_revision: identity of the code, shown with the step.
        outcome: who is champion now, and the versions there are.
    """
    from components.running import running
    from danceopd import files, steps

    with running("move-champion", recipe, workspace) as step:
        done = steps.move_champion(step.recipe, action, version, force, tracking_uri or None, step.workspace)
        step.results["said"] = done["said"]
        files.write_atomic(outcome.path, done["versions"])
