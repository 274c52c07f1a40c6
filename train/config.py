"""Settings of training, evaluation and tracking; free of torch, so that any host can read a job."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Literal

from twotower.errors import UserError, one_of
from twotower.train.heads_config import HeadConfig
from twotower.train.loss_config import LossConfig
from twotower.train.negatives_config import LISTED, NegativesConfig

SHARDINGS = (
    "auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel",
)  # fmt: skip
KERNELS = ("auto", "fused", "fused_uvm", "fused_uvm_caching")
TABLE_OPTIMIZERS = ("rowwise_adagrad", "sgd", "adam")
DENSE_OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("fp32", "bf16")
TABLE_PRECISIONS = ("fp32", "fp16", "bf16")
SCHEDULES = ("constant", "linear", "cosine")
LOG_Q_FROM = ("counts", "stream")
PIPELINES = ("auto", "on", "off")
# What an evaluation keeps of every query.
QUERIES = "queries.parquet"


@dataclass(frozen=True, kw_only=True)
class TableSharding:
    """How one embedding table is spread over the ranks."""

    sharding: str = "auto"
    """auto, table_wise, row_wise, column_wise, table_row_wise or data_parallel."""
    kernel: str = "auto"
    """auto, fused, fused_uvm (in the host's memory) or fused_uvm_caching (cached on the GPU)."""
    cache_fraction: float | None = None
    """fused_uvm_caching: share of the table's rows kept on the GPU; the planner chooses without."""

    def validate(self, key: str) -> None:
        """Refuse what TorchRec cannot do.

        Args:
            key: of this table in the YAML.

        Raises:
            UserError: naming the key.
        """
        for name, known in (("sharding", SHARDINGS), ("kernel", KERNELS)):
            one_of(f"{key}.{name}", getattr(self, name), known)
        if self.cache_fraction is not None and not 0 < self.cache_fraction <= 1:
            raise UserError(f"{key}.cache_fraction must be in (0, 1], got {self.cache_fraction}")
        if self.cache_fraction is not None and self.kernel != "fused_uvm_caching":
            raise UserError(f"{key}.cache_fraction needs {key}.kernel: fused_uvm_caching")
        if self.sharding == "data_parallel" and self.kernel != "auto":
            raise UserError(
                f"{key}.kernel: a data_parallel table has no fused kernel: leave it at auto"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the towers are trained."""

    batch_size: int = 1024
    """Events a step, over all ranks; with every_position, histories."""
    every_position: bool = False
    """Let each entry of a history predict the next one; its pooling is attention, timed_sum,
    transformer or hstu."""
    max_epochs: int = 20
    """Passes over the training events, at most."""
    max_steps: int | None = None
    """Steps of training, at most; no limit by default."""
    patience: int = 3
    """Epochs without a better validation before training stops."""
    table_optimizer: str = "rowwise_adagrad"
    """Of the embedding tables: rowwise_adagrad or sgd, in the backward pass; or adam, which moves
    every row at every step, so that each rank holds the whole tables (data_parallel)."""
    table_lr: float = 0.05
    """Learning rate of the embedding tables."""
    dense_optimizer: str = "adamw"
    """Of everything else: adamw or sgd."""
    dense_lr: float = 0.001
    """Learning rate of everything else."""
    weight_decay: float = 0.0001
    """Weight decay of everything else, decoupled in adamw."""
    schedule: str = "constant"
    """Both learning rates after the warm-up: constant, or linear or cosine down to 0."""
    warmup_steps: int = 0
    """Steps in which both learning rates rise from 0."""
    clip_norm: float | None = None
    """Largest norm of the dense parameters' gradients; tables are updated before it is known."""
    accumulate: int = 1
    """Steps whose gradients one update of the dense parameters adds; tables learn at every step."""
    id_dropout: float = 0.0
    """Share of items whose own id is hidden in a step, so that their features must tell them."""
    item_l2: float = 0.0
    """Pull of the embeddings of items' own ids towards 0, so that an item with few events is what
    its features tell; the same for every item, however often it occurs."""
    half_life_days: float | None = None
    """Days after which an event counts half, so that what is taken now counts more."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is lowered."""
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    """What a query's positive is compared with."""
    heads: dict[str, HeadConfig] = field(default_factory=dict)
    """Outcomes of an event that are predicted beside, for instance whether it was liked."""
    log_q: float = 1.0
    """Exponent of the correction for popular items being sampled more often: 1 full, 0 none."""
    log_q_from: str = "counts"
    """How often an item is a positive: counts (of the log), or stream (learned from the steps)."""
    correct_positive: bool = True
    """Correct the positive's own term too, though it is there whatever is sampled."""
    precision: str = "fp32"
    """Of the towers' arithmetic: fp32 or bf16."""
    table_precision: str = "fp32"
    """Of the tables' weights: fp32, fp16 or bf16, the last two rounded stochastically."""
    compile: bool = False
    """Compile the towers with torch.compile."""
    sharding: str = "auto"
    """How tables are spread over the ranks, where `tables` says nothing else."""
    tables: dict[str, TableSharding] = field(default_factory=dict)
    """Embedding table -> how it is spread."""
    pipeline: str = "auto"
    """Copy and distribute the next batches during a step: auto (on CUDA), on or off."""
    processes: int | None = None
    """Processes that train together; by default one a CUDA device, else one."""
    elastic: int = 0
    """Times that the processes are started again, from the last checkpoint, when one is lost."""
    stop_within_s: float = 30.0
    """Seconds in which a training that is told to stop (SIGTERM) saves and ends."""
    checkpoint_every_steps: int = 200
    """Steps between checkpoints that a killed run resumes from."""
    checkpoint_async: bool = False
    """Write checkpoints while training goes on, at the cost of a copy of the tables in memory."""
    keep_best: int = 1
    """Best checkpoints kept, by evaluate.monitor; the first is the one that is exported."""
    keep_every_steps: int | None = None
    """Steps between checkpoints that are kept for good; none by default."""
    profile: list[int] | None = None
    """First and last step of a trace for Perfetto, for instance [100, 104]; none by default."""
    workers: int | None = None
    """Processes that build batches ahead, a rank; by default 0 on a CPU, 2 on CUDA."""
    accelerator: str = "auto"
    """auto, cpu or cuda."""

    def table(self, name: str) -> TableSharding:
        """Return how embedding table `name` is spread."""
        found = self.tables.get(name, TableSharding(sharding=self.sharding))
        if self.table_optimizer == "adam" and found.sharding == "auto":
            return replace(found, sharding="data_parallel")
        return found

    def validate(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            UserError: naming the key.
        """
        least = {
            "batch_size": 2, "max_epochs": 1, "max_steps": 1, "patience": 1,
            "checkpoint_every_steps": 1, "accumulate": 1, "warmup_steps": 0, "processes": 1,
            "elastic": 0, "keep_best": 1, "keep_every_steps": 1, "workers": 0,
        }  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"train.{name} must be >= {minimum}, got {value}")
        for name in ("table_lr", "dense_lr", "clip_norm", "stop_within_s", "half_life_days"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"train.{name} must be > 0, got {value}")
        if not 0 <= self.id_dropout < 1:
            raise UserError(f"train.id_dropout must be in [0, 1), got {self.id_dropout:g}")
        if self.item_l2 < 0:
            raise UserError(f"train.item_l2 must be >= 0, got {self.item_l2:g}")
        if not 0 <= self.log_q <= 2:
            raise UserError(f"train.log_q must be an exponent from 0 to 2, got {self.log_q:g}")
        self.loss.validate()
        self.negatives.validate()
        for name, head in self.heads.items():
            head.validate(f"train.heads.{name}")
        if self.heads and self.every_position:
            raise UserError(
                "train.heads predict what followed an event, and with train.every_position the "
                "examples are histories, whose entries do not keep it: remove one of them"
            )
        if self.every_position and (self.negatives.in_batch == 0 or self.negatives.memory):
            raise UserError(
                "train.negatives needs an in_batch share, and none of memory, where "
                "train.every_position is set: mix in_batch and uniform, or set catalogue"
            )
        if self.every_position and any(getattr(self.negatives, name) for name in LISTED):
            raise UserError(
                f"train.negatives.{' and '.join(LISTED)} bring a list a training event, and with "
                "train.every_position a step has none: set them to 0, or every_position to false"
            )
        if self.log_q_from == "stream" and (self.every_position or self.negatives.catalogue):
            raise UserError(
                "train.log_q_from: stream learns from the events of a step, and with "
                "train.every_position or train.negatives.catalogue a step has none: set it to "
                "counts"
            )
        if self.negatives.in_batch == 0 and self.correct_positive:
            raise UserError(
                "train.correct_positive must be false where train.negatives.in_batch is 0: a "
                "positive is then no sampled candidate"
            )
        for name, known in (
            ("accelerator", ("auto", "cpu", "cuda")), ("pipeline", PIPELINES),
            ("table_optimizer", TABLE_OPTIMIZERS), ("dense_optimizer", DENSE_OPTIMIZERS),
            ("precision", PRECISIONS), ("table_precision", TABLE_PRECISIONS),
            ("schedule", SCHEDULES), ("sharding", SHARDINGS), ("log_q_from", LOG_Q_FROM),
        ):  # fmt: skip
            one_of(f"train.{name}", getattr(self, name), known)
        if self.batch_size < 2 * (self.processes or 1):
            raise UserError(
                f"train.batch_size must be >= 2 a process, got {self.batch_size} for "
                f"train.processes={self.processes}"
            )
        if self.profile is not None and (
            len(self.profile) != 2 or not 0 <= self.profile[0] <= self.profile[1]
        ):
            raise UserError(
                f"train.profile must be a first and a last step, such as [100, 104], got "
                f"{self.profile}"
            )
        if self.table_optimizer == "adam" and self.table_precision != "fp32":
            raise UserError(
                f"train.table_precision is {self.table_precision}, and adam's averages of small "
                "gradients need fp32: set it to fp32, or train.table_optimizer to rowwise_adagrad"
            )
        for name, table in self.tables.items():
            table.validate(f"train.tables.{name}")
        spread = {"train.sharding": self.sharding} | {
            f"train.tables.{name}.sharding": table.sharding for name, table in self.tables.items()
        }
        for key, sharding in spread.items():
            if self.table_optimizer == "adam" and sharding not in ("auto", "data_parallel"):
                raise UserError(
                    f"{key} is {sharding}, but train.table_optimizer is adam, which moves every "
                    "row at every step: leave it at auto, which is data_parallel then, or set "
                    "train.table_optimizer to rowwise_adagrad"
                )
            if sharding == "column_wise" and self.table_optimizer == "rowwise_adagrad":
                raise UserError(
                    f"{key} is column_wise, but train.table_optimizer is rowwise_adagrad, which "
                    "would keep one state a row and column shard, so that the result depended on "
                    "the number of ranks: shard row_wise, or set train.table_optimizer to sgd"
                )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the towers are judged; always over the whole catalogue."""

    k: list[int] = field(default_factory=lambda: [10, 20, 50])
    """Cut-offs of the metrics."""
    monitor: str = "ndcg@20"
    """Validation metric that chooses the checkpoint, best when highest."""
    max_queries: int = 20_000
    """Most queries of a split; more are sampled with the job's seed."""
    batch_size: int = 2048
    """Queries or items a forward pass."""

    @property
    def monitor_k(self) -> int:
        """Cut-off of the monitor."""
        return int(self.monitor.rsplit("@", 1)[1])

    def validate(self) -> None:
        """Refuse cut-offs and metrics that do not exist.

        Raises:
            UserError: naming the key.
        """
        if not self.k or min(self.k) < 1:
            raise UserError(f"evaluate.k must be cut-offs >= 1, got {self.k}")
        names = [f"{m}@{k}" for m in ("recall", "ndcg", "mrr", "hit_rate") for k in self.k]
        if self.monitor not in names:
            raise UserError(
                f"evaluate.monitor must be one of {', '.join(names)}, got '{self.monitor}'"
            )
        for name in ("max_queries", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluate.{name} must be >= 1, got {getattr(self, name)}")


Mode = Literal["online", "offline", "disabled"]
# What WANDB_MODE may say; the last two are W&B's older names.
WANDB_MODES: dict[str, Mode] = {
    "online": "online", "offline": "offline", "disabled": "disabled",
    "run": "online", "dryrun": "offline",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are tracked, beside the CSV files that are always written.

    The environment variable WANDB_MODE (online, offline or disabled) goes before `wandb`, unless
    that is off. Where W&B cannot be reached, a run is tracked offline; `wandb sync` uploads it.
    """

    wandb: str = "auto"
    """auto (online with an API key, else offline), offline, online or off; see WANDB_MODE."""
    project: str = "twotower"
    """W&B project."""

    def validate(self) -> None:
        """Refuse an unknown mode.

        Raises:
            UserError: naming the key.
        """
        if self.wandb not in ("auto", "offline", "online", "off"):
            raise UserError(
                f"tracking.wandb must be auto, offline, online or off, got '{self.wandb}'"
            )
        self.mode()

    def mode(self) -> Mode:
        """Return W&B's own mode: online, offline or disabled.

        Raises:
            UserError: when WANDB_MODE is none.
        """
        if self.wandb == "off":
            return "disabled"
        if given := os.environ.get("WANDB_MODE"):
            if given not in WANDB_MODES:
                raise UserError(
                    f"the environment variable WANDB_MODE must be one of {', '.join(WANDB_MODES)}, "
                    f"got '{given}': correct it, or set tracking.wandb to off"
                )
            return WANDB_MODES[given]
        if self.wandb == "online" or (self.wandb == "auto" and os.environ.get("WANDB_API_KEY")):
            return "online"
        return "offline"
