"""Packing one large weight: `pytest bench --benchmark-only`."""

import pytest
import torch

from sparsekit.backends import resolve
from sparsekit.benchmarking import random24
from sparsekit.formats import FORMATS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def weight(request):
    return random24(4096, 4096, request.param, DEVICE)


def _benchmark(benchmark, weight, call):
    def run():
        result = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    if benchmark.stats:
        benchmark.extra_info["GB/s"] = weight.nbytes / 1e9 / benchmark.stats.stats.median


def test_pack(benchmark, weight):
    _benchmark(benchmark, weight, lambda: FORMATS.get("semi24").pack(weight))


def test_unpack(benchmark, weight):
    packed = FORMATS.get("semi24").pack(weight)
    _benchmark(benchmark, weight, lambda: FORMATS.get("semi24").unpack(packed))


def test_prepare(benchmark, weight):
    packed = FORMATS.get("semi24").pack(weight)
    backend, _ = resolve("auto", packed.spec, DEVICE)
    benchmark.extra_info["backend"] = backend.name
    _benchmark(benchmark, weight, lambda: backend.prepare(packed))
