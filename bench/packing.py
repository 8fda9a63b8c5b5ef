"""How fast weights are packed, unpacked and brought into a backend's layout.

    python bench/packing.py [--dtype bfloat16] [--device cpu] [--rounds 7]

GB/s count the bytes of the dense weight; the time for 7B is that of all linear layers of Llama-2-7B. Each step is
checked to be exact before it is timed.
"""

import argparse

import torch
from record import record

from sparsekit.backends import resolve
from sparsekit.benchmarking import compare, get_shapes, measure_ceilings, random24
from sparsekit.doctor import parse_dtype
from sparsekit.formats import FORMATS
from sparsekit.report import Report

SHAPE = (11008, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    dtype, device = parse_dtype(options.dtype), torch.device(options.device)
    assert dtype is not None
    w_NK = random24(*SHAPE, dtype, device)
    semi24 = FORMATS.get("semi24")
    packed = semi24.pack(w_NK)
    backend, _ = resolve("auto", packed.spec, device)
    prepared = backend.prepare(packed)
    assert torch.equal(semi24.unpack(packed), w_NK), "packing is not exact"
    assert torch.equal(backend.to_dense(packed.spec, prepared), w_NK), f"{backend.name} is not exact"
    timings = compare(
        {
            "count violations": lambda: semi24.count_violations(w_NK),
            "pack": lambda: semi24.pack(w_NK),
            f"prepare ({backend.name})": lambda: backend.prepare(packed),
            f"restore ({backend.name})": lambda: backend.restore(packed.spec, prepared),
            "unpack": lambda: semi24.unpack(packed),
        },
        rounds=options.rounds,
        max_seconds=60,
        device=device,
    )
    all_bytes = sum(shape.count * shape.nbytes(dtype) for shape in get_shapes("llama-2-7b"))
    ceiling = measure_ceilings(device, (dtype,)).read_gb_s
    rows = []
    for step, timing in timings.timings.items():
        gb_s = w_NK.nbytes / 1e9 / timing.median
        rows.append(
            {
                "step": step,
                "GB/s": gb_s,
                "of memory read": round(gb_s / ceiling, 3),
                "s for 7B": all_bytes / 1e9 / gb_s,
                **timing.to_dict(),
            }
        )
    title = f"Packing {SHAPE[0]}x{SHAPE[1]} {options.dtype} on {device}"
    Report(title, rows, {"memory read, GB/s": round(ceiling, 1)}).print()
    for row in rows:
        record("packing", {**row, "N": SHAPE[0], "K": SHAPE[1], "dtype": options.dtype, "device": str(device)})


if __name__ == "__main__":
    main()
