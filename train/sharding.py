"""How the embedding tables are spread over the ranks: planned, shown, made and filled.

TorchRec's planner places every table by its constraints and by what the hardware holds. Tables are
made shard by shard, so none exists whole on one rank, and filled row by row from a seed, so that
their first weights are the same on any number of ranks and by any sharding.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import CacheParams, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig

from twotower.data.schema import ID_KINDS
from twotower.data.table import LEAST_PART, MOST_PARTS, Table
from twotower.errors import UserError, gigabytes
from twotower.towers.dynamic_tables import dynamic_sharders
from twotower.towers.two_tower import PREFIX, TwoTower
from twotower.train.config import TableSharding, TrainConfig

TABLE_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}
# Of a rank's memory, what is left to activations, dense parameters, batches and the system.
RESERVED = 0.2
# Rows that one seed fills: a shard's first and last block are drawn whole, and cut.
FILL_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the planner must know of the machines.

    Attributes:
        device: cpu or cuda.
        ranks: processes of the training.
        local_ranks: processes on one host.
        device_bytes: memory of a rank's GPU, 0 on a CPU.
        host_bytes: a rank's share of its host's memory.
    """

    device: str
    ranks: int
    local_ranks: int
    device_bytes: int
    host_bytes: int

    @property
    def table_bytes(self) -> int:
        """What a rank can hold of tables that are looked up where it computes."""
        whole = self.device_bytes if self.device == "cuda" else self.host_bytes
        return int(whole * (1 - RESERVED))


def find_hardware(device: torch.device, ranks: int, local_ranks: int) -> Hardware:
    """Return the hardware of this rank, of the least rank where they differ."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        host = min(host, int(text))
    cuda = device.type == "cuda"
    on_device = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    sizes = torch.tensor([on_device, host // local_ranks], device=device)
    if ranks > 1:
        dist.all_reduce(sizes, op=dist.ReduceOp.MIN)
    return Hardware(
        device=device.type, ranks=ranks, local_ranks=local_ranks,
        device_bytes=int(sizes[0]), host_bytes=int(sizes[1]),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlacedTable:
    """Where a table is: a row of the plan as it is shown.

    Attributes:
        name: of the table in the schema.
        rows: of the table.
        width: of a row.
        bytes: of its weights.
        sharding: TorchRec's sharding type.
        kernel: TorchRec's compute kernel.
        rank_bytes: rank -> bytes that the planner expects of it where that rank computes, with the
            optimizer's and what goes in and out in a step.
    """

    name: str
    rows: int
    width: int
    bytes: int
    sharding: str
    kernel: str
    rank_bytes: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """TorchRec's plan and what to show of it."""

    sharding: ShardingPlan
    tables: list[PlacedTable]
    hardware: Hardware


class _BagSharder(EmbeddingBagCollectionSharder):
    """Offers row-wise sharding off CUDA too, where the stock sharder hides it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types: list[str] = super().sharding_types("cuda")
        return types


def sharders() -> list[Any]:
    """Return what shards each kind of collection that towers are made of."""
    bags, lists = _BagSharder(), EmbeddingCollectionSharder()
    return [bags, lists, *dynamic_sharders(bags, lists)]


def plan_tables(model: TwoTower, config: TrainConfig, hardware: Hardware) -> Plan:
    """Place every table.

    Called by every rank, which all get the same plan: a planner that only rank 0 ran would leave
    the others waiting when it raised.

    Raises:
        UserError: naming the table that cannot be spread as the configuration says, or that fits
            nowhere, and how much is missing.
    """
    tables = model.table_configs()
    for name in config.tables:
        if PREFIX + name not in tables:
            known = ", ".join(n.removeprefix(PREFIX) for n in tables)
            raise UserError(
                f"train.tables.{name}: no embedding table has this name; known: {known}"
            )
    if config.table_precision == "bf16" and hardware.device != "cuda":
        raise UserError(
            "train.table_precision is bf16, which needs CUDA: FBGEMM looks such tables up on a GPU "
            "alone: set it to fp16"
        )
    constraints = {
        name: _constraints(model, name, table, config, hardware) for name, table in tables.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=hardware.ranks,
            local_world_size=hardware.local_ranks,
            compute_device=hardware.device,
            hbm_cap=hardware.device_bytes,
            # The planner reserves of a GPU's memory alone.
            ddr_cap=int(hardware.host_bytes * (1 - RESERVED)),
        ),
        batch_size=max(1, config.batch_size // hardware.ranks),
        storage_reservation=FixedPercentageStorageReservation(RESERVED),
        constraints=constraints,
        debug=False,
    )
    try:
        sharding = planner.plan(model, sharders())
    except PlannerError as error:
        raise _does_not_fit(tables, config, hardware, error) from None
    placed = []
    for option in planner._best_plan or []:
        table = tables[option.name]
        rank_bytes: dict[int, int] = {}
        for shard in option.shards:
            there = shard.storage.hbm if hardware.device == "cuda" else shard.storage.ddr
            rank_bytes[shard.rank] = rank_bytes.get(shard.rank, 0) + there
        placed.append(PlacedTable(
            name=option.name.removeprefix(PREFIX), rows=table.num_embeddings,
            width=table.embedding_dim, bytes=_weight_bytes(table), sharding=option.sharding_type,
            kernel=option.compute_kernel, rank_bytes=rank_bytes,
        ))  # fmt: skip
    return Plan(sharding=sharding, tables=placed, hardware=hardware)


def _constraints(
    model: TwoTower, name: str, table: Any, config: TrainConfig, hardware: Hardware
) -> ParameterConstraints:
    short = name.removeprefix(PREFIX)
    key, wanted = f"train.tables.{short}", config.table(short)
    is_dynamic = model.data.table(short).slots is not None
    if config.table_optimizer == "adam" and (
        is_dynamic or not isinstance(table, EmbeddingBagConfig)
    ):
        what = "has dynamic ids" if is_dynamic else "is pooled by attention or read by an encoder"
        raise UserError(
            f"{key}: the table {what}, and TorchRec holds no such table whole on every rank, as "
            "adam needs it: set train.table_optimizer to rowwise_adagrad"
        )
    if is_dynamic:
        _check_dynamic(key, model.data.table(short), wanted, hardware)
    if not isinstance(table, EmbeddingBagConfig) and wanted.sharding in (
        "data_parallel",
        "table_row_wise",
    ):
        raise UserError(
            f"{key}: a table that is pooled by attention cannot be sharded {wanted.sharding} by "
            "TorchRec: shard it row_wise or table_wise, or pool by mean"
        )
    if wanted.sharding in ("row_wise", "table_row_wise") and (
        table.num_embeddings < hardware.local_ranks
    ):
        raise UserError(
            f"{key}: {table.num_embeddings} rows cannot be spread {wanted.sharding} over "
            f"{hardware.local_ranks} ranks: shard it table_wise"
        )
    if wanted.kernel.startswith("fused_uvm") and hardware.device != "cuda":
        raise UserError(
            f"{key}.kernel: {wanted.kernel} needs CUDA; on a CPU all tables are in the host's "
            "memory: leave it at auto"
        )
    types = [wanted.sharding]
    if wanted.sharding == "auto":
        types = [ShardingType.TABLE_WISE.value]
        if table.num_embeddings >= hardware.ranks:
            types.append(ShardingType.ROW_WISE.value)
    if is_dynamic:
        types = [ShardingType.ROW_WISE.value]
    kernels = [wanted.kernel]
    if wanted.sharding == "data_parallel":
        kernels = [EmbeddingComputeKernel.DENSE.value]
    elif wanted.kernel == "auto":
        kernels = [EmbeddingComputeKernel.FUSED.value]
        if hardware.device == "cuda":
            in_host = EmbeddingComputeKernel.FUSED_UVM_CACHING
            if is_dynamic:
                in_host = EmbeddingComputeKernel.FUSED_UVM
            kernels.append(in_host.value)
    cached = wanted.cache_fraction is not None
    return ParameterConstraints(
        sharding_types=types,
        compute_kernels=kernels,
        pooling_factors=_pooling_factors(model, table),
        cache_params=CacheParams(load_factor=wanted.cache_fraction) if cached else None,
        stochastic_rounding=config.table_precision != "fp32",
    )


def _check_dynamic(key: str, ids: Table, wanted: TableSharding, hardware: Hardware) -> None:
    """Refuse what a table with dynamic ids cannot be."""
    if wanted.sharding not in ("auto", "row_wise"):
        raise UserError(
            f"{key}.sharding: a table with dynamic ids is sharded row_wise, got {wanted.sharding}: "
            "set it to row_wise"
        )
    if wanted.kernel == "fused_uvm_caching":
        raise UserError(
            f"{key}.kernel: rows of a table with dynamic ids change hands, which a cache of them "
            "would miss: set it to fused or fused_uvm, or leave it at auto"
        )
    if ids.parts % hardware.ranks:
        more = ""
        if MOST_PARTS % hardware.ranks == 0:
            table, least = key.removeprefix("train."), hardware.ranks * LEAST_PART
            more = f", or let data.{table}.slots be a multiple of {least:,}"
        raise UserError(
            f"{key}: the {ids.slots:,} slots of its dynamic ids are cut into {ids.parts} parts, "
            f"which {hardware.ranks} ranks cannot share equally: train on as many ranks as divide "
            f"{ids.parts}{more}"
        )


def _pooling_factors(model: TwoTower, table: Any) -> list[float]:
    """Return the most entries that each feature of a table looks up a sample."""
    features = {f"{tower}.{f.name}": f for tower, f in model.data.features() if f.kind in ID_KINDS}
    found = (features[key] for key in table.feature_names)
    return [float(f.length if f.kind in ("ids", "history") else 1) for f in found]


def _weight_bytes(table: Any) -> int:
    bits = {DataType.FP32: 32, DataType.FP16: 16, DataType.BF16: 16}[table.data_type]
    return int(table.num_embeddings * table.embedding_dim * bits // 8)


def _state_bytes(config: TrainConfig, width: int) -> int:
    """Return what the tables' optimizer remembers of a row."""
    return {"rowwise_adagrad": 4, "adam": 8 * width}.get(config.table_optimizer, 0)


def _does_not_fit(
    tables: dict[str, Any], config: TrainConfig, hardware: Hardware, error: PlannerError
) -> UserError:
    """Say which table does not fit and how much is missing."""
    needs = {
        n: _weight_bytes(t) + _state_bytes(config, t.embedding_dim) * t.num_embeddings
        for n, t in tables.items()
    }
    a_rank, remedies = hardware.table_bytes, "use more ranks or set train.table_precision to fp16"
    if hardware.device == "cuda":
        remedies += ", or set its kernel to fused_uvm (the host's memory)"
    whole = ("table_wise", "column_wise", "data_parallel")
    for name, need in sorted(needs.items(), key=lambda pair: -pair[1]):
        table, short = tables[name], name.removeprefix(PREFIX)
        sharding = config.table(short).sharding
        where, room = "all ranks together", a_rank * hardware.ranks
        if sharding in whole:
            where, room = "one rank", a_rank
        if need > room:
            return UserError(
                f"table '{short}' ({table.num_embeddings:,} x {table.embedding_dim}, "
                f"{config.table_precision}, {sharding}) needs {gigabytes(need)}, {where} can hold "
                f"{gigabytes(room)}: {gigabytes(need - room)} are missing: {remedies}"
            )
    total, room = sum(needs.values()), a_rank * hardware.ranks
    reason = str(error).splitlines()[0]
    largest = max(needs, key=needs.__getitem__).removeprefix(PREFIX)
    return UserError(
        f"the tables need {gigabytes(total)} and the {hardware.ranks} ranks can hold "
        f"{gigabytes(room)}; the largest is '{largest}'. TorchRec finds no plan ({reason}): "
        f"{remedies}, or loosen train.tables"
    )


def shard(model: TwoTower, plan: Plan, device: torch.device, seed: int) -> Any:
    """Return the model under DistributedModelParallel, its tables filled."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            tensor.data = tensor.data.to(device)
    sharded = DistributedModelParallel(
        model, device=device, plan=plan.sharding, sharders=sharders()
    )
    bound = {f"{t.name}": (3 / t.width) ** 0.5 for t in plan.tables}
    for key, value in sharded.state_dict().items():
        parts = key.split(".")
        table = parts[-2] if len(parts) > 1 else ""
        if parts[-1] == "weight" and table.startswith(PREFIX):
            name = table.removeprefix(PREFIX)
            _fill(value, name, seed, bound[name])
    return sharded


@torch.no_grad()
def _fill(value: Any, name: str, seed: int, bound: float) -> None:
    """Draw a table's weights from -bound to bound, each block of rows from a seed of its own."""
    if isinstance(value, Tensor) and not hasattr(value, "local_shards"):
        parts = [(value, (0, 0))]
    else:
        parts = [(s.tensor, tuple(s.metadata.shard_offsets)) for s in value.local_shards()]
    width = value.size(1)
    for weight, (row, column) in parts:
        generator = torch.Generator(weight.device)
        stop = row + weight.shape[0]
        for block in range(row // FILL_ROWS, -(-stop // FILL_ROWS)):
            generator.manual_seed(_block_seed(seed, name, block))
            drawn = torch.empty(FILL_ROWS, width, device=weight.device)
            drawn.uniform_(-bound, bound, generator=generator)
            first = block * FILL_ROWS
            low, high = max(row, first), min(stop, first + FILL_ROWS)
            weight[low - row : high - row] = drawn[
                low - first : high - first, column : column + weight.shape[1]
            ].to(weight.dtype)


def _block_seed(seed: int, name: str, block: int) -> int:
    # 2**63 seeds in all: the table's name and its block are far apart in them.
    return (zlib.crc32(name.encode()) << 31 ^ seed * 0x9E3779B1 ^ block * 0x85EBCA77) % 2**63
