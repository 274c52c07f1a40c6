"""The manifests give ranks what `find_place` reads, time to save, and no restart for a mistake."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.ranks import free_ports
from twotower.train.config import TrainConfig
from twotower.train.launch import Place, find_place, meeting_point

DEPLOY = Path(__file__).parents[2] / "deploy"
SBATCH = DEPLOY / "slurm" / "train.sbatch"
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
os.write(1, " ".join(["sum", str(ranks.item()), *sys.argv[1:]]).encode() + b"\\n")
dist.destroy_process_group()
os._exit(0)
"""
# Stands in for srun: starts two tasks on this host as SLURM would, passes SIGTERM on, and ends with
# the highest of their codes.
SRUN = """
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith(("--distribution", "--kill-on"))]
step = {
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "localhost",
}
tasks = [
    subprocess.Popen(
        command, env={**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
    )
    for i in range(2)
]
signal.signal(signal.SIGTERM, lambda number, _: [task.send_signal(number) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    if job["kind"] == "PyTorchJob":
        return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    return job["spec"]["template"]["spec"]


def run_together(
    commands: list[list[str]], environments: list[dict[str, str]], cwd: Path
) -> list[str]:
    """Run commands at the same time and return what each printed."""
    running = [
        subprocess.Popen(
            command, env=os.environ | environment, cwd=cwd, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]  # fmt: skip
    try:
        done = [process.communicate(timeout=100) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), done
    return [output for output, _ in done]


def test_an_indexed_job_gives_every_pod_its_place() -> None:
    service, job = manifests("indexed-job.yaml")
    spec = pod_of(job)
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
    assert service["spec"]["publishNotReadyAddresses"] is True
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_an_indexed_job_restarts_what_is_lost_and_nothing_else() -> None:
    _, job = manifests("indexed-job.yaml")
    spec = job["spec"]
    # The policy needs it; one spent index ends all, which would wait for it.
    assert pod_of(job)["restartPolicy"] == "Never"
    assert (spec["backoffLimitPerIndex"] > 0, spec["maxFailedIndexes"]) == (True, 0)
    actions = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == pod_of(job)["containers"][0]["name"]
            actions |= dict.fromkeys(codes["values"], rule["action"])
    assert actions == {2: "FailJob", 128 + signal.SIGTERM: "Ignore"}


def test_the_ranks_of_an_indexed_job_meet(tmp_path) -> None:
    (container,) = pod_of(manifests("indexed-job.yaml")[1])["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "2"}
    pods = [given | here | {"JOB_COMPLETION_INDEX": str(index)} for index in range(2)]
    printed = run_together([[sys.executable, "-c", MEET]] * 2, pods, tmp_path)
    assert printed == ["sum 3\n"] * 2


def test_the_ranks_of_torchrun_meet_with_what_the_operator_sets(tmp_path) -> None:
    job = manifests("pytorchjob.yaml")[0]
    spec, elastic = job["spec"], job["spec"]["elasticPolicy"]
    (container,) = pod_of(job)["containers"]
    assert container["name"] == "pytorch"
    assert container["command"] == ["torchrun", "-m", "twotower"]
    assert elastic["maxReplicas"] == spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
    (tmp_path / "meet.py").write_text(MEET)
    pod = {
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_NPROC_PER_NODE": "1", "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_ports(1)[0]}", "PET_RDZV_ID": "twotower-train",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]), "PET_LOCAL_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "-m", "meet", *container["args"]]
    printed = run_together([torchrun] * 2, [pod] * 2, tmp_path)
    assert printed == [f"sum 3 {' '.join(container['args'])}\n"] * 2


@pytest.mark.parametrize("name", ["indexed-job.yaml", "pytorchjob.yaml"])
def test_pods_have_time_to_save_and_a_shared_run_dir(name) -> None:
    job = manifests(name)[-1]
    spec = pod_of(job)
    (container,) = spec["containers"]
    arguments = dict(word.split("=") for word in container["args"] if "=" in word)
    within = float(arguments.get("--train.stop_within_s", TrainConfig().stop_within_s))
    assert spec["terminationGracePeriodSeconds"] > within
    if job["kind"] == "PyTorchJob":
        assert within < 30, "which torchrun gives"
    assert container["args"][0] == "train"
    assert arguments["--train.accelerator"] == "cuda", "a pod without its GPU must not train"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == job["spec"].get(
        "nprocPerNode", "1"
    )
    (storage,) = manifests("storage.yaml")
    (prepare,) = manifests("prepare.yaml")
    assert storage["spec"]["accessModes"] == ["ReadWriteMany"]
    (before,) = pod_of(prepare)["containers"]
    assert before["args"][0] == "prepare"
    for pod, words in ((spec, container), (pod_of(prepare), before)):
        volumes = {v["name"]: v for v in pod["volumes"]}
        paths = {m["name"]: m["mountPath"] for m in words["volumeMounts"]}
        claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
        assert claim == storage["metadata"]["name"]
        assert f"--config={paths['job']}/job.yaml" in words["args"]
        assert f"--run_dir={paths['runs']}/main" in words["args"]
        assert words["image"] == container["image"]


@pytest.fixture
def sbatch(tmp_path: Path):
    """Start the batch script with stand-ins for SLURM, and for what its tasks run."""

    def start(twotower: str, *arguments: str, **more: str) -> "subprocess.Popen[str]":
        scontrol = "import sys\nopen('scontrol', 'a').write(' '.join(sys.argv[1:]) + '\\n')"
        for name, text in (("srun", SRUN), ("scontrol", scontrol), ("twotower", twotower)):
            (tmp_path / name).write_text(f"#!{sys.executable}\n{text}")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "bin").mkdir()
        for name in ("srun", "scontrol", "twotower"):
            (tmp_path / name).rename(tmp_path / "bin" / name)
        batch = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
            "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(SBATCH), *arguments], cwd=tmp_path, env=os.environ | batch | more,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


def requeued(cwd: Path) -> str:
    return (cwd / "scontrol").read_text() if (cwd / "scontrol").exists() else ""


def test_the_slurm_job_starts_ranks_that_meet(sbatch, tmp_path) -> None:
    (port,) = free_ports(1)
    process = sbatch(MEET, "job.yaml", "--seed=3", MASTER_PORT=str(port))
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    words = "train --config=job.yaml --train.accelerator=cuda --seed=3"
    assert output.splitlines() == [f"sum 3 {words}"] * 2
    assert requeued(tmp_path) == ""


# Rank 1 ends as it is told for each of its lives, and rank 0 notices.
LIVES = """
import os, signal, sys
codes, rank = [{codes}], os.environ["SLURM_PROCID"]
open("lives-" + rank, "a").write(".")
code = codes[os.path.getsize("lives-" + rank) - 1]
if rank == "0":
    sys.exit(1 if code else 0)
os.kill(os.getpid(), signal.SIGKILL) if code == 137 else sys.exit(code)
"""


@pytest.mark.parametrize(
    ("codes", "lives", "code"),
    [("137, 1, 0", 3, 0), ("2", 1, 2), ("137, " * 6, 6, 137)],
    ids=["lost twice", "a mistake", "lost once too often"],
)
def test_the_slurm_job_starts_lost_ranks_again(codes, lives, code, sbatch, tmp_path) -> None:
    process = sbatch(LIVES.format(codes=codes), "job.yaml")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert len((tmp_path / "lives-1").read_text()) == lives
    assert errors.count("all start again") == lives - 1
    assert ("5 restarts are spent: submit the same job" in errors) == (code == 137)
    assert requeued(tmp_path) == ""


def test_the_slurm_job_saves_and_queues_again_before_its_end(sbatch, tmp_path) -> None:
    process = sbatch("""
import os, signal, sys, time
def save(number, _):
    time.sleep(0.5)
    open(f"saved-{os.environ['SLURM_PROCID']}", "w").close()
    os._exit(143)
signal.signal(signal.SIGTERM, save)
open(f"ready-{os.environ['SLURM_PROCID']}", "w").close()
time.sleep(60)
""", "job.yaml")  # fmt: skip
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert requeued(tmp_path) == "requeue 7\n"
    (limit,) = [line for line in SBATCH.read_text().splitlines() if "--signal" in line]
    # SLURM sends it up to a minute late.
    assert int(limit.removeprefix("#SBATCH --signal=B:TERM@")) > 60 + TrainConfig().stop_within_s


def test_the_slurm_job_without_a_job_says_so(sbatch) -> None:
    process = sbatch("")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "usage: sbatch train.sbatch JOB.yaml" in errors
