// AVX-512 with BF16 and VBMI2 (Zen 4 and later, Sapphire Rapids and later): bf16 is multiplied as it is.
#include "spmm24.h"

#include <immintrin.h>

namespace {
#include "driver.h"

struct Bf16 {
    using Value = uint16_t;
    using X = uint16_t;
    using Weights = __m512i;  // 8 rows x 4 columns
    using Inputs = __m512i;
    using Sums = __m512;  // 8 rows x (columns 0 and 1, columns 2 and 3)
    static constexpr int ROWS = 8, UNITS = 4, MAX_TOKENS = 6;
    static constexpr int STRIP = 4096, TOKEN_BLOCK = 512, PREFETCH = 1024;

    static INLINE Sums zero() { return _mm512_setzero_ps(); }
    static INLINE Weights expand(const uint16_t* values, const uint8_t* masks) {
        uint32_t mask;
        memcpy(&mask, masks, 4);
        // Not the form with a memory operand, which is microcoded on Zen 4.
        return _mm512_maskz_expand_epi16(mask, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values)));
    }
    static INLINE Inputs broadcast(const uint16_t* x) {
        int64_t four;
        memcpy(&four, x, 8);
        return _mm512_set1_epi64(four);
    }
    static INLINE Sums multiply_add(Sums sums, Weights w, Inputs x) {
        return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)x);
    }
    static INLINE void reduce(Sums sums, float* out) {
        sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xB1));
        _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, sums)));
    }
};
}  // namespace

int spmm24_avx512_bf16(const Problem& p, Dtype dtype) {
    return dtype == BFLOAT16 ? spmm24<Bf16>(p) : spmm24_avx512(p, dtype);
}
