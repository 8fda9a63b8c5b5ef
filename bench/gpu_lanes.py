"""Is element i of an operand of inline assembly register i % 4 of lane i // 4 % 32 of warp i // 128?

The kernels that hold `mma.sp` rest on it: `inline_asm_elementwise(pack=4)` hands the assembly four neighbours at a
time, and says nothing about which thread has them. Here every thread writes down who it is.
"""

# What Triton compiles takes Triton's values, which have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl

# PTX: each of four registers gets 4 * thread + its own number.
WHO = tl.constexpr("mov.u32 $0, %tid.x; shl.b32 $0, $0, 2; add.u32 $1, $0, 1; add.u32 $2, $0, 2; add.u32 $3, $0, 3;")
NUM_WARPS = (1, 2, 4, 8, 16)


@triton.jit
def _who_kernel(source_ptr, loaded_ptr, computed_ptr, carried_ptr, steps, WARPS: tl.constexpr):
    """What the assembly sees of an operand that was loaded, that was computed, and that a loop carries."""
    i = tl.arange(0, 128 * WARPS)
    loaded = tl.load(source_ptr + i)
    who = tl.inline_asm_elementwise(WHO, "=&r,=&r,=&r,=&r,r,r,r,r", [loaded], dtype=tl.int32, is_pure=True, pack=4)
    tl.store(loaded_ptr + i, who)
    who = tl.inline_asm_elementwise(WHO, "=&r,=&r,=&r,=&r,r,r,r,r", [i * 3], dtype=tl.int32, is_pure=True, pack=4)
    tl.store(computed_ptr + i, who)
    carried = tl.zeros((128 * WARPS,), tl.int32)
    for step in range(steps):
        part = tl.load(source_ptr + step * 128 * WARPS + i)
        carried = tl.inline_asm_elementwise(
            WHO, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", [part, carried], dtype=tl.int32, is_pure=True, pack=4
        )
    tl.store(carried_ptr + i, carried)


def wrong_orders(device: torch.device) -> list[str]:
    """Return a description of each operand that the assembly got in another order; none if all is as assumed."""
    wrong = []
    for warps in NUM_WARPS:
        n = 128 * warps
        source = torch.zeros(4 * n, dtype=torch.int32, device=device)
        found = {name: torch.full_like(source[:n], -1) for name in ("loaded", "computed", "carried")}
        _who_kernel[(1,)](source, *found.values(), 4, WARPS=warps, num_warps=warps)
        for name, who in found.items():
            if not torch.equal(who.cpu(), torch.arange(n, dtype=torch.int32)):
                wrong.append(f"{name}, {warps} warps: {who[:12].tolist()} …")
    return wrong
