"""Preparing lines of ids: rate and peak memory of both formats, measured from outside.

    python benchmarks/prepare_lines.py               # 30 million pairs: about 3 minutes

The log has 50 training and 2 test items a user, the items of a power law; a tenth of the training
is held out at random. The limit: 30 million pairs in a minute and 5 GB, with `data.memory_gb: 4`.
The result is written to benchmarks/results/prepare_lines.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from measure import measure, write_result

ITEMS, TRAIN, TEST = 500_000, 50, 2


def write_log(folder: Path, form: str, users: int) -> int:
    """Write train.txt and test.txt; returns how many pairs they hold."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with (folder / "train.txt").open("w") as train, (folder / "test.txt").open("w") as test:
        for start in range(0, users, 10_000):
            many = min(10_000, users - start)
            items = rng.zipf(1.2, (many, TRAIN + TEST)) % ITEMS
            for user, row in enumerate(items.tolist(), start):
                for file, part in ((train, row[:TRAIN]), (test, row[TRAIN:])):
                    lines = [part] if form == "user_lines" else [[item] for item in part]
                    file.writelines(f"{user} {' '.join(map(str, line))}\n" for line in lines)
    return users * (TRAIN + TEST)


def prepare(folder: Path, form: str, users: int) -> dict[str, float | str]:
    """Write a log, prepare it with the command, and return what it cost."""
    pairs = write_log(folder / form, form, users)
    data = {
        "root": str(folder / form), "interactions": "train.txt", "format": form,
        "query": [{"name": "user_id", "kind": "id"}],
        "item": [{"name": "item_id", "kind": "id"}],
        "split": {"kind": "given", "test_files": "test.txt", "held_out": "random"},
    }  # fmt: skip
    run = folder / form / "run"
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump({"name": form, "run_dir": str(run), "data": data}))
    seconds, peak = measure([sys.executable, "-m", "twotower", "prepare", "--config", str(job)])
    counts = json.loads((run / "prepared" / "prepared.json").read_text())["counts"]
    assert counts["events"] == pairs
    return {
        "format": form, "pairs": pairs, "users": counts["users"], "items": counts["items"],
        "seconds": round(seconds, 1), "pairs_per_second": round(pairs / seconds),
        "peak_memory_gb": round(peak / 1e9, 2),
    }  # fmt: skip


def main() -> None:
    """Prepare the same log in both formats."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=580_000)
    arguments = parser.parse_args()
    rows = []
    for form in ("user_lines", "pair_lines"):
        with tempfile.TemporaryDirectory() as folder:
            row = prepare(Path(folder), form, arguments.users)
        rows.append(row)
        print(
            f"{form}: {row['pairs']:,} pairs in {row['seconds']} s, "
            f"{row['pairs_per_second']:,} a second, peak {row['peak_memory_gb']} GB",
            flush=True,
        )
    write_result("prepare_lines", {"runs": rows}, ("twotower", "duckdb", "pyarrow"))


if __name__ == "__main__":
    main()
