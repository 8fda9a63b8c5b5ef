// The C functions that Python calls, and the choice of instruction set.
#include "quantised.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
struct Level {
    Spmm24 spmm24;
    Spmm24Quantised quantised;
};
const Level levels[] = {
    {spmm24_portable, spmm24_quantised_portable},
#if defined(__x86_64__)
    {spmm24_avx2, spmm24_quantised_avx2},
    {spmm24_avx512, spmm24_quantised_avx2},
    {spmm24_avx512, spmm24_quantised_avx512_vnni},
    {spmm24_avx512_bf16, spmm24_quantised_avx512_vnni},
#endif
};
}  // namespace

// The highest of 0 portable, 1 avx2, 2 avx512, 3 avx512_vnni, 4 avx512_bf16 that this processor and its operating system
// can run.
EXPORT int64_t sparsekit_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl")) {
        return 1;
    }
    if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vbmi2")) return 2;
    return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
#else
    return 0;
#endif
}

EXPORT int64_t sparsekit_spmm24(int64_t isa, int64_t dtype, const void* x, int64_t stride_xm, const void* values,
                                const void* masks, const void* bias, void* y, int64_t M, int64_t N, int64_t K,
                                ParallelFor parallel_for) {
    const Problem p{x, stride_xm, values, (const uint32_t*)masks, bias, y, M, N, K, parallel_for, nullptr};
    return levels[isa].spmm24(p, (Dtype)dtype);
}

EXPORT int64_t sparsekit_spmm24_quantised(int64_t isa, int64_t dtype, const void* x, int64_t stride_xm, const void* values,
                                          const void* masks, const void* bias, void* y, int64_t M, int64_t N, int64_t K,
                                          ParallelFor parallel_for, int64_t bits, const void* scales) {
    const Problem p{x, stride_xm, values, (const uint32_t*)masks, bias, y, M, N, K, parallel_for, scales};
    return levels[isa].quantised(p, (Dtype)dtype, (int)bits);
}
