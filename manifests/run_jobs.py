"""Run an overlay's Jobs in containers here, as their manifests say: `python manifests/run_jobs.py --help`.

Image, arguments, environment, user, read-only root, dropped capabilities and volumes are read from what kustomize
builds; only the claim becomes a folder, and addresses of the cluster's own services are left out. A check to be made by
hand where there is an image and podman or docker (`make image-jobs`).
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

MANIFESTS = Path(__file__).resolve().parent
CHAIN = ["danceopd-finetune-local-edit", "danceopd-distill", "danceopd-evaluate"]
BYTES = {"Gi": 2**30, "Mi": 2**20}
# What becomes an option, or has no meaning for one container without a cluster; any other field is refused.
POD = {
    "serviceAccountName",
    "automountServiceAccountToken",
    "priorityClassName",
    "restartPolicy",
    "containers",
    "terminationGracePeriodSeconds",
    "securityContext",
    "volumes",
    "nodeSelector",
    "tolerations",
}
CONTAINER = {
    "name",
    "image",
    "command",
    "args",
    "env",
    "resources",
    "imagePullPolicy",
    "terminationMessagePolicy",
    "securityContext",
    "volumeMounts",
}
RIGHTS = {"readOnlyRootFilesystem", "allowPrivilegeEscalation", "capabilities"}
USER = {"runAsNonRoot", "runAsUser", "fsGroup", "fsGroupChangePolicy", "seccompProfile"}


def build(folder: Path) -> list[dict]:
    """The documents that kustomize makes of a folder."""
    tool = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    return [d for d in yaml.safe_load_all(subprocess.check_output([*tool, str(folder)], text=True)) if d]


def known(what: str, given: dict, fields: set[str]) -> dict:
    """The same, if nothing in it would be passed over.

    Raises:
        ValueError: naming the fields that would be.
    """
    if passed_over := sorted(set(given) - fields):
        raise ValueError(f"{what}: no option of the container engine stands for {', '.join(passed_over)}")
    return given


def container_command(job: dict, maps: dict[str, dict], workspace: Path, scratch: Path, args: argparse.Namespace):
    """The container engine's command line for a Job's pod.

    Args:
        job: the manifest.
        maps: ConfigMap name -> its data.
        workspace: folder that stands for the claim.
        scratch: folder for the files of ConfigMaps.
        args: engine and its options, image, and more arguments of the job.

    Raises:
        ValueError: for a field of the pod that would be passed over.
    """
    pod = known("pod", job["spec"]["template"]["spec"], POD)
    [container] = pod["containers"]
    known("container", container, CONTAINER)
    rights = known("rights", container["securityContext"], RIGHTS)
    user = known("user", pod["securityContext"], USER)
    command = [*shlex.split(args.engine), "run", "--rm", "--network", "host", "--pull", "never", *args.run_option]
    command += ["--user", f"{user['runAsUser']}:0"]
    command += ["--read-only"] * rights["readOnlyRootFilesystem"]
    command += ["--security-opt", "no-new-privileges"] * (not rights["allowPrivilegeEscalation"])
    command += [part for name in rights["capabilities"]["drop"] for part in ("--cap-drop", name)]
    for entry in container["env"]:
        if "value" in entry:  # the others come from secrets and maps that are optional
            command += ["--env", f"{entry['name']}={entry['value']}"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        volume, where = volumes[mount["name"]], mount["mountPath"]
        if "persistentVolumeClaim" in volume:
            command += ["--volume", f"{workspace}:{where}"]
        elif "configMap" in volume:
            folder = scratch / volume["configMap"]["name"]
            folder.mkdir(exist_ok=True)
            for name, text in maps[volume["configMap"]["name"]].items():
                (folder / name).write_text(text)
            command += ["--volume", f"{folder}:{where}:ro"]
        else:
            size = known("volume", volume, {"name", "emptyDir"})["emptyDir"]["sizeLimit"]
            command += ["--tmpfs", f"{where}:size={int(size[:-2]) * BYTES[size[-2:]]},mode=1777"]
    first, *rest = container.get("command", [""])  # the image's own, if the pod names none
    command += ["--entrypoint", first] * bool(first)
    return [*command, args.image or container["image"], *rest, *container["args"], *args.job_args]


def main() -> int:
    """Run the overlay's jobs in the order given, until one ends badly; returns its exit code."""
    parser = argparse.ArgumentParser(description="Run an overlay's Jobs in containers here.")
    parser.add_argument("--overlay", default="local")
    parser.add_argument("--workspace", type=Path, required=True, help="folder that stands for the claim")
    parser.add_argument("--jobs", nargs="+", default=CHAIN)
    parser.add_argument("--image", help="instead of the manifest's")
    parser.add_argument("--engine", default="podman", help="with its options: 'podman --runtime runc'")
    parser.add_argument("--run-option", action="append", default=[], help="of `run`: --run-option=--ulimit=nproc=4096")
    parser.add_argument("job_args", nargs="*", help="after --: more arguments of every job, such as --set KEY=VALUE")
    args = parser.parse_args()
    installed = build(MANIFESTS / "overlays" / args.overlay)
    maps = {d["metadata"]["name"]: d["data"] for d in installed if d["kind"] == "ConfigMap"}
    jobs = {d["metadata"]["name"]: d for d in build(MANIFESTS / "overlays" / args.overlay / "jobs")}
    if unknown := set(args.jobs) - set(jobs):
        parser.error(f"overlay {args.overlay} has no job {', '.join(sorted(unknown))}; it has: {', '.join(jobs)}")
    workspace = args.workspace.resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    workspace.chmod(0o2775)  # as fsGroup would have it
    shutil.chown(workspace, group=0)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        for name in args.jobs:
            command = container_command(jobs[name], maps, workspace, Path(scratch), args)
            print("+", " ".join(command), flush=True)
            code = subprocess.call(command)
            print(f"{name}: exit code {code}", flush=True)
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
