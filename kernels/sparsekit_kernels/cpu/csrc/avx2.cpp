// AVX2 and FMA: fp32, and bf16 widened to fp32 on the way into registers.
#include "spmm24.h"

#include <immintrin.h>

namespace {
#include "driver.h"
#include "positions.h"

constexpr Positions<0, 4> positions;

template <class V>
struct Fp32Of {
    using Value = V;
    using X = float;
    using Weights = __m256;  // 2 rows x 4 columns
    using Inputs = __m256;
    using Sums = __m256;
    static constexpr int ROWS = 2, UNITS = 4, MAX_TOKENS = 3;
    static constexpr int STRIP = 512, TOKEN_BLOCK = 512, PREFETCH = 0;

    static INLINE Sums zero() { return _mm256_setzero_ps(); }
    static INLINE __m128 load(const float* values) { return _mm_loadu_ps(values); }
    static INLINE __m128 load(const uint16_t* values) {
        return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)values)), 16));
    }
    static INLINE Weights expand(const V* values, const uint8_t* masks) {
        const __m256i from = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)positions.from[*masks]));
        return _mm256_permutevar8x32_ps(_mm256_zextps128_ps256(load(values)), from);
    }
    static INLINE Inputs broadcast(const float* x) { return _mm256_broadcast_ps((const __m128*)x); }
    static INLINE Sums multiply_add(Sums sums, Weights w, Inputs x) { return _mm256_fmadd_ps(w, x, sums); }
    static INLINE void reduce(Sums sums, float* out) {
        sums = _mm256_add_ps(sums, _mm256_permute_ps(sums, 0xB1));
        sums = _mm256_add_ps(sums, _mm256_permute_ps(sums, 0x4E));
        out[0] = _mm256_cvtss_f32(sums);
        out[1] = _mm_cvtss_f32(_mm256_extractf128_ps(sums, 1));
    }
};
}  // namespace

int spmm24_avx2(const Problem& p, Dtype dtype) {
    return dtype == BFLOAT16 ? spmm24<Fp32Of<uint16_t>>(p) : spmm24<Fp32Of<float>>(p);
}
