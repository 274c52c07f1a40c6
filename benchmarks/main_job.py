"""The main job, measured from outside: time and peak memory of `twotower run`, quality as ratios.

    python benchmarks/main_job.py --config configs/quickstart.yaml
    python benchmarks/main_job.py --config configs/movielens.yaml

Memory is the sum over the command's processes, Triton's included, of their proportional set sizes
(shared pages divided among those that share them), sampled every 50 ms. Quality compares the
towers with popularity and item-to-item co-occurrence, which the same run computes. The result is
written to benchmarks/results/main_job-<name>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from measure import ROOT, measure, write_result


def main() -> None:
    """Measure one job in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML of the job")
    arguments, rest = parser.parse_known_args()
    name = yaml.safe_load(arguments.config.read_text())["name"]
    twotower = [sys.executable, "-m", "twotower"]
    with tempfile.TemporaryDirectory() as folder:
        if name == "quickstart":
            log = ["demo-log", f"--output={folder}/log"]
            subprocess.run([*twotower, *log], check=True, stdout=subprocess.DEVNULL)
            rest = [f"--data.root={folder}/log", *rest]
        run = ["run", "--config", str(arguments.config), f"--run_dir={folder}/run", *rest]
        seconds, peak = measure([*twotower, *run], ROOT)
        report = json.loads(Path(folder, "run/evaluation/metrics.json").read_text())
    towers = report["results"]["two towers"]
    ratios = {
        f"{metric} / {baseline}": round(towers[metric] / values[metric], 3)
        for metric in ("recall@20", "ndcg@20")
        for baseline, values in report["results"].items()
        if baseline != "two towers"
    }
    result = {
        "job": name,
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(peak / 1e9, 2),
        "ratios": ratios,
        "queries": report["queries"],
        "metrics": report["results"],
    }  # fmt: skip
    write_result(f"main_job-{name}", result, ("twotower", "torch", "torchrec", "lightning"))
    print(f"{name}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, {report['queries']:,} queries")
    for label, ratio in ratios.items():
        print(f"  {label:32} {ratio:6.2f}x")


if __name__ == "__main__":
    main()
