// Any machine: x stays fp32, weights become fp32, in the compiler's vector types.
#include "quantised.h"

namespace {
#include "quantised_driver.h"
#include "positions.h"

constexpr Positions<0, 4> positions;
typedef float Float8 __attribute__((vector_size(32)));

struct Floats {
    using X = float;
    using Weights = Float8;  // 2 rows x 4 columns
    using Inputs = Float8;
    using Sums = Float8;
    using Totals = Float8;
    static constexpr int ROWS = 2, UNITS = 2, PLANES = 1, MAX_TOKENS = 2;
    static constexpr int STRIP = 512, TOKEN_BLOCK = 512, PREFETCH = 0;

    template <int OFFSET>
    static int quantise(const float* x, X (*planes)[SCALED_GROUPS * 4], Step* steps) {
        memcpy(planes[0], x, sizeof(planes[0]));
        steps[0] = {1.0f, 0};
        return 0;  // NaN, infinities and outliers need no care
    }

    static INLINE Sums start(int32_t) { return Float8{}; }
    template <int BITS>
    static INLINE Weights expand(const uint8_t* values, const uint8_t* masks, int64_t row) {
        float kept[5] = {};
        for (int i = 0; i < 4; i++) {
            kept[i] = BITS == 8 ? values[row * 2 + i] - 128 : (values[row % 16 * 2 + i] >> row / 16 * 4 & 15) - 8;
        }
        const uint8_t* from = positions.from[masks[row / 2]];
        return Float8{kept[from[0]], kept[from[1]], kept[from[2]], kept[from[3]],
                      kept[from[4]], kept[from[5]], kept[from[6]], kept[from[7]]};
    }
    static INLINE Inputs broadcast(const X* x) { return Float8{x[0], x[1], x[2], x[3], x[0], x[1], x[2], x[3]}; }
    static INLINE Sums multiply_add(Sums sums, Weights w, Inputs x) { return sums + w * x; }
    static INLINE Totals scaled(Sums sums, float) { return sums; }
    static INLINE Totals add_scaled(Totals total, Sums sums, float) { return total + sums; }
    static INLINE Totals row_scales(const uint16_t* scales) {
        const float a = widen(scales[0]), b = widen(scales[1]);
        return Float8{a, a, a, a, b, b, b, b};
    }
    static INLINE void reduce(Totals total, float* out) {
        out[0] = (total[0] + total[1]) + (total[2] + total[3]);
        out[1] = (total[4] + total[5]) + (total[6] + total[7]);
    }
};
}  // namespace

int spmm24_quantised_portable(const Problem& p, Dtype dtype, int bits) {
    if (bits == 8) {
        return dtype == BFLOAT16 ? spmm24_quantised<Floats, 8, uint16_t>(p) : spmm24_quantised<Floats, 8, float>(p);
    }
    return dtype == BFLOAT16 ? spmm24_quantised<Floats, 4, uint16_t>(p) : spmm24_quantised<Floats, 4, float>(p);
}
