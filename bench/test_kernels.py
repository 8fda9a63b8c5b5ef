"""Linear layers of Llama-3-8B, dense and packed: `pytest bench --benchmark-only`."""

import gc

import pytest
import torch

from sparsekit.benchmarking import build_pair, get_shapes, rotate

SHAPES = {str(shape): shape for shape in get_shapes("llama-3-8b")}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16 if DEVICE == "cuda" else torch.float32]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, dtype):
    yield build_pair(SHAPES[request.param], dtype, DEVICE)
    gc.collect()


@pytest.mark.parametrize("side", ["dense", "sparse"])
@pytest.mark.parametrize("M", [1, 8, 64])
def test_linear(benchmark, pair, M, side):
    layers = pair[0] if side == "dense" else pair[1]
    x = torch.randn(M, layers[0].in_features, device=DEVICE).to(pair[1][0].spec.dtype)
    turn = rotate([lambda layer=layer: layer(x) for layer in layers])

    def run():
        turn()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    shape = f"{layers[0].out_features}x{layers[0].in_features}"
    benchmark.group = f"{shape} {x.dtype} M={M}"
    with torch.inference_mode():
        benchmark(run)
    seconds = benchmark.stats.stats.median if benchmark.stats else None
    bytes_read = pair[1][0].packed_bytes() if side == "sparse" else pair[1][0].dense_bytes()
    benchmark.extra_info |= {"backend": pair[1][0].backend if side == "sparse" else "torch"}
    benchmark.extra_info["GB/s"] = bytes_read / 1e9 / seconds if seconds else None
