"""The search: every setting it makes is one a recipe has, and a trial says what Katib reads."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest
from test_manifests import MANIFESTS, built, needs_kustomize, of_kind, restricted_problems

from danceopd.config.load import load_recipe

METRIC = re.compile(r"([\w|-]+)\s*=\s*([+-]?\d*(\.\d+)?([Ee][+-]?\d+)?)")  # Katib's default for standard output


@pytest.fixture(scope="module")
def trial():
    spec = importlib.util.spec_from_file_location("trial", MANIFESTS / "katib" / "trial.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def experiment() -> dict:
    [found] = of_kind("katib", "Experiment")
    return found["spec"]


def test_every_trial_is_a_job_of_a_recipe_that_there_is():
    spec = experiment()
    references = {p["name"]: p["reference"] for p in spec["trialTemplate"]["trialParameters"]}
    values = {
        p["name"]: [*p["feasibleSpace"].get("list", []), *(p["feasibleSpace"].get(k) for k in ("min", "max"))]
        for p in spec["parameters"]
    }
    assert set(references.values()) == set(values)
    job = spec["trialTemplate"]["trialSpec"]
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["name"] == spec["trialTemplate"]["primaryContainerName"]
    for pick in range(4):
        chosen = {name: [v for v in values[ref] if v is not None] for name, ref in references.items()}
        text = " ".join(container["args"])
        for name, choices in chosen.items():
            text = text.replace(f"${{trialParameters.{name}}}", choices[pick % len(choices)])
        assert "${" not in text
        load_recipe("world", re.findall(r"--set=(\S+)", text))


def test_a_trials_pod_is_restricted_and_goes_on_after_an_interruption():
    job = experiment()["trialTemplate"]["trialSpec"]["spec"]
    assert restricted_problems(job["template"]["spec"]) == []
    rules = {tuple(r.get("onExitCodes", {}).get("values", ())): r["action"] for r in job["podFailurePolicy"]["rules"]}
    assert rules == {(): "Ignore", (75,): "Ignore", (2,): "FailJob"}


METRICS = {
    "retention": {"t2i": {"a": {"ratio": 0.9}, "b": {"ratio": None}}, "edit": {"c": {"ratio": 1.0}}},
    "passed": True,
}


def test_a_trial_says_its_figures_in_the_lines_that_katib_reads(trial, tmp_path, capfd, monkeypatch):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    said = f"print('step 1'); print({str(tmp_path / 'report.html')!r} + ': the student holds all its gates')"
    monkeypatch.setattr(trial.sys, "executable", fake(tmp_path, said))
    assert trial.main(["--recipe", "world"]) == 0
    found = dict(m.group(1, 2) for line in capfd.readouterr().out.splitlines() if (m := METRIC.fullmatch(line)))
    assert {name: float(value) for name, value in found.items()} == {"retention": 0.95, "passed": 1.0}
    spec = experiment()["objective"]
    assert {spec["objectiveMetricName"], *spec["additionalMetricNames"]} == set(found)


@pytest.mark.parametrize("code", [1, 2, 75])
def test_a_trial_ends_as_its_evaluation_does(trial, tmp_path, monkeypatch, code):
    monkeypatch.setattr(trial.sys, "executable", fake(tmp_path, f"import sys; sys.exit({code})"))
    assert trial.main([]) == code


def fake(folder, code: str) -> str:
    """A stand-in for the interpreter that runs danceopd: runs this code in its place."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\n{code}\n")
    script.chmod(0o755)
    return str(script)


@needs_kustomize
def test_the_script_is_mounted_where_the_command_looks():
    [made] = [d for d in built("katib") if d["kind"] == "ConfigMap"]
    pod = experiment()["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]
    [volume] = [v["name"] for v in pod["volumes"] if v.get("configMap", {}).get("name") == made["metadata"]["name"]]
    [place] = [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] == volume]
    assert pod["containers"][0]["command"] == ["python", f"{place}/trial.py"] and "trial.py" in made["data"]
