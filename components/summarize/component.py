"""The `summarize` component: writes the run's summary, whether the run went well or not.

kfp reads the annotations themselves and pastes the function's source into the pipeline: no postponed annotations
here, and every import the body needs inside it.
"""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def summarize(
    status: dsl.PipelineTaskFinalStatus,
    workspace: str,
    tracking_uri: str,
    data_revision: str,
    code_revision: str,
    summary: dsl.Output[dsl.Markdown],
) -> None:
    """Write how the run ended, what failed and why, what was registered, and the figures.

    Args:
        status: how the rest of the pipeline ended.
        workspace: folder all steps share.
        tracking_uri: MLflow tracking server, which hears how the run ended; empty: a store in the workspace.
        data_revision: identity of the data, named in the summary.
        code_revision: identity of the code, named in the summary.
        summary: the summary.
    """
    from components.summary import write_summary

    revisions = {"data_revision": data_revision, "code_revision": code_revision}
    write_summary(workspace, status.state, summary.path, tracking_uri, **revisions)
