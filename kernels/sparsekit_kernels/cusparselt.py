"""y = x @ W.T + bias through NVIDIA's cuSPARSELt, as torch ships it: the 2:4 tensor cores, for many tokens.

W [N, K] is compressed once by cuSPARSELt into one opaque tensor of 9/16 of the dense bytes. Its layout differs between
GPU generations, so it lives in memory only. Compared with torch's own 2:4 tensor, the result is row-major [M, N] as the
library writes it (no transposition afterwards), and the algorithm is searched once per shape instead of left at the
default. torch still builds a cuSPARSELt plan on each call: that is host time a CUDA graph hides.

Needs fp16 or bf16, N and K multiples of 16; any M (padded to a multiple of 8 inside).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit_kernels.layout24 import compress24, decompress24
from sparsekit_kernels.target import why_not_cuda

DTYPES = (torch.float16, torch.bfloat16)
WEIGHT_MULTIPLE = 16  # N and K; torch.sparse.SparseSemiStructuredTensorCUSPARSELT has the same limits
TOKEN_MULTIPLE = 8
RESTORE_COLUMNS = 1024  # of the weight at a time

Algorithm = tuple[int, int, int]  # alg_id, split_k, split_k_mode, as torch._cslt_sparse_mm takes them
DEFAULT_ALGORITHM: Algorithm = (0, 1, -1)
_algorithms: dict[tuple[object, ...], Algorithm] = {}


def why_not(dtype: torch.dtype, N: int, K: int, device: torch.device | str) -> str | None:
    """Return None if cuSPARSELt can run a weight [N, K] of `dtype` on `device`, else the reason."""
    if dtype not in DTYPES:
        return f"runs fp16 and bf16, the weight is {dtype}"
    if N == 0 or K == 0 or N % WEIGHT_MULTIPLE or K % WEIGHT_MULTIPLE:
        return f"needs N and K to be multiples of {WEIGHT_MULTIPLE}, the weight is [{N}, {K}]"
    reason = why_not_cuda(torch.device(device))
    if reason is None and not torch.backends.cusparselt.is_available():
        return "this build of torch comes without cuSPARSELt"
    return reason


def prepare(values: Tensor, meta: Tensor, K: int) -> tuple[Tensor]:
    """Return cuSPARSELt's compressed form of a canonical weight with K input features.

    Raises:
        RuntimeError: it cannot run this weight here; the message says why.
        ValueError: the weight holds infinities or NaN, which `restore` could not give back.
    """
    _require(values.dtype, values.shape[0], K, values.device)
    if not bool(values.isfinite().all()):
        raise ValueError("the weight holds infinities or NaN: cuSPARSELt's layout cannot give them back bit for bit")
    return (torch._cslt_compress(decompress24(values, meta, K)),)


def restore(packed: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return the canonical (values, meta) of a prepared weight, bit for bit: the inverse of `prepare`.

    The layout is opaque, so the weight is read by multiplying it with the identity, which is exact: each sum has one
    term. Zeros come back as +0.0, and the canonical form is a function of the dense weight.
    """
    dense = packed.new_empty(N, K)
    for start in range(0, K, RESTORE_COLUMNS):
        columns = torch.arange(start, min(start + RESTORE_COLUMNS, K), device=packed.device)
        one_hot = packed.new_zeros(columns.numel(), K)
        one_hot[columns - start, columns] = 1
        dense[:, columns] = _multiply(packed, one_hot, None, DEFAULT_ALGORITHM).T
    return compress24(dense)


def spmm24(x: Tensor, packed: Tensor, N: int, K: int, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias for a prepared weight [N, K]; x is [..., K], the result [..., N], contiguous.

    The first call with a new shape measures the algorithms, which stops the GPU for some milliseconds; while a CUDA
    graph is captured it takes the default one instead. Call once before capturing.
    """
    if x.shape[-1] != K or x.dtype != packed.dtype:
        raise ValueError(f"x has {x.shape[-1]} features of {x.dtype}, W has {K} of {packed.dtype}")
    _require(x.dtype, N, K, x.device)
    M = x.numel() // K
    if M == 0:
        return x.new_empty(*x.shape[:-1], N)
    x2d = x.reshape(M, K)
    padded = -M % TOKEN_MULTIPLE
    x2d = F.pad(x2d, (0, 0, 0, padded)) if padded else x2d.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = _multiply(packed, x2d, bias, _algorithm(packed, x2d, N, bias))
    return y[:M].view(*x.shape[:-1], N)


def _require(dtype: torch.dtype, N: int, K: int, device: torch.device) -> None:
    reason = why_not(dtype, N, K, device)
    if reason is not None:
        raise RuntimeError(f"cuSPARSELt cannot run here: {reason}")


def _multiply(packed: Tensor, x_MK: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
    """x @ W.T + bias; cuSPARSELt computes W @ x.T and writes it column-major, which is y [M, N] row-major."""
    alg_id, split_k, split_k_mode = algorithm
    return torch._cslt_sparse_mm(
        packed, x_MK.t(), bias, transpose_result=True, alg_id=alg_id, split_k=split_k, split_k_mode=split_k_mode
    )


def _algorithm(packed: Tensor, x_MK: Tensor, N: int, bias: Tensor | None) -> Algorithm:
    """The fastest algorithm for this shape, M rounded up to a power of two; searched once per process."""
    M, K = x_MK.shape
    bucket = 1 << (M - 1).bit_length()
    key = (N, K, bucket, x_MK.dtype, x_MK.device, bias is not None)
    if key not in _algorithms:
        if x_MK.is_cuda and torch.cuda.is_current_stream_capturing():
            return DEFAULT_ALGORITHM
        _algorithms[key] = _search(packed, x_MK, bias)
    return _algorithms[key]


def _search(packed: Tensor, x_MK: Tensor, bias: Tensor | None) -> Algorithm:
    """Let cuSPARSELt time its algorithms on these very tensors."""
    library = getattr(torch._C, "_cusparselt", None)
    if library is not None and hasattr(library, "mm_search"):
        alg_id, split_k, split_k_mode, _ = library.mm_search(packed, x_MK.t(), bias, None, None, True)
        return alg_id, split_k, split_k_mode
    return torch._cslt_sparse_mm_search(packed, x_MK.t(), bias, transpose_result=True), *DEFAULT_ALGORITHM[1:]
