"""Settings of the export; free of torch, so that any host can read a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.errors import UserError, one_of
from twotower.export.manifest import PRECISIONS

INDEX_KINDS = ("exact", "int8", "pq", "ivf", "hnsw")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How the item vectors are searched."""

    kind: str = "exact"
    """exact, int8, pq, ivf or hnsw; `twotower index BUNDLE --compare` shows what each costs."""
    width: int | None = None
    """Coordinates that are searched, one of model.widths; all by default."""
    rescore: int = 4
    """Candidates a result that a lossy index finds; whole fp32 vectors then order them."""
    codes: int | None = None
    """pq: 4-bit codes an item, which must divide the width; as many as it by default."""
    nlist: int | None = None
    """ivf: cells that the items are divided into; twice the root of their number by default."""
    nprobe: int = 64
    """ivf: cells that a query searches."""
    m: int = 32
    """hnsw: links an item."""
    ef_construction: int = 64
    """hnsw: candidates for an item's links."""
    ef_search: int = 256
    """hnsw: candidates that a query follows at the least."""

    def validate(self, widths: Sequence[int]) -> None:
        """Refuse what no index can be.

        Args:
            widths: that the model's vectors may be cut to, their own included.

        Raises:
            UserError: naming the key.
        """
        one_of("export.index.kind", self.kind, INDEX_KINDS)
        for name in ("rescore", "codes", "nlist", "nprobe", "ef_construction", "ef_search"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"export.index.{name} must be >= 1, got {value}")
        if not 2 <= self.m <= 512:
            raise UserError(f"export.index.m must be from 2 to 512, got {self.m}")
        width = widths[-1] if self.width is None else self.width
        if width not in widths:
            raise UserError(
                f"export.index.width must be one of model.widths or model.dim "
                f"({', '.join(map(str, widths))}), got {width}: add it to model.widths and train"
            )
        if self.kind == "pq" and width % (self.codes or width):
            raise UserError(
                f"export.index.codes must divide the width that is searched ({width}), got "
                f"{self.codes}"
            )


@dataclass(frozen=True, kw_only=True)
class TensorRTConfig:
    """Graphs of the query tower for TensorRT, and how far they may be from eager PyTorch."""

    precisions: list[str] = field(default_factory=list)
    """fp32, fp16, bf16, int8 or fp8, of the tower's matrix products: a graph each, the first the
    one that build_engine.py takes by itself; none by default."""
    batch: list[int] = field(default_factory=lambda: [1, 64, 1024])
    """Least, usual and largest number of queries at once that an engine is built for."""
    fp16_tolerance: float = 5e-3
    """Largest difference of a score in fp16, by default ten times what it rounds by."""
    bf16_tolerance: float = 4e-2
    """Largest difference of a score in bf16, by default ten times what it rounds by."""
    int8_tolerance: float = 1e-1
    """Largest difference of a score in int8."""
    fp8_tolerance: float = 2e-1
    """Largest difference of a score in fp8."""
    calibration_queries: int = 512
    """Queries of the training split, and items, whose activations scale int8 and fp8."""
    refit: bool = False
    """Build engines that another bundle's weights can be put into, with build_engine.py --refit;
    TensorRT optimises them less."""
    overlap: float = 0.9
    """Least share of eager PyTorch's golden answers that every precision must give."""

    def validate(self) -> None:
        """Refuse precisions that there are none of, and batches that no engine takes.

        Raises:
            UserError: naming the key.
        """
        for precision in self.precisions:
            one_of("export.tensorrt.precisions", precision, PRECISIONS)
        if len(set(self.precisions)) < len(self.precisions):
            raise UserError(
                f"export.tensorrt.precisions must differ from each other, got {self.precisions}"
            )
        rises = sorted(self.batch) == self.batch and len(self.batch) == 3
        if not rises or self.batch[0] < 1:
            raise UserError(
                "export.tensorrt.batch must be three sizes from 1 that do not fall, got "
                f"{self.batch}: for instance [1, 64, 1024]"
            )
        for precision in PRECISIONS[1:]:
            name = f"{precision}_tolerance"
            if not getattr(self, name) > 0:
                raise UserError(f"export.tensorrt.{name} must be > 0, got {getattr(self, name)}")
        if self.calibration_queries < 1:
            raise UserError(
                f"export.tensorrt.calibration_queries must be >= 1, got {self.calibration_queries}"
            )
        if not 0 <= self.overlap <= 1:
            raise UserError(f"export.tensorrt.overlap must be in [0, 1], got {self.overlap}")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How a checkpoint becomes a bundle."""

    tolerance: float = 1e-4
    """Largest difference of a score between eager PyTorch and ONNX Runtime; beyond, no bundle."""
    golden_queries: int = 200
    """Most queries kept in the bundle with their answers; every server must answer them."""
    golden_k: int = 10
    """Answers a golden query."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """How the item vectors are searched."""
    tensorrt: TensorRTConfig = field(default_factory=TensorRTConfig)
    """Graphs of the query tower for TensorRT."""
    filters: list[str] = field(default_factory=list)
    """Columns of data.display that a request may filter items by: strings, integers or booleans,
    or lists of them."""
    sign_with: str | None = None
    """PEM file of the ed25519 private key that signs the bundle; none, for no signature."""
    prune_vocab: bool = False
    """Leave out rows of tables whose ids cannot occur: no item has them, or training and the log
    never did."""

    def validate(self, widths: Sequence[int]) -> None:
        """Refuse a gate that cannot close, and an index that cannot be.

        Args:
            widths: that the model's vectors may be cut to, their own included.

        Raises:
            UserError: naming the key.
        """
        self.index.validate(widths)
        self.tensorrt.validate()
        if len(set(self.filters)) < len(self.filters):
            raise UserError(f"export.filters must differ from each other, got {self.filters}")
        if self.tolerance <= 0:
            raise UserError(f"export.tolerance must be > 0, got {self.tolerance}")
        for name in ("golden_queries", "golden_k"):
            if getattr(self, name) < 1:
                raise UserError(f"export.{name} must be >= 1, got {getattr(self, name)}")
