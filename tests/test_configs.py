"""Every shipped job parses, and says in its header what to run."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import ROOT, read_job

CONFIGS = sorted((ROOT / "configs").glob("**/*.yaml"))


def test_the_readmes_ten_lines_are_a_job(tmp_path, twotower) -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.split("```yaml\n")[1].split("```")[0]
    assert len(block.strip().splitlines()) <= 10
    (tmp_path / "shop.yaml").write_text(block)
    table = pa.table({
        "customer": [f"c{i % 7}" for i in range(60)],
        "sku": [i * 5 % 11 for i in range(60)],
        "sold_at": [1_700_000_000_000 + i for i in range(60)],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "log.parquet")
    done = twotower(
        "prepare", "--config", "shop.yaml", "--data.interactions=log.parquet", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_job_is_valid(path: Path) -> None:
    read_job(path).validate()
    header = path.read_text().split("\nname:")[0]
    for word in ("command", "hardware", "duration", "quality"):
        assert word in header, f"the header of {path.name} does not state its {word}"
