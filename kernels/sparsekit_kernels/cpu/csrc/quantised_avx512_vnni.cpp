// AVX-512 with VNNI and VBMI2 (Ice Lake, Zen 4 and later): bytes are expanded and multiplied as they are.
#include "quantised.h"

#include <immintrin.h>

namespace {
#include "quantised_driver.h"

// Not __m512i, which the compiler copies on every use: the instruction wants 32-bit elements.
typedef int32_t Ints __attribute__((vector_size(64)));

template <int NUM_PLANES>
struct Vnni {
    using X = int8_t;
    using Weights = __m512i;  // 16 rows x 4 columns
    using Inputs = __m512i;
    using Sums = Ints;
    using Totals = __m512;  // 16 rows
    static constexpr int ROWS = 16, UNITS = 2, PLANES = NUM_PLANES, MAX_TOKENS = 12 / NUM_PLANES;
    static constexpr int STRIP = 4096, TOKEN_BLOCK = 512, PREFETCH = 2048;

    // Returns what it found; NaN and infinities count as zero here.
    template <int OFFSET>
    static int quantise(const float* x, X (*planes)[SCALED_GROUPS * 4], Step* steps) {
        constexpr int REGISTERS = SCALED_GROUPS * 4 / 16;
        const __m512i infinity = _mm512_set1_epi32(0x7F800000);
        __m512i bits[REGISTERS], top = _mm512_setzero_si512();
        bool is_finite = true;
        UNROLL for (int i = 0; i < REGISTERS; i++) {
            bits[i] = _mm512_loadu_si512(x + i * 16);
            const __m512i magnitude = _mm512_and_si512(bits[i], _mm512_set1_epi32(0x7FFFFFFF));
            const __mmask16 finite = _mm512_cmplt_epi32_mask(magnitude, infinity);
            is_finite &= finite == 0xFFFF;
            bits[i] = _mm512_maskz_mov_epi32(finite, bits[i]);
            top = _mm512_mask_max_epi32(top, finite, top, magnitude);
        }
        const uint32_t highest = _mm512_reduce_max_epi32(top);
        const int exponent = step_exponent<NUM_PLANES * 8>(highest);
        const __m512 inverse = _mm512_set1_ps(power_of_two(-exponent));
        const __m512i limit = _mm512_set1_epi32(small_limit(highest)), sign = _mm512_set1_epi32(1 << 31);
        __m512i sums[NUM_PLANES] = {}, excess = _mm512_setzero_si512();  // four times the small minus the non-zero
        UNROLL for (int i = 0; i < REGISTERS; i++) {
            const __m512i magnitude = _mm512_andnot_si512(sign, bits[i]);
            const __mmask16 nonzero = _mm512_test_epi32_mask(magnitude, magnitude);
            const __mmask16 small = _mm512_mask_cmplt_epi32_mask(nonzero, magnitude, limit);
            excess = _mm512_mask_add_epi32(excess, nonzero, excess, _mm512_set1_epi32(-1));
            excess = _mm512_mask_add_epi32(excess, small, excess, _mm512_set1_epi32(4));
            __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(bits[i]), inverse));
            UNROLL for (int v = NUM_PLANES - 1; v >= 0; v--) {
                const __m128i bytes = _mm512_cvtepi32_epi8(rest);
                const __m512i plane = _mm512_cvtepi8_epi32(bytes);
                _mm_storeu_si128((__m128i*)(planes[v] + i * 16), bytes);
                sums[v] = _mm512_add_epi32(sums[v], plane);
                rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, plane), 8);
            }
        }
        UNROLL for (int v = 0; v < NUM_PLANES; v++) {
            steps[v] = {power_of_two(exponent + 8 * (NUM_PLANES - 1 - v)), -OFFSET * _mm512_reduce_add_epi32(sums[v])};
        }
        return (is_finite ? 0 : SPECIAL) | (_mm512_reduce_add_epi32(excess) > 0 ? WIDE : 0);
    }

    static INLINE Sums start(int32_t value) { return (Ints)_mm512_set1_epi32(value); }
    template <int BITS>
    static INLINE Weights expand(const uint8_t* values, const uint8_t* masks, int64_t row) {
        __m256i pairs = _mm256_loadu_si256((const __m256i*)(BITS == 8 ? values + row * 2 : values));
        if (BITS == 4) pairs = _mm256_and_si256(row ? _mm256_srli_epi16(pairs, 4) : pairs, _mm256_set1_epi8(15));
        const __mmask64 mask = _load_mask64((__mmask64*)(masks + row / 2));
        return _mm512_mask_expand_epi8(_mm512_set1_epi8(BITS == 8 ? -128 : 8), mask, _mm512_castsi256_si512(pairs));
    }
    static INLINE Inputs broadcast(const X* x) {
        int32_t four;
        memcpy(&four, x, 4);
        return _mm512_set1_epi32(four);
    }
    static INLINE Sums multiply_add(Sums sums, Weights w, Inputs x) { return (Ints)_mm512_dpbusd_epi32((__m512i)sums, w, x); }
    static INLINE Totals scaled(Sums sums, float scale) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sums), _mm512_set1_ps(scale));
    }
    static INLINE Totals add_scaled(Totals total, Sums sums, float scale) {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sums), _mm512_set1_ps(scale), total);
    }
    static INLINE Totals row_scales(const uint16_t* scales) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)scales)), 16));
    }
    static INLINE Totals multiply_add(Totals total, Totals sum, Totals scales) { return _mm512_fmadd_ps(sum, scales, total); }
    static INLINE void reduce(Totals total, float* out) { _mm512_storeu_ps(out, total); }
};
}  // namespace

int spmm24_quantised_avx512_vnni(const Problem& p, Dtype dtype, int bits) {
    if (bits == 8) {
        return dtype == BFLOAT16 ? spmm24_quantised<Vnni<2>, 8, uint16_t>(p) : spmm24_quantised<Vnni<3>, 8, float>(p);
    }
    return dtype == BFLOAT16 ? spmm24_quantised<Vnni<2>, 4, uint16_t>(p) : spmm24_quantised<Vnni<3>, 4, float>(p);
}
