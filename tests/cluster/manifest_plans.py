"""What the files of manifests/jobs are, in the terms of `danceopd job render`."""

from __future__ import annotations

from pipelines.cluster.objects import RECIPES, RUNTIME, TRAINER, JobPlan, failure_policy, pod, pod_labels

RECIPE = f"{RECIPES}/recipe.yaml"
ONE_GPU = {"gpus": 1, "cpu": 8, "memory": 64, "recipe": RECIPE}
NODE = {"gpus": 8, "cpu": 96, "memory": 800, "recipe": RECIPE}
CPU = {"cpu": 2, "memory": 6, "hours": 6, "recipe": RECIPE}
PLANS = {
    "jobs/finetune": (
        JobPlan("finetune", "local_edit", **ONE_GPU),
        "One teacher on one GPU: name it in the arguments.",
    ),
    "jobs/distill": (JobPlan("distill", **NODE), "The student on one node of eight GPUs."),
    "jobs/distill-multinode": (
        JobPlan("distill", nodes=2, name="danceopd-distill-multinode", **NODE),
        "The student on two nodes of eight GPUs, without Kubeflow Trainer: an indexed Job and a headless Service.",
    ),
    "jobs/distill-trainjob": (
        JobPlan("distill", nodes=2, kind="TrainJob", name="danceopd-distill-trainjob", **NODE),
        "The student on two nodes of eight GPUs, by Kubeflow Trainer.",
    ),
    "jobs/evaluate": (JobPlan("evaluate", **ONE_GPU), "The student's evaluation on one GPU."),
    "overlays/local/jobs/finetune": (JobPlan("finetune", "local_edit", **CPU), "One teacher, on CPU."),
    "overlays/local/jobs/distill": (JobPlan("distill", **CPU), "The student, on CPU."),
    "overlays/local/jobs/evaluate": (JobPlan("evaluate", **CPU), "The student's evaluation, on CPU."),
}


def training_runtime() -> dict:
    """The TrainingRuntime that our TrainJobs name."""
    container = {"name": TRAINER, "image": "danceopd:dev"}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": RUNTIME, "labels": {"app.kubernetes.io/part-of": "danceopd"}},
        "spec": {
            "mlPolicy": {"numNodes": 1, "torch": {}},
            "template": {
                "spec": {
                    # All pods start again together, from the last checkpoint; over bad input they do not (JobSet,
                    # pkg/controllers/failure_policy.go; a rule's name takes no "-").
                    "failurePolicy": {
                        "maxRestarts": 10,
                        "rules": [
                            {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                        ],
                    },
                    "replicatedJobs": [
                        {
                            "name": TRAINER,
                            "template": {
                                "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                                "spec": {
                                    "backoffLimit": 0,
                                    "podFailurePolicy": failure_policy(TRAINER),
                                    "template": {
                                        "metadata": {"labels": pod_labels("distill")},
                                        "spec": pod(container, "danceopd-workspace"),
                                    },
                                },
                            },
                        }
                    ],
                }
            },
        },
    }
