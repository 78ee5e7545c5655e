"""The sparse graph that operators pass around, and the checks of arguments that go with it."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nefkern.ops import checks
from nefkern.reference import csr

if TYPE_CHECKING:
    import scipy.sparse

_MAX_NODES = 2**31 - 1  # columns are int32


@dataclasses.dataclass(frozen=True, eq=False)
class CSRGraph:
    """A square sparse matrix in compressed rows; an immutable value.

    Attributes:
        row_offsets: int64 [num_nodes + 1]; the entries of row i are ``row_offsets[i]`` up to
            ``row_offsets[i + 1]``.
        columns: int32 [nnz], strictly ascending inside a row.
        values: float32 or float64 [nnz]; they may carry a gradient, which the operators that take
            a graph pass on. Nothing is kept or computed for it otherwise.
        num_nodes: the number N of rows and columns.
        symmetric: a promise that the matrix equals its transpose, which saves the transposition
            (and, in the objective, the product) in backward passes. :meth:`validate` checks it.

    Construction checks shapes, dtypes and devices, which costs nothing; :meth:`validate` also reads
    the content.

    Graphs are equal when all five attributes are, dtypes and devices included: ``==`` reads the
    content (and waits for a GPU), so they cannot be hashed. ``torch.save`` and ``torch.load`` take
    them, with ``weights_only=True`` once ``nefkern.ops`` is imported.

    Raises:
        TypeError, ValueError: an attribute is not as described.
    """

    row_offsets: Tensor
    columns: Tensor
    values: Tensor
    num_nodes: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        for name in ("row_offsets", "columns", "values"):
            checks.tensor(name, getattr(self, name))
        # The dataclass is frozen for everybody else.
        object.__setattr__(self, "num_nodes", checks.integer("num_nodes", self.num_nodes, 0))
        object.__setattr__(self, "symmetric", checks.flag("symmetric", self.symmetric))
        if self.row_offsets.dtype != torch.int64:
            raise TypeError(f"row_offsets: expected int64, got {self.row_offsets.dtype}")
        if self.columns.dtype != torch.int32:
            raise TypeError(f"columns: expected int32, got {self.columns.dtype}")
        if self.values.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"values: expected float32 or float64, got {self.values.dtype}")
        if self.row_offsets.ndim != 1 or self.row_offsets.shape[0] != self.num_nodes + 1:
            raise ValueError(
                f"row_offsets: expected shape [{self.num_nodes + 1}] (num_nodes + 1), "
                f"got {list(self.row_offsets.shape)}"
            )
        if self.columns.ndim != 1 or self.values.ndim != 1:
            raise ValueError(
                "columns and values: expected one dimension each, "
                f"got {self.columns.ndim} and {self.values.ndim}"
            )
        if self.columns.shape != self.values.shape:
            raise ValueError(
                f"values: expected {self.columns.shape[0]} entries, as columns has, "
                f"got {self.values.shape[0]}"
            )
        if not self.row_offsets.device == self.columns.device == self.values.device:
            raise ValueError(
                "expected row_offsets, columns and values on one device, got "
                f"{self.row_offsets.device}, {self.columns.device} and {self.values.device}"
            )

    def __setstate__(self, state: dict) -> None:
        """A graph from a file is checked like any other."""
        self.__dict__.update(state)
        self.__post_init__()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CSRGraph):
            return NotImplemented
        if (self.num_nodes, self.symmetric) != (other.num_nodes, other.symmetric):
            return False
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in pairs
        )

    __hash__ = None

    @property
    def nnz(self) -> int:
        """The number of stored entries."""
        return self.columns.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row_offsets, columns, values)."""
        return self.row_offsets, self.columns, self.values

    def __repr__(self) -> str:
        return (
            f"CSRGraph(num_nodes={self.num_nodes}, nnz={self.nnz}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, symmetric={self.symmetric})"
        )

    def to(self, device: torch.device | str) -> CSRGraph:
        """The same graph on ``device``."""
        row_offsets, columns, values = (tensor.to(device) for tensor in self.tensors())
        return CSRGraph(row_offsets, columns, values, self.num_nodes, self.symmetric)

    def transpose(self) -> CSRGraph:
        """The transposed graph: itself if symmetric."""
        if self.symmetric:
            return self
        return CSRGraph(*csr.transpose(*self.tensors()), num_nodes=self.num_nodes, symmetric=False)

    def to_torch(self) -> Tensor:
        """A ``torch.sparse_csr`` tensor [N, N] with int64 indices; shares ``values``."""
        n = self.num_nodes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.row_offsets, self.columns.long(), self.values, (n, n), check_invariants=False
            )

    def to_scipy(self) -> scipy.sparse.csr_array:
        """A ``scipy.sparse.csr_array`` [N, N] on the CPU."""
        import scipy.sparse

        offsets, columns, values = (tensor.detach().cpu().numpy() for tensor in self.tensors())
        return scipy.sparse.csr_array((values, columns, offsets), shape=(self.num_nodes,) * 2)

    def to_dense(self) -> Tensor:
        """The matrix [N, N]; for small graphs and tests."""
        dense = self.values.new_zeros(self.num_nodes, self.num_nodes)
        rows = csr.row_of_entry(self.row_offsets, self.nnz)
        dense[rows, self.columns.long()] = self.values
        return dense

    def validate(self) -> CSRGraph:
        """Check the content against the class's description, and return the graph itself.

        Raises:
            ValueError: naming the attribute that breaks its promise.
        """
        steps = self.row_offsets.diff()
        if self.row_offsets[0] != 0 or self.row_offsets[-1] != self.nnz or bool((steps < 0).any()):
            raise ValueError(f"row_offsets: expected to ascend from 0 to nnz = {self.nnz}")
        if self.values.shape != self.columns.shape:
            raise ValueError(f"values: expected {self.nnz} entries, got {self.values.shape[0]}")
        if self.nnz and not (self.columns.min() >= 0 and self.columns.max() < self.num_nodes):
            raise ValueError(f"columns: expected 0 to {self.num_nodes - 1}")
        place = csr.row_of_entry(self.row_offsets, self.nnz) * self.num_nodes + self.columns
        if bool((place.diff() <= 0).any()):
            raise ValueError("columns: expected strictly ascending columns inside every row")
        if self.symmetric and not _equals_transpose(self):
            raise ValueError("symmetric: True, but the matrix differs from its transpose")
        return self

    @classmethod
    def from_torch(cls, matrix: Tensor, *, symmetric: bool | None = None) -> CSRGraph:
        """A graph from a square ``torch`` matrix: sparse CSR, sparse COO or dense.

        Args:
            matrix: [N, N]; half precision becomes float32.
            symmetric: the promise to record; None looks at the content.

        Raises:
            TypeError: not a tensor, or complex.
            ValueError: not square.
        """
        if not isinstance(matrix, Tensor):
            raise TypeError(f"matrix: expected a torch.Tensor, got {type(matrix).__name__}")
        _check_square("matrix", matrix.shape)
        if matrix.is_complex():
            raise TypeError(f"matrix: expected real values, got {matrix.dtype}")
        if matrix.layout == torch.strided:
            matrix = matrix.to_sparse()
        if matrix.layout != torch.sparse_coo:  # COO merges duplicates and sorts
            matrix = matrix.to_sparse_coo()
        matrix = matrix.detach().coalesce()
        rows, columns = matrix.indices()
        dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        # A copy: a view of a sparse tensor is something that torch.compile cannot take in.
        values = matrix.values().clone().to(dtype)
        n = matrix.shape[0]
        graph = cls(csr.compress(rows, n), columns.to(torch.int32), values, n)
        return _with_symmetry(graph, symmetric)

    @classmethod
    def from_scipy(cls, matrix, *, symmetric: bool | None = None) -> CSRGraph:
        """A graph from any square scipy sparse matrix or array, on the CPU.

        Args:
            matrix: [N, N]; integers and half precision become float32; duplicates are summed.
            symmetric: the promise to record; None looks at the content.

        Raises:
            TypeError: not a sparse matrix, or complex.
            ValueError: not square.
        """
        if not hasattr(matrix, "tocsr"):
            kind = type(matrix).__name__
            raise TypeError(f"matrix: expected a scipy sparse matrix or array, got {kind}")
        _check_square("matrix", matrix.shape)
        if matrix.dtype.kind not in "fiub":
            raise TypeError(f"matrix: expected real values, got {matrix.dtype}")
        rows = matrix.tocsr().copy()
        rows.sum_duplicates()  # sorts the columns too
        dtype = torch.float64 if rows.dtype == "float64" else torch.float32
        graph = cls(
            torch.from_numpy(rows.indptr).long(),
            torch.from_numpy(rows.indices).to(torch.int32),
            torch.from_numpy(rows.data).to(dtype),
            rows.shape[0],
        )
        return _with_symmetry(graph, symmetric)


torch.utils._pytree.register_dataclass(
    CSRGraph, field_names=["row_offsets", "columns", "values", "num_nodes", "symmetric"]
)
torch.serialization.add_safe_globals([CSRGraph])


def _check_square(name: str, shape) -> None:
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] > _MAX_NODES:
        raise ValueError(f"{name}: expected shape [N, N] with N < 2^31, got {list(shape)}")


def _equals_transpose(graph: CSRGraph) -> bool:
    row_offsets, columns, values = csr.transpose(*graph.tensors())
    if not (torch.equal(graph.row_offsets, row_offsets) and torch.equal(graph.columns, columns)):
        return False
    both_nan = graph.values.isnan() & values.isnan()  # of a weight that both directions have
    return bool(((graph.values == values) | both_nan).all())


def _with_symmetry(graph: CSRGraph, symmetric: bool | None) -> CSRGraph:
    known = _equals_transpose(graph) if symmetric is None else symmetric
    return dataclasses.replace(graph, symmetric=known)


def check_graph(name: str, graph: CSRGraph) -> None:
    """Raise unless ``graph`` is a CSRGraph."""
    if not isinstance(graph, CSRGraph):
        raise TypeError(f"{name}: expected a CSRGraph, got {type(graph).__name__}")


def check_dense_operand(name: str, x: Tensor, graph: CSRGraph) -> None:
    """Raise unless ``x`` is a floating-point matrix [N, K] beside ``graph``."""
    checks.tensor(name, x)
    if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.ndim != 2 or x.shape[0] != graph.num_nodes:
        raise ValueError(
            f"{name}: expected shape [{graph.num_nodes}, K] (the graph's nodes), "
            f"got {list(x.shape)}"
        )
    if x.device != graph.device:
        raise ValueError(f"{name}: expected device {graph.device} (the graph's), got {x.device}")
