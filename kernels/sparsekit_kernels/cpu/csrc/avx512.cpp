// AVX-512 (F, BW, DQ, VL): fp32, and bf16 widened to fp32 on the way into registers.
#include "spmm24.h"

#include <immintrin.h>

namespace {
#include "driver.h"

template <class V>
struct Fp32Of {
    using Value = V;
    using X = float;
    using Weights = __m512;  // 4 rows x 4 columns
    using Inputs = __m512;
    using Sums = __m512;
    static constexpr int ROWS = 4, UNITS = 4, MAX_TOKENS = 6;
    static constexpr int STRIP = 2048, TOKEN_BLOCK = 512, PREFETCH = 1024;

    static INLINE Sums zero() { return _mm512_setzero_ps(); }
    static INLINE __m256 load(const float* values) { return _mm256_loadu_ps(values); }
    static INLINE __m256 load(const uint16_t* values) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)values)), 16));
    }
    static INLINE Weights expand(const V* values, const uint8_t* masks) {
        uint16_t mask;
        memcpy(&mask, masks, 2);
        return _mm512_maskz_expand_ps(mask, _mm512_castps256_ps512(load(values)));
    }
    static INLINE Inputs broadcast(const float* x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
    static INLINE Sums multiply_add(Sums sums, Weights w, Inputs x) { return _mm512_fmadd_ps(w, x, sums); }
    static INLINE void reduce(Sums sums, float* out) {
        sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xB1));
        sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4E));
        _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sums)));
    }
};
}  // namespace

int spmm24_avx512(const Problem& p, Dtype dtype) {
    return dtype == BFLOAT16 ? spmm24<Fp32Of<uint16_t>>(p) : spmm24<Fp32Of<float>>(p);
}
