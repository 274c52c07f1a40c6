"""A training directory, and the towers in it, on one process.

train/
model.json      what the towers are built from: schema, table rows, model settings
checkpoint/     the best epoch's, see `twotower.train.checkpoint.manifest`
train.json      what training did, see `twotower.train.summary`
curves.png, csv/, wandb/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twotower.data.prepared import PreparedDataset, data_config
from twotower.errors import UserError
from twotower.files import write_json
from twotower.towers.config import ModelConfig, model_config
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint.manifest import MODEL
from twotower.train.checkpoint.storage import load
from twotower.train.checkpoint.table_file import TableFile
from twotower.train.heads import Heads
from twotower.train.heads_config import HeadConfig
from twotower.train.summary import check_training

MODEL_SPEC = "model.json"


def write_model_spec(directory: Path, data: PreparedDataset, model: ModelConfig) -> None:
    """Write `model.json`, from which the towers can be built without the dataset."""
    rows = {name: info["rows"] for name, info in data.summary["tables"].items()}
    spec = {"data": asdict(data.config), "table_rows": rows, "model": asdict(model)}
    write_json(directory / MODEL_SPEC, spec)


def read_model_spec(directory: Path) -> dict[str, Any]:
    """Return the arguments of `TwoTower` for a training directory.

    Raises:
        UserError: when nothing was trained there.
    """
    try:
        spec = json.loads((directory / MODEL_SPEC).read_text())
    except FileNotFoundError:
        raise UserError(f"{directory}: no trained model: run `twotower train` first") from None
    return {
        "data": data_config(spec["data"]),
        "table_rows": spec["table_rows"],
        "config": model_config(spec["model"]),
    }


def load_towers(
    directory: Path, checkpoint: Path | None = None, file: TableFile | None = None
) -> TwoTower:
    """Return the trained towers, unsharded, on the CPU and in evaluation mode.

    Args:
        directory: the training directory.
        checkpoint: the checkpoint in it, `checkpoint/` by default; saved on any world size.
        file: where the tables go; into memory without.

    Raises:
        UserError: when it is missing, is not as training left it, or does not fit the model.
    """
    if checkpoint is None:
        check_training(directory)
    # Tables get no first weights, which would take as long as reading the last ones.
    model = TwoTower(**read_model_spec(directory), table_device="meta")
    for tables in model.collections().values():
        tables.to_empty(device="cpu")
    if file is not None:
        file.move(model.table_parameters())
    path = checkpoint or directory / "checkpoint"
    load(path, {MODEL + name: value for name, value in model.state_dict().items()})
    return model.eval()


def load_heads(
    directory: Path, data: PreparedDataset, dim: int, configs: Mapping[str, HeadConfig]
) -> Heads | None:
    """Return the trained heads of a training directory, None where it has none.

    Args:
        directory: the training directory.
        data: the dataset that they were trained on.
        dim: width of the towers' vectors, without the coordinate of an item bias.
        configs: name -> what each predicts.

    Raises:
        UserError: when the checkpoint is not as training left it.
    """
    if not configs:
        return None
    heads = Heads(data, dim, configs)
    load(directory / "checkpoint", {f"heads/{k}": value for k, value in heads.state_dict().items()})
    return heads
