"""The manifests give ranks what `find_place` reads, and time to save."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.ranks import free_ports
from twotower.train.config import TrainConfig
from twotower.train.launch import Place, find_place, meeting_point

DEPLOY = Path(__file__).parents[2] / "deploy"
# Meets the other ranks at the place that the launcher gave, and says the sum of all ranks.
MEET = """
import os, sys, torch, torch.distributed as dist
from twotower.train.launch import find_place, meeting_point
place, (host, port) = find_place(), meeting_point()
dist.init_process_group(
    "gloo", init_method=f"tcp://{host}:{port}", rank=place.rank, world_size=place.ranks
)
ranks = torch.tensor([place.rank + 1])
dist.all_reduce(ranks)
print("sum", ranks.item(), "of", place.ranks, *sys.argv[1:], flush=True)
dist.destroy_process_group()
os._exit(0)
"""
# Stands in for srun: starts two tasks on this host as SLURM would.
SRUN = """#!/bin/sh
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 \\
        SLURM_STEP_NODELIST=localhost "$2" "$3" "$4" "$5" &
done
wait
"""


def manifests(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def test_an_indexed_job_gives_every_pod_its_place() -> None:
    service, job = manifests("indexed-job.yaml")
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    pods = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == pods
    for index in range(pods):
        place = find_place({**given, "JOB_COMPLETION_INDEX": str(index)})
        assert place == Place(rank=index, ranks=pods, local_rank=0, local_ranks=1)
    host, _ = meeting_point(given)
    # A pod's name in its headless service: <job>-<index>.<subdomain>.
    assert host == f"{job['metadata']['name']}-0.{spec['subdomain']}"
    assert service["metadata"]["name"] == spec["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


@pytest.mark.parametrize("name", ["indexed-job.yaml", "pytorchjob.yaml"])
def test_pods_have_time_to_save_and_a_shared_run_dir(name) -> None:
    job = manifests(name)[-1]
    if job["kind"] == "PyTorchJob":
        spec = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    else:
        spec = job["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] > TrainConfig().stop_within_s
    volumes = {v["name"]: v for v in spec["volumes"]}
    (container,) = spec["containers"]
    paths = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert "persistentVolumeClaim" in volumes["job"]
    words = [*container.get("command", []), *container.get("args", [])]
    assert "train" in words
    assert f"--config={paths['job']}/job.yaml" in words


def test_the_slurm_job_starts_ranks_that_meet(tmp_path) -> None:
    script = DEPLOY / "slurm" / "train.sbatch"
    for name, text in (("srun", SRUN), ("twotower", f"#!{sys.executable}\n{MEET}")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (port,) = free_ports(1)
    done = subprocess.run(
        ["bash", str(script), "job.yaml"], capture_output=True, text=True, check=False, timeout=100,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": str(port),
                          "SLURM_JOB_ID": "7"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 3 of 2 train --config job.yaml") == 2
    limit = next(line for line in script.read_text().splitlines() if "--signal" in line)
    assert int(limit.rsplit("@", 1)[1]) > TrainConfig().stop_within_s


def test_the_slurm_job_without_a_job_says_so() -> None:
    done = subprocess.run(
        ["bash", str(DEPLOY / "slurm" / "train.sbatch")], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "give the job" in done.stderr
