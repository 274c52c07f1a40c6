"""Training: a prepared dataset to a checkpoint, resumable at the exact batch.

    twotower train --config JOB.yaml

Everything is written under `train.partial/` and renamed to `train/` at the end, so that a killed
run leaves its checkpoints where the next one resumes, and nothing that looks finished.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch._C._distributed_c10d import HashStore, TCPStore

from twotower.data.loader import ExtraItems, TrainLoader
from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.files import partial_path, publish, recover, write_json
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.callbacks import CatalogueValidation, Checkpoints, TrainingProgress
from twotower.train.checkpoint.numbered import resume_text, step_path
from twotower.train.checkpoint.storage import newest_whole
from twotower.train.checkpoint.towers import write_model_spec
from twotower.train.config import EvaluateConfig, TrackingConfig, TrainConfig
from twotower.train.heads import Heads
from twotower.train.launch import LISTENER, Place, meeting_point
from twotower.train.meters import Meters
from twotower.train.mining import HardNegatives
from twotower.train.module import RetrievalModule
from twotower.train.negatives import PositiveRates
from twotower.train.pipeline import PipelinedLoader
from twotower.train.plots import plot_curves, read_metrics
from twotower.train.sharding import TABLE_TYPES, Plan
from twotower.train.strategy import TorchRecStrategy
from twotower.train.summary import write_summary
from twotower.train.tracking import wandb_logger

# Of what gloo, NCCL and the store say when a peer is gone.
LOST = r"connection (closed|reset|refused)|broken pipe|timed? ?out|remote process|peer|socket"


def train(
    data: PreparedDataset,
    directory: Path,
    *,
    job: dict[str, Any],
    fingerprint: str,
    seed: int,
    name: str,
    model: ModelConfig,
    config: TrainConfig,
    evaluate: EvaluateConfig,
    tracking: TrackingConfig,
    show: Callable[[Plan], None],
    place: Place | None = None,
) -> dict[str, Any]:
    """Train, or resume a killed run of the same inputs, and publish `directory`.

    Args:
        data: the prepared dataset.
        directory: that is published.
        job: the whole configuration, for the tracker.
        fingerprint: of what the weights depend on.
        seed: of everything drawn at random.
        name: of the run.
        model: shape of the towers.
        config: of training.
        evaluate: how an epoch is judged.
        tracking: where the run is tracked.
        show: is given the plan of the tables, on rank 0.
        place: of this process among those that train together; None where it trains alone.

    Returns:
        The content of `train.json`; nothing on other ranks than 0.

    Raises:
        UserError: when the dataset cannot be trained on.
        SystemExit: of code 1, when another rank was lost; of code 143, at a SIGTERM, with a
            checkpoint that the next run resumes from.
        KeyboardInterrupt: at Ctrl-C; the next run resumes from the last checkpoint there is.
    """
    started = time.monotonic()
    place = place or Place(rank=0, ranks=1, local_rank=0, local_ranks=1)
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.accelerator is cuda, but torch finds no CUDA device: set it to auto or cpu, "
            "or install the CUDA builds (`make CUDA=1 install`)"
        )
    if config.batch_size < 2 * place.ranks:
        raise UserError(
            f"train.batch_size must be >= 2 a process, got {config.batch_size} for {place.ranks} "
            "processes: raise it, or train on fewer"
        )
    heads = Heads(data, model.direction_dim, config.heads) if config.heads else None
    validation = CatalogueValidation(data, evaluate, seed, heads)
    partial = partial_path(directory)
    folder = partial / "checkpoints"
    cuda = config.accelerator != "cpu" and torch.cuda.is_available()
    with _meeting(place):
        _join(place, cuda)
        if place.rank == 0:
            recover(directory)
            if not _is_of(partial, fingerprint):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_model_spec(partial, data, model)
                inputs = {"fingerprint": fingerprint, "job": job, "seed": seed}
                write_json(partial / "inputs.json", inputs)
        resume = _agree(_resume_point(folder) if place.rank == 0 else None)
    L.seed_everything(seed, verbose=False)
    rows = {table: info["rows"] for table, info in data.summary["tables"].items()}
    kind = TABLE_TYPES[config.table_precision]
    towers = TwoTower(data.config, rows, model, table_device="meta", table_type=kind)
    workers = config.workers if config.workers is not None else 2 * cuda
    loader: Any = TrainLoader(
        data, config.batch_size, seed, rank=place.rank, ranks=place.ranks, workers=workers,
        pin_memory=cuda, extra=lambda queries: _extra_items(config, queries),
        id_dropout=config.id_dropout, half_life_days=config.half_life_days,
        every_position=config.every_position,
        outcomes=[head.column for head in config.heads.values()],
        seen=config.negatives.exclude_seen, times=config.negatives.exclude_unreleased,
    )  # fmt: skip
    queries = loader.queries_a_step
    steps = config.max_epochs * -(-len(loader) // config.accumulate)
    steps = min(steps, config.max_steps or steps)
    counts = torch.from_numpy(loader.positive_counts())
    rates = PositiveRates(counts, len(loader), config.log_q_from == "stream")
    module = RetrievalModule(towers, config, rates, queries, steps, seed, heads, loader.first_times)
    if config.negatives.sizes(queries)["mined"]:
        most = min(loader.length, config.negatives.mining.every * config.batch_size)
        module.mining = loader.miner = HardNegatives(
            data, config.negatives.mining, module, most, evaluate.batch_size
        )
    if config.pipeline == "on" or (config.pipeline == "auto" and cuda):
        loader = PipelinedLoader(loader, module)
    wandb = wandb_logger(partial, tracking, name, job) if place.rank == 0 else None
    checkpoints = Checkpoints(folder, config, f"val/{evaluate.monitor}")
    meters = Meters(queries, config.profile, partial / "trace")
    early = EarlyStopping(
        checkpoints.monitor, mode="max", patience=config.patience, check_on_train_epoch_end=True
    )
    callbacks = [validation, meters, early, checkpoints]
    strategy = TorchRecStrategy(config, seed, show)
    trainer = _trainer(partial, config, callbacks, strategy, wandb, len(loader), place)
    with checkpoints.heeding_sigterm():
        _fit(trainer, module, loader, resume, checkpoints, place)
        if place.rank:
            return {}
        return _finish(
            trainer, checkpoints, partial, directory, fingerprint, resume, started, wandb
        )


@contextmanager
def _meeting(place: Place) -> Iterator[None]:
    """End this process where another does not come, or goes, before all train."""
    try:
        yield
    except RuntimeError as error:
        if not _lost_a_rank(error, place):
            raise
        print(
            f"twotower train: rank {place.rank} met no group of {place.ranks} ranks: another was "
            f"lost, or did not come ({str(error).splitlines()[0]}): give the same command again",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _join(place: Place, cuda: bool) -> None:
    """Make the group of the processes that train together."""
    if place.ranks == 1:
        store = HashStore()  # of this process alone: no port
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
        return
    if cuda and place.local_ranks > torch.cuda.device_count():
        raise UserError(
            f"{place.local_ranks} processes of this host see {torch.cuda.device_count()} CUDA "
            "devices: start one a device, and let each see all of the host's"
        )
    device = torch.device("cuda", place.local_rank) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    host, port = meeting_point()
    meeting: dict[str, Any] = {"init_method": f"tcp://{host}:{port}"}
    if listener := os.environ.get(LISTENER):
        first = place.rank == 0
        socket = int(listener) if first else None
        meeting = {"store": TCPStore(host, port, place.ranks, first, master_listen_fd=socket)}
    dist.init_process_group(
        "nccl" if cuda else "gloo", rank=place.rank, world_size=place.ranks, device_id=device,
        **meeting,
    )  # fmt: skip


def _extra_items(config: TrainConfig, queries: float) -> ExtraItems:
    sizes = config.negatives.sizes(queries)
    return ExtraItems(
        uniform=sizes["uniform"], mined=sizes["mined"], skipped=sizes["skipped"],
        catalogue=config.negatives.catalogue,
    )  # fmt: skip


def _agree(path: Path | None) -> Path | None:
    """Return rank 0's path, on every rank."""
    paths = [path]
    dist.broadcast_object_list(paths)
    return paths[0]


def _fit(
    trainer: L.Trainer, module: RetrievalModule, loader: Any, resume: Path | None,
    checkpoints: Checkpoints, place: Place,
) -> None:  # fmt: skip
    """Train; when it is told to stop, or a rank is lost, say how to go on."""
    try:
        trainer.fit(module, loader, ckpt_path=str(resume) if resume else None)
    except (SystemExit, RuntimeError) as error:
        stop = error if isinstance(error, SystemExit) else SystemExit(128 + signal.SIGTERM)
        stopped = f"stopped at step {trainer.global_step}"
        if isinstance(error, RuntimeError) and not checkpoints.told_to_stop:
            if not _lost_a_rank(error, place):
                raise
            stop, stopped = SystemExit(1), f"{stopped}, where another rank was lost"
        # Otherwise a signal to the whole process group has ended the loader's workers.
        if place.rank == 0 or stop.code == 1:
            print(
                f"twotower train: {stopped}: give the same command to go on from "
                f"{resume_text(checkpoints.folder)}",
                file=sys.stderr,
            )
        # Lightning makes a 1 of Ctrl-C.
        interrupted = stop.code == 1 and stop is error
        raise (KeyboardInterrupt if interrupted else stop) from None


def _lost_a_rank(error: RuntimeError, place: Place) -> bool:
    """Whether it is what gloo and NCCL raise when another process has gone."""
    return place.ranks > 1 and re.search(LOST, str(error), re.IGNORECASE) is not None


def _is_of(partial: Path, fingerprint: str) -> bool:
    """Whether an unfinished training is of the same inputs."""
    try:
        inputs = json.loads((partial / "inputs.json").read_text())
        return bool(inputs["fingerprint"] == fingerprint)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _resume_point(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, setting damaged ones aside and saying so."""
    newest, damaged = newest_whole(folder)
    for path, reason in damaged.items():
        print(f"twotower train: WARNING: {reason}: not resumed from", file=sys.stderr)
        path.rename(path.with_name(f"{path.name}.damaged"))
    return newest


class _Environment(LightningEnvironment):
    """Tells Lightning the place that the launcher gave this process."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return self.place.ranks

    def global_rank(self) -> int:
        return self.place.rank

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.rank // self.place.local_ranks


def _trainer(
    partial: Path, config: TrainConfig, callbacks: list[L.Callback], strategy: TorchRecStrategy,
    wandb: WandbLogger | None, steps_per_epoch: int, place: Place,
) -> L.Trainer:  # fmt: skip
    _quiet()
    loggers = [CSVLogger(partial, name="csv"), *([wandb] if wandb else [])]
    shown = [TrainingProgress(leave=False)] if place.rank == 0 else []
    return L.Trainer(
        accelerator="gpu" if config.accelerator == "cuda" else config.accelerator,
        devices=place.local_ranks,
        num_nodes=place.ranks // place.local_ranks,
        plugins=[_Environment(place)],
        strategy=strategy,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        max_epochs=config.max_epochs,
        max_steps=config.max_steps or -1,
        accumulate_grad_batches=config.accumulate,
        callbacks=[*callbacks, *shown],
        logger=loggers if place.rank == 0 else False,
        log_every_n_steps=min(10, steps_per_epoch),
        enable_model_summary=False,
        enable_progress_bar=place.rank == 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _quiet() -> None:
    # What these say at every start is true of every run of ours and asks for nothing.
    for name in ("lightning.pytorch", "lightning.fabric", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        for source in ("lightning", "torch", "torchrec"):
            warnings.filterwarnings("ignore", category=category, module=rf"{source}\..*")
    warnings.filterwarnings("ignore", message="Please use DTensor")  # TorchRec's state is older
    os.environ.setdefault("NCCL_DEBUG", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def _finish(
    trainer: L.Trainer, checkpoints: Checkpoints, partial: Path, directory: Path,
    fingerprint: str, resume: Path | None, started: float, wandb: WandbLogger | None,
) -> dict[str, Any]:  # fmt: skip
    best = checkpoints.best()
    if best is None:
        raise UserError(
            f"{checkpoints.folder}: no checkpoint that was judged could be written: make room on "
            "the disk and give the same command again"
        )
    step, score = best
    summary = {
        "fingerprint": fingerprint,
        "best_step": step,
        "monitor": checkpoints.monitor,
        "score": score,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "resumed_from": resume.name if resume else None,
        "seconds": round(time.monotonic() - started, 1),
        "wandb_run": wandb.experiment.id if wandb else None,
    }
    plot_curves(read_metrics(partial), checkpoints.monitor, partial / "curves.png")
    if wandb:
        wandb.experiment.finish()
    # The run stays one that can be resumed until it is published.
    shutil.rmtree(partial / "checkpoint", ignore_errors=True)
    shutil.copytree(
        step_path(checkpoints.folder, step), partial / "checkpoint", copy_function=_link
    )
    summary = write_summary(partial, summary)
    publish(partial, directory)
    if checkpoints.config.keep_best == 1 and checkpoints.config.keep_every_steps is None:
        shutil.rmtree(directory / "checkpoints")
    return summary


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
