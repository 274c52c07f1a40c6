"""Saving and loading sharded tensors, on any number of ranks.

`torch.distributed.checkpoint` plans which rank writes, and reads, which block; what is written is
ours: its own storage keeps the plan and all that is no tensor in pickles, which run code when they
are loaded. Here each rank writes one safetensors file, and rank 0 a manifest of JSON that makes
the directory whole (`twotower.train.checkpoint.manifest`).
"""

from __future__ import annotations

import copy
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

from twotower.errors import UserError
from twotower.files import partial_path, publish, recover
from twotower.train.checkpoint.manifest import (
    Chunk,
    Manifest,
    StoredFile,
    StoredTensor,
    check,
    check_files,
    chunk_in,
    differences,
    read_manifest,
    versions,
    write_manifest,
)
from twotower.train.checkpoint.numbered import numbered
from twotower.train.checkpoint.safe_file import Entry, write_safe_file

MOST_DIFFERENCES = 4
# Of a checkpoint's file that are mapped at once.
BLOCK_BYTES = 1 << 26


def rank_file(rank: int) -> str:
    """Return the name of what a rank wrote."""
    return f"rank-{rank:05d}.safetensors"


def save(
    path: Path, tensors: Mapping[str, Any], state: Any, *, group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint, whole or not at all; every rank calls it.

    Args:
        path: the directory; one that is there is replaced once the new one is whole.
        tensors: path -> tensor, sharded or the same on all ranks.
        state: JSON values and small tensors; rank 0's is written.
        group: of all ranks; the default one without.

    Raises:
        OSError: on every rank, when any could not write; what was at `path` is as it was.
        TypeError: on every rank, for state that JSON has no form for.
    """
    writer = _Writer(path, state, group)
    try:
        _quietly(
            dcp_save, dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(),
            process_group=group, no_dist=not _together(group),
        )  # fmt: skip
    except CheckpointException as error:
        if writer.rank == 0:
            shutil.rmtree(writer.partial, ignore_errors=True)
        _raise_others(error, OSError)
        raise OSError(f"{path}: {_reason(error)}") from None


def save_async(
    path: Path, tensors: Mapping[str, Any], state: Any, *, group: dist.ProcessGroup | None
) -> Future[None]:
    """Copy the tensors to the host's memory, and write them while the caller goes on.

    Args:
        path: as `save`.
        tensors: as `save`; they may change once this returns.
        state: as `save`; it may change too.
        group: of all ranks, which nobody else uses until the future is done.

    Returns:
        A future that raises what `save` would.
    """
    copies = {name: _copy(value) for name, value in tensors.items()}
    state = copy.deepcopy(state)
    future: Future[None] = Future()

    def run() -> None:
        try:
            save(path, copies, state, group=group)
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    # A daemon: a process that is told to end at once does not wait for it.
    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def load(path: Path, tensors: Mapping[str, Any]) -> Any:
    """Fill tensors with what a checkpoint holds of them, and return its state.

    Every rank calls it, whatever the number that saved; without a process group, one process may.
    Other element types are converted.

    Raises:
        UserError: when it is damaged, or lacks one of the tensors in that shape.
    """
    manifest = _check_shared(path, tensors)
    try:
        _quietly(
            dcp_load, dict(tensors), storage_reader=_Reader(path, manifest),
            planner=DefaultLoadPlanner(), no_dist=not _together(None),
        )  # fmt: skip
    except CheckpointException as error:
        _raise_others(error, Exception)
        raise UserError(f"{path}: the checkpoint is damaged ({_reason(error)})") from None
    return manifest.state


def _check_shared(path: Path, tensors: Mapping[str, Any]) -> Manifest:
    """Return the manifest; every rank checks a part of the files, and all raise what one found."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if _together(None) else (0, 1)
    manifest, found = None, None
    try:
        manifest = read_manifest(path)
        _refuse_another(path, differences(manifest, dict(tensors)))
        check_files(path, manifest, sorted(manifest.files)[rank::ranks])
    except UserError as error:
        found = str(error)
    if ranks > 1:
        everyones: list[str | None] = [None] * ranks
        dist.all_gather_object(everyones, found)
        found = next((said for said in everyones if said), None)
    if manifest is None or found:
        raise UserError(found)
    return manifest


def _refuse_another(path: Path, found: list[str]) -> None:
    if found:
        more = f" and {len(found) - MOST_DIFFERENCES} more" * (len(found) > MOST_DIFFERENCES)
        raise UserError(
            f"{path}: the checkpoint is of another model: {'; '.join(found[:MOST_DIFFERENCES])}"
            f"{more}: use the settings that it was trained with, or train anew"
        )


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the checkpoint `step=<n>` of the highest step that is whole.

    Returns:
        It, or None; and each newer one that is damaged, with the reason.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(numbered(folder).values()):
        try:
            check(path)
        except UserError as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    return None, damaged


def _together(group: dist.ProcessGroup | None) -> bool:
    return dist.is_initialized() and dist.get_world_size(group) > 1


def _quietly(call: Any, *arguments: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        # It warns that there is no process group, which is what `no_dist` says, and of
        # ShardedTensor, which TorchRec's state is made of.
        warnings.simplefilter("ignore")
        call(*arguments, **options)


def _raise_others(error: CheckpointException, kind: type[BaseException]) -> None:
    """Raise what is of another kind, such as Ctrl-C: the planners wrap all that is raised."""
    for failure, _ in error.failures.values():
        if not isinstance(failure, kind):
            raise failure from None


def _reason(error: CheckpointException) -> str:
    failure = next(iter(error.failures.values()))[0]
    if isinstance(failure, OSError) and failure.strerror:
        return f"{failure.strerror}"
    return (str(failure) or type(failure).__name__).splitlines()[0]


def _copy(value: Any) -> Any:
    """Return a copy in the host's memory."""
    if isinstance(value, ShardedTensor):
        # Its own: the shards' places name the device too, and must follow. No collective.
        return value.to(torch.device("cpu"), copy=True)
    return value.detach().to("cpu", copy=True)


@dataclass(frozen=True)
class _Written:
    """Where a block was written, and what became of its file."""

    chunk: Chunk
    file: StoredFile


class _Writer(StorageWriter):
    """Writes this rank's blocks; on rank 0, the manifest too, and gives the directory its name."""

    def __init__(self, path: Path, state: Any, group: dist.ProcessGroup | None) -> None:
        self.path, self.partial, self.state = path, partial_path(path), state
        self.rank = dist.get_rank(group) if _together(group) else 0

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # On rank 0, before any rank writes.
        recover(self.path)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        name = rank_file(self.rank)
        entries, chunks = [], []
        for item in plan.items:
            data = item.tensor_data
            if data is None:
                raise TypeError(f"{item.index.fqn} is no tensor")
            chunk = chunk_in(name, item.index.fqn, data.chunk.offsets, data.chunk.sizes)
            blocks = _on_host(planner, item)
            entries.append(Entry(chunk.key, data.properties.dtype, chunk.shape, blocks))
            chunks.append(chunk)
        written = write_safe_file(self.partial / name, entries) if entries else None
        results: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        results.set_result([
            WriteResult(item.index, 0, _Written(chunk, written))
            for item, chunk in zip(plan.items, chunks, strict=True)
            if written is not None
        ])  # fmt: skip
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places: dict[str, list[Chunk]] = {}
        files: dict[str, StoredFile] = {}
        for result in (result for of_rank in results for result in of_rank):
            places.setdefault(result.index.fqn, []).append(result.storage_data.chunk)
            files[result.storage_data.chunk.file] = result.storage_data.file
        tensors = {
            name: StoredTensor(
                shape=tuple(stored.size),
                type=str(stored.properties.dtype).removeprefix("torch."),
                chunks=tuple(places[name]),
            )
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        manifest = Manifest(
            ranks=len(results), tensors=tensors, files=files, state=self.state, versions=versions()
        )
        write_manifest(self.partial, manifest)
        publish(self.partial, self.path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _on_host(planner: SavePlanner, item: Any) -> Iterator[Tensor]:
    """Yield an item's block, copied to the host when its turn comes."""
    block: Any = planner.resolve_data(item)
    yield block.detach().cpu()


class _Reader(StorageReader):
    """Reads blocks of what `_Writer` wrote, mapped rather than loaded."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.chunks = {
            MetadataIndex(name, torch.Size(chunk.offset)): chunk
            for name, tensor in manifest.tensors.items()
            for chunk in tensor.chunks
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        stored: dict[str, Any] = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size(tensor.shape),
                chunks=[
                    ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape))
                    for c in tensor.chunks
                ],
            )
            for name, tensor in self.manifest.tensors.items()
        }
        return Metadata(state_dict_metadata=stored)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.chunks[item.storage_index].file, []).append(item)
        for name, items in by_file.items():
            for item in items:
                target = planner.resolve_tensor(item).detach()
                self._fill(target, name, item)
                planner.commit_tensor(item, target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _fill(self, target: Tensor, name: str, item: Any) -> None:
        """Copy a block of rows after rows, and open the file for each anew.

        What was read of a mapped file counts as memory of the process until the file is closed: of
        a large table, as a second copy of it.
        """
        key = self.chunks[item.storage_index].key
        if not item.lengths:  # a number has no slices
            with safe_open(self.path / name, framework="pt") as file:
                target.copy_(file.get_tensor(key))
            return
        first, *others = (
            slice(start, start + length)
            for start, length in zip(item.storage_offsets, item.lengths, strict=True)
        )
        step = max(1, BLOCK_BYTES * len(target) // max(1, target.nbytes))
        for start in range(first.start, first.stop, step):
            rows = slice(start, min(start + step, first.stop))
            with safe_open(self.path / name, framework="pt") as file:
                block = file.get_slice(key)[(rows, *others)]
                target[rows.start - first.start : rows.stop - first.start].copy_(block)
                del block

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
