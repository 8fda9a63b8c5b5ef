// Any machine: the compiler's vector types, which become whatever the machine has at least.
#include "spmm24.h"

namespace {
#include "driver.h"
#include "positions.h"

constexpr Positions<0, 4> positions;
typedef float Float8 __attribute__((vector_size(32)));

template <class V>
struct Fp32Of {
    using Value = V;
    using X = float;
    using Weights = Float8;  // 2 rows x 4 columns
    using Inputs = Float8;
    using Sums = Float8;
    static constexpr int ROWS = 2, UNITS = 2, MAX_TOKENS = 2;
    static constexpr int STRIP = 512, TOKEN_BLOCK = 512, PREFETCH = 0;

    static INLINE Sums zero() { return Float8{}; }
    static INLINE Weights expand(const V* values, const uint8_t* masks) {
        const float kept[5] = {widen(values[0]), widen(values[1]), widen(values[2]), widen(values[3]), 0.0f};
        const uint8_t* from = positions.from[*masks];
        return Float8{kept[from[0]], kept[from[1]], kept[from[2]], kept[from[3]],
                      kept[from[4]], kept[from[5]], kept[from[6]], kept[from[7]]};
    }
    static INLINE Inputs broadcast(const float* x) { return Float8{x[0], x[1], x[2], x[3], x[0], x[1], x[2], x[3]}; }
    static INLINE Sums multiply_add(Sums sums, Weights w, Inputs x) { return sums + w * x; }
    static INLINE void reduce(Sums sums, float* out) {
        out[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        out[1] = (sums[4] + sums[5]) + (sums[6] + sums[7]);
    }
};
}  // namespace

int spmm24_portable(const Problem& p, Dtype dtype) {
    return dtype == BFLOAT16 ? spmm24<Fp32Of<uint16_t>>(p) : spmm24<Fp32Of<float>>(p);
}
