"""Write the inline-assembly wrappers that `wgmma_sp.cu` times: one function for each form and width of `wgmma`.

    python bench/probes/wgmma_forms.py > wgmma_forms.cuh

An accumulator of 64 x T floats is T/2 registers a thread, each a named operand of its own, so the text is generated.
"""

WIDTHS = (64, 128, 192, 256)
DTYPES = {"bf16": ("bf16", 16, ",0"), "fp8": ("e4m3", 32, "")}  # PTX type, dense K of one instruction, transposing


def wrapper(dtype: str, T: int, sparse: bool, registers: bool) -> str:
    """Return the CUDA function of one form; `registers` says that A comes from registers and not from shared memory."""
    ptx_type, dense_k, transpose = DTYPES[dtype]
    accumulators = T // 2
    operands = [f'"+f"(d[{i}])' for i in range(accumulators)]
    next_operand = accumulators
    inputs: list[str] = []

    def take(constraint: str, value: str) -> str:
        nonlocal next_operand
        inputs.append(f'"{constraint}"({value})')
        next_operand += 1
        return f"%{next_operand - 1}"

    a = "{" + ",".join(take("r", f"a[{i}]") for i in range(4)) + "}" if registers else take("l", "a_desc")
    b = take("l", "b_desc")
    metadata = f",{take('r', 'e')},0" if sparse else ""
    k = dense_k * 2 if sparse else dense_k
    opcode = f"wgmma.mma_async{'.sp' if sparse else ''}.sync.aligned.m64n{T}k{k}.f32.{ptx_type}.{ptx_type}"
    flags = transpose if registers else transpose * 2  # A in registers has no layout to transpose
    text = (
        "{.reg .pred p; setp.eq.u32 p, 0, 0; "
        + f"{opcode} {{{','.join(f'%{i}' for i in range(accumulators))}}},{a},{b}{metadata},p,1,1{flags};}}"
    )
    return (
        f"template <> struct Wgmma<{dtype.capitalize()}, {T}, {str(sparse).lower()}, {str(registers).lower()}> {{\n"
        f"  static constexpr int K = {k};\n"
        f"  __device__ static void run(float (&d)[{accumulators}], const uint32_t (&a)[4], uint64_t a_desc, "
        f"uint64_t b_desc, uint32_t e) {{\n"
        f'    asm volatile("{text}"\n      : {", ".join(operands)}\n      : {", ".join(inputs)});\n'
        "  }\n};\n"
    )


def main() -> None:
    print("#pragma once\n#include <cstdint>\nstruct Bf16 {};\nstruct Fp8 {};")
    print("template <class Dtype, int T, bool SPARSE, bool REGISTERS> struct Wgmma;")
    for dtype in DTYPES:
        for T in WIDTHS:
            for sparse in (False, True):
                for registers in (False, True):
                    print(wrapper(dtype, T, sparse, registers))


if __name__ == "__main__":
    main()
