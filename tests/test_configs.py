"""Every shipped job parses, and says in its header what to run."""

from pathlib import Path

import pytest

from twotower.cli import build_parser
from twotower.job import Job

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_job_is_valid(path: Path) -> None:
    parser = build_parser()
    options = parser.instantiate(parser.parse_args(["run", "--config", str(path)]))["run"]
    job = Job(**{k: v for k, v in vars(options).items() if k != "config"})
    job.validate()
    header = path.read_text().split("\nname:")[0]
    for word in ("command", "hardware", "duration", "quality"):
        assert word in header, f"the header of {path.name} does not state its {word}"
