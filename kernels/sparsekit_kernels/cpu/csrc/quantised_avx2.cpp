// AVX2 and FMA: bytes are placed by a shuffle, widened to 16 bits, and multiplied by 16 bits of x at a time.
#include "quantised.h"

#include <immintrin.h>

namespace {
#include "quantised_driver.h"
#include "positions.h"

// Shuffles of bytes: where each byte of 2 rows x 4 columns comes from, 0x80 for zero; rows 0 and 1, rows 2 and 3.
constexpr Positions<0, 0x80> first_rows;
constexpr Positions<4, 0x80> last_rows;

template <int NUM_PLANES>
struct Words {
    using X = int16_t;
    using Weights = __m256i;  // 4 rows x 4 columns of 16 bits
    using Inputs = __m256i;
    using Sums = __m256i;   // 4 rows x (columns 0 and 1, columns 2 and 3)
    using Totals = __m256;  // the same
    static constexpr int ROWS = 4, UNITS = 8, PLANES = NUM_PLANES, MAX_TOKENS = 1;
    static constexpr int STRIP = 2048, TOKEN_BLOCK = 512, PREFETCH = 1024;

    // Returns what it found; NaN and infinities count as zero here. The last plane of two is a signed byte.
    template <int OFFSET>
    static int quantise(const float* x, X (*planes)[SCALED_GROUPS * 4], Step* steps) {
        constexpr int COLUMNS = SCALED_GROUPS * 4;
        const __m256i infinity = _mm256_set1_epi32(0x7F800000);
        __m256i top = _mm256_setzero_si256(), all_finite = _mm256_set1_epi32(-1);
        alignas(32) float finite_x[COLUMNS];
        for (int i = 0; i < COLUMNS; i += 8) {
            const __m256i bits = _mm256_loadu_si256((const __m256i*)(x + i));
            const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
            const __m256i finite = _mm256_cmpgt_epi32(infinity, magnitude);
            all_finite = _mm256_and_si256(all_finite, finite);
            top = _mm256_max_epi32(top, _mm256_and_si256(magnitude, finite));
            _mm256_store_si256((__m256i*)(finite_x + i), _mm256_and_si256(bits, finite));
        }
        alignas(32) uint32_t tops[8];
        _mm256_store_si256((__m256i*)tops, top);
        uint32_t highest = 0;
        for (int i = 0; i < 8; i++) highest = tops[i] > highest ? tops[i] : highest;
        const int exponent = step_exponent<NUM_PLANES * 8 + 8>(highest);
        const __m256 inverse = _mm256_set1_ps(power_of_two(-exponent));
        const __m256i limit = _mm256_set1_epi32(small_limit(highest));
        __m256i excess = _mm256_setzero_si256();  // four times the small minus the non-zero
        for (int i = 0; i < COLUMNS; i += 8) {
            alignas(32) int32_t whole[8];
            const __m256 xs = _mm256_load_ps(finite_x + i);
            const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(xs), _mm256_set1_epi32(0x7FFFFFFF));
            const __m256i nonzero = _mm256_cmpgt_epi32(magnitude, _mm256_setzero_si256());
            const __m256i small = _mm256_and_si256(_mm256_cmpgt_epi32(limit, magnitude), nonzero);
            excess = _mm256_sub_epi32(_mm256_add_epi32(excess, nonzero), _mm256_slli_epi32(small, 2));
            const __m256 scaled = _mm256_mul_ps(xs, inverse);
            _mm256_store_si256((__m256i*)whole, _mm256_cvtps_epi32(scaled));
            for (int c = 0; c < 8; c++) {
                const int8_t low = (int8_t)whole[c];
                if (NUM_PLANES == 2) planes[1][i + c] = low;
                planes[0][i + c] = (int16_t)(NUM_PLANES == 2 ? (whole[c] - low) >> 8 : whole[c]);
            }
        }
        for (int v = 0; v < NUM_PLANES; v++) steps[v] = {power_of_two(exponent + 8 * (NUM_PLANES - 1 - v)), 0};
        alignas(32) int32_t excesses[8];
        _mm256_store_si256((__m256i*)excesses, excess);
        int total = 0;
        for (int i = 0; i < 8; i++) total += excesses[i];
        return (_mm256_movemask_epi8(all_finite) == -1 ? 0 : SPECIAL) | (total > 0 ? WIDE : 0);
    }

    static INLINE Sums start(int32_t) { return _mm256_setzero_si256(); }
    template <int BITS>
    static INLINE Weights expand(const uint8_t* values, const uint8_t* masks, int64_t row) {
        __m128i pairs;
        if (BITS == 8) {
            pairs = _mm_xor_si128(_mm_loadl_epi64((const __m128i*)(values + row * 2)), _mm_set1_epi8(-128));
        } else {
            pairs = _mm_loadl_epi64((const __m128i*)(values + row % 16 * 2));
            pairs = _mm_and_si128(row < 16 ? pairs : _mm_srli_epi16(pairs, 4), _mm_set1_epi8(15));
            pairs = _mm_sub_epi8(pairs, _mm_set1_epi8(8));
        }
        const __m128i first = _mm_loadl_epi64((const __m128i*)first_rows.from[masks[row / 2]]);
        const __m128i last = _mm_loadl_epi64((const __m128i*)last_rows.from[masks[row / 2 + 1]]);
        return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(pairs, _mm_unpacklo_epi64(first, last)));
    }
    static INLINE Inputs broadcast(const X* x) {
        int64_t four;
        memcpy(&four, x, 8);
        return _mm256_set1_epi64x(four);
    }
    static INLINE Sums multiply_add(Sums sums, Weights w, Inputs x) {
        return _mm256_add_epi32(sums, _mm256_madd_epi16(w, x));
    }
    static INLINE Totals scaled(Sums sums, float scale) {
        return _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(scale));
    }
    static INLINE Totals add_scaled(Totals total, Sums sums, float scale) {
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(scale), total);
    }
    static INLINE Totals row_scales(const uint16_t* scales) {
        const __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)scales)), 16);
        const __m256i twice = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
        return _mm256_permutevar8x32_ps(_mm256_castsi256_ps(_mm256_zextsi128_si256(wide)), twice);
    }
    static INLINE Totals multiply_add(Totals total, Totals sum, Totals scales) { return _mm256_fmadd_ps(sum, scales, total); }
    static INLINE void reduce(Totals total, float* out) {
        const __m128 pairs = _mm_hadd_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
        _mm_storeu_ps(out, pairs);
    }
};
}  // namespace

int spmm24_quantised_avx2(const Problem& p, Dtype dtype, int bits) {
    if (bits == 8) {
        return dtype == BFLOAT16 ? spmm24_quantised<Words<1>, 8, uint16_t>(p) : spmm24_quantised<Words<2>, 8, float>(p);
    }
    return dtype == BFLOAT16 ? spmm24_quantised<Words<1>, 4, uint16_t>(p) : spmm24_quantised<Words<2>, 4, float>(p);
}
