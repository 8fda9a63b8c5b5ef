"""y = x @ W.T + bias through NVIDIA's cuSPARSELt, as torch ships it: the 2:4 tensor cores, for many tokens.

W [N, K] is compressed once by cuSPARSELt into one opaque tensor of 9/16 of the dense bytes. Its layout differs between
GPU generations, so it lives in memory only. Compared with torch's own 2:4 tensor, the result is row-major [M, N] as the
library writes it (no transposition afterwards), and the algorithm is searched once for each (N, K, bucket of M, dtype,
bias or none) instead of left at the default. What the search found is kept on disk by `tuning`, under the GPU's name
and the versions of torch, cuSPARSELt and this package: its numbers mean nothing to another version.

Plans. Each call of torch's `_cslt_sparse_mm` makes four matrix descriptors, a matmul descriptor, an algorithm selection
and a plan, and destroys them when it returns: 50 to 200 us of host time (pytorch#179642). There is no cache of plans to
use: the calls that are spelled out in the error messages of libtorch_cuda.so are `cusparseLtMatmulPlanInit(&handle,
&plan, &matmul, &alg_sel)` and `cusparseLtMatmulPlanDestroy(&plan)`, on variables of that one call, in the wheels of
torch 2.11.0 and 2.13.0 alike; the caches proposed in pytorch#137218 and #179642 were closed. What torch leaves us is
to capture the call in a CUDA graph, which replays the kernels without any of it; eager calls hide it only while the GPU
has that much work queued. Of what costs more we use nothing: no `alpha` (a tensor of one is read back by the host) and
no `out_dtype`.

Needs fp16 or bf16, N and K multiples of 16; any M (padded to a multiple of 8 inside).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit_kernels import tuning
from sparsekit_kernels.layout24 import compress24, decompress24
from sparsekit_kernels.target import why_not_cuda

DTYPES = (torch.float16, torch.bfloat16)
WEIGHT_MULTIPLE = 16  # N and K; torch.sparse.SparseSemiStructuredTensorCUSPARSELT has the same limits
TOKEN_MULTIPLE = 8
RESTORE_COLUMNS = 1024  # of the weight at a time

KERNEL = "cusparselt"
SEARCH = {False: "cusparselt-search", True: "cusparselt-search-bias"}  # with a bias, other algorithms win

Algorithm = tuple[int, int, int]  # as torch._cslt_sparse_mm takes them:
CONFIG = ("alg_id", "split_k", "split_k_mode")
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

    The first call with a new shape searches the algorithms if no earlier process has, which stops the GPU for some
    milliseconds. Where it must not (see `tuning.may_measure`), as while a CUDA graph is captured, the default one runs:
    call once before capturing.
    """
    if x.shape[-1] != K or x.dtype != packed.dtype:
        raise ValueError(f"x has {x.shape[-1]} features of {x.dtype}, W has {K} of {packed.dtype}")
    _require(x.dtype, N, K, x.device)
    M = x.numel() // K
    if M == 0:
        return x.new_empty(*x.shape[:-1], N)
    x2d = x.reshape(M, K)
    padded = -M % TOKEN_MULTIPLE
    x2d = F.pad(x2d, (0, 0, 0, padded)) if padded else _aligned(x2d)
    bias = None if bias is None else _aligned(bias.to(x.dtype))
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


def blob_bytes(N: int, K: int, dtype: torch.dtype) -> int:
    """Return what a second, compressed copy of a weight for cuSPARSELt takes: 9/16 of the dense bytes."""
    return N * K * dtype.itemsize * 9 // 16


def _algorithm(packed: Tensor, x_MK: Tensor, N: int, bias: Tensor | None) -> Algorithm:
    """The fastest algorithm for this shape: remembered, read from disk, or searched."""
    M, K = x_MK.shape
    shape = (N, K, tuning.bucket(M), x_MK.dtype, x_MK.device, bias is not None)
    algorithm = _algorithms.get(shape)
    if algorithm is not None:
        return algorithm
    key = tuning.key(SEARCH[bias is not None], x_MK.dtype, N, K, M)
    found = tuning.lookup(key, x_MK.device)
    if found is not None:
        algorithm = _from_config(found[0].get(KERNEL))
    if algorithm is None:
        if tuning.may_measure(x_MK.device):
            algorithm = _search(packed, x_MK, bias)
            tuning.store(key, {KERNEL: tuning.Measured(None, dict(zip(CONFIG, algorithm, strict=True)))}, x_MK.device)
        else:
            algorithm = DEFAULT_ALGORITHM
            if tuning.may_ever_measure(x_MK.device):
                return algorithm  # for now
    _algorithms[shape] = algorithm
    return algorithm


def _from_config(entry: tuning.Measured | None) -> Algorithm | None:
    """The algorithm in a row of the cache; None where it holds no such."""
    numbers = [entry.config.get(name) for name in CONFIG] if entry is not None else []
    match numbers:
        case [int(alg_id), int(split_k), int(split_k_mode)]:
            return alg_id, split_k, split_k_mode
    return None


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at a multiple of the 16 bytes that the plan promises cuSPARSELt."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _search(packed: Tensor, x_MK: Tensor, bias: Tensor | None) -> Algorithm:
    """Let cuSPARSELt time its algorithms on these very tensors."""
    library = getattr(torch._C, "_cusparselt", None)
    if library is not None and hasattr(library, "mm_search"):
        alg_id, split_k, split_k_mode, _ = library.mm_search(packed, x_MK.t(), bias, None, None, True)
        return alg_id, split_k, split_k_mode
    return torch._cslt_sparse_mm_search(packed, x_MK.t(), bias, transpose_result=True), *DEFAULT_ALGORITHM[1:]
