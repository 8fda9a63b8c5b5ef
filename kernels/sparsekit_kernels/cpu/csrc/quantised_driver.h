// The loops around a register tile for quantised weights, for one instruction set; see driver.h for units, tiles, strips
// and panels, which are the same here, and quantised.h for the layout and the arithmetic.
//
// A *vector* is one plane of one token: a tile multiplies TOKENS * PLANES vectors. Its sums live in registers for the 32
// groups that share a step of x and a scale of W, and are then scaled into fp32 totals in the first cache. So every y is
// one chain of sums over k whatever M, the number of threads or the tile: results do not depend on them. Where x holds
// outliers (quantised.h), what rounding took from the 128 x is added at the end of the chain, by tiles of one token.
#pragma once
#include "schedule.h"

struct Step {
    float scale;    // of the sums of one vector
    int32_t start;  // where they start: minus the offset of the weights times the sum of the vector
};

enum Finding { SPECIAL = 1, WIDE = 2 };  // in 128 x: NaN or infinities; outliers, see quantised.h

template <class Arch>
struct Tile {
    const typename Arch::X* x;       // [groups][TOKENS][PLANES][4]
    const Step* steps;               // [groups / 32][TOKENS][PLANES]
    const uint8_t *values, *masks;   // at the strip's first column
    const uint16_t* scales;          // 4 bits: [groups / 32][32]
    const uint8_t *next_values, *next_masks;  // what the next strip will expand: cache lines to ask for
    typename Arch::Weights* panel;   // [groups][UNITS], expanded
    typename Arch::Totals* totals;   // [TOKENS][UNITS], added to
    int64_t groups, first_row;       // first_row: of the slab, in its block of 32
    bool wants_next;
};

enum Source { EXPAND, EXPAND_AND_STORE, PANEL };

template <class Arch, int BITS, int TOKENS, Source SOURCE>
__attribute__((noinline)) void run_tile(const Tile<Arch>& t) {
    constexpr int UNITS = Arch::UNITS, PLANES = Arch::PLANES, VECTORS = TOKENS * PLANES;
    constexpr int VALUE_BYTES = QUANTISED_ROWS * 2 * BITS / 8, MASK_BYTES = QUANTISED_ROWS / 2;
    const typename Arch::X* x = t.x;
    const Step* steps = t.steps;
    const uint8_t *values = t.values, *masks = t.masks, *next_values = t.next_values, *next_masks = t.next_masks;
    const uint16_t* scales = t.scales;
    // Without a next strip the same line is asked for again and again, which costs nothing.
    const int64_t next_value_bytes = t.wants_next ? VALUE_BYTES : 0, next_mask_bytes = t.wants_next ? MASK_BYTES : 0;
    typename Arch::Weights* panel = t.panel;
    const int64_t first_row = UNITS * Arch::ROWS == QUANTISED_ROWS ? 0 : t.first_row;  // mostly known to the compiler
    for (int64_t left = t.groups; left > 0; left -= SCALED_GROUPS) {
        typename Arch::Sums sums[VECTORS][UNITS];
        UNROLL for (int v = 0; v < VECTORS; v++) UNROLL for (int u = 0; u < UNITS; u++) sums[v][u] = Arch::start(steps[v].start);
        const int64_t groups = min_of(left, SCALED_GROUPS);
        for (int64_t g = 0; g < groups; g++) {
            typename Arch::Weights w[UNITS];
            UNROLL for (int u = 0; u < UNITS; u++) {
                w[u] = SOURCE == PANEL ? panel[u] : Arch::template expand<BITS>(values, masks, first_row + u * Arch::ROWS);
                if (SOURCE == EXPAND_AND_STORE) panel[u] = w[u];
            }
            if (SOURCE == PANEL) {
                __builtin_prefetch(next_values, 0, 2);
                __builtin_prefetch(next_masks, 0, 2);
                next_values += next_value_bytes, next_masks += next_mask_bytes;
            } else {
                if (Arch::PREFETCH) {
                    __builtin_prefetch(values + Arch::PREFETCH, 0, 3);
                    __builtin_prefetch(masks + Arch::PREFETCH * MASK_BYTES / VALUE_BYTES, 0, 3);
                }
                values += VALUE_BYTES, masks += MASK_BYTES;
            }
            UNROLL for (int v = 0; v < VECTORS; v++) {
                const typename Arch::Inputs xv = Arch::broadcast(x + v * 4);
                UNROLL for (int u = 0; u < UNITS; u++) sums[v][u] = Arch::multiply_add(sums[v][u], w[u], xv);
            }
            x += VECTORS * 4;
            if (SOURCE != EXPAND) panel += UNITS;
        }
        UNROLL for (int u = 0; u < UNITS; u++) {
            typename Arch::Totals row_scales;
            if (BITS == 4) row_scales = Arch::row_scales(scales + first_row + u * Arch::ROWS);
            UNROLL for (int m = 0; m < TOKENS; m++) {
                typename Arch::Totals sum = Arch::scaled(sums[m * PLANES][u], steps[m * PLANES].scale);
                UNROLL for (int p = 1; p < PLANES; p++) {
                    sum = Arch::add_scaled(sum, sums[m * PLANES + p][u], steps[m * PLANES + p].scale);
                }
                typename Arch::Totals& total = t.totals[m * UNITS + u];
                total = BITS == 4 ? Arch::multiply_add(total, sum, row_scales) : total + sum;
            }
        }
        steps += VECTORS;
        scales += QUANTISED_ROWS;
    }
}

template <class Arch, int BITS, int TOKENS>
struct Dispatch {
    static void run(const Tile<Arch>& t, int tokens, Source source) {
        if (tokens != TOKENS) return Dispatch<Arch, BITS, TOKENS - 1>::run(t, tokens, source);
        if (source == EXPAND) return run_tile<Arch, BITS, TOKENS, EXPAND>(t);
        if (TOKENS < (Arch::MAX_TOKENS + 1) / 2) return;  // never: tokens are spread evenly over several tiles
        if (source == PANEL) return run_tile<Arch, BITS, TOKENS, PANEL>(t);
        return run_tile<Arch, BITS, TOKENS, EXPAND_AND_STORE>(t);
    }
};
template <class Arch, int BITS>
struct Dispatch<Arch, BITS, 0> {
    static void run(const Tile<Arch>&, int, Source) {}
};

// Value is that of x, bias and y. x is packed strip by strip and, in a strip, tile by tile; so are the steps, after it.
template <class Arch, int BITS, class Value>
struct QuantisedOf : Schedule {
    using X = typename Arch::X;
    using Weights = typename Arch::Weights;
    using Totals = typename Arch::Totals;

    static constexpr int64_t MAX_TOKENS = Arch::MAX_TOKENS, STRIP = Arch::STRIP / 4, TOKEN_BLOCK = Arch::TOKEN_BLOCK;
    static constexpr int64_t SLAB_ROWS = Arch::UNITS * Arch::ROWS;
    static constexpr int OFFSET = BITS == 8 ? 128 : 8, VALUE_BYTES = QUANTISED_ROWS * 2 * BITS / 8;
    static constexpr int MASK_BYTES = QUANTISED_ROWS / 2;
    static_assert(STRIP % SCALED_GROUPS == 0, "a step of x is that of one strip");

    // What the rounding of 128 x took from them, packed for a tile of one token.
    struct Rest {
        Step steps[Arch::PLANES];
        X x[SCALED_GROUPS][Arch::PLANES][4];
    };

    uint8_t* is_special;  // [M]: the token holds NaN or infinities, which the tiles left out
    uint8_t* has_rest;    // [M][groups / 32]
    bool any_rest;

    explicit QuantisedOf(const Problem& problem)
        : Schedule(problem), is_special(nullptr), has_rest(nullptr), any_rest(false) {}

    static int64_t num_steps(int64_t g) { return ceil_div(g, SCALED_GROUPS); }
    int64_t bytes_of_x(int64_t tokens) const {
        return tokens * Arch::PLANES * (groups * 4 * (int64_t)sizeof(X) + num_steps(groups) * (int64_t)sizeof(Step));
    }
    int64_t bytes_of_rests(int64_t tokens) const { return tokens * num_steps(groups) * (int64_t)sizeof(Rest); }
    size_t panel_bytes() const { return num_tiles > 1 ? strip * Arch::UNITS * sizeof(Weights) : 0; }
    size_t scratch_bytes() const { return panel_bytes() + num_tokens * Arch::UNITS * sizeof(Totals); }

    // Of a tile that begins at token `begin`, in the strip that begins at group `g`.
    X* x_of(int64_t g, int64_t begin) const {
        return (X*)x + (g * num_tokens + begin * min_of(strip, groups - g)) * 4 * Arch::PLANES;
    }
    Step* steps_of(int64_t g, int64_t begin) const {
        Step* all = (Step*)((X*)x + groups * num_tokens * 4 * Arch::PLANES);
        return all + (num_steps(g) * num_tokens + begin * num_steps(min_of(strip, groups - g))) * Arch::PLANES;
    }

    // Of token m of the block: [groups / 32].
    Rest* rests_of(int64_t m) const { return (Rest*)((char*)x + bytes_of_x(num_tokens)) + m * num_steps(groups); }

    // Keep x - (x in fixed point) of 128 x of token m from group g on, unless it is zero.
    __attribute__((noinline)) void pack_rest(const float* wide, const X (*planes)[SCALED_GROUPS * 4], const Step* steps,
                                             int64_t m, int64_t g) {
        constexpr int COLUMNS = SCALED_GROUPS * 4;
        alignas(64) float rest[COLUMNS];
        alignas(64) X rest_planes[Arch::PLANES][COLUMNS];
        bool is_exact = true;
        for (int c = 0; c < COLUMNS; c++) {
            float fixed = 0;  // of at most 24 bits, and the difference of no more than x itself: both are exact
            for (int v = 0; v < Arch::PLANES; v++) fixed += planes[v][c] * steps[v].scale;
            rest[c] = wide[c] - fixed;  // NaN and infinities stay, and count as zero once more
            is_exact &= rest[c] == 0;
        }
        if (is_exact) return;
        Rest& to = rests_of(m)[g / SCALED_GROUPS];
        Arch::template quantise<OFFSET>(rest, rest_planes, to.steps);
        for (int i = 0; i < SCALED_GROUPS; i++) {
            for (int v = 0; v < Arch::PLANES; v++) memcpy(to.x[i][v], rest_planes[v] + i * 4, 4 * sizeof(X));
        }
        has_rest[(m_begin + m) * num_steps(groups) + g / SCALED_GROUPS] = 1;
        __atomic_store_n(&any_rest, true, __ATOMIC_RELAXED);
    }

    void pack(int64_t g_begin, int64_t tile) {
        const int64_t g_end = min_of(g_begin + strip, groups), begin = tile_begin(tile), tokens = tile_begin(tile + 1) - begin;
        const int64_t vectors = tokens * Arch::PLANES;
        for (int64_t m = 0; m < tokens; m++) {
            const Value* in = (const Value*)p.x + (m_begin + begin + m) * p.stride_xm;
            X* to = x_of(g_begin, begin) + m * Arch::PLANES * 4;
            Step* steps = steps_of(g_begin, begin) + m * Arch::PLANES;
            for (int64_t g = g_begin; g < g_end; g += SCALED_GROUPS, steps += vectors) {
                constexpr int COLUMNS = SCALED_GROUPS * 4;
                alignas(64) float wide[COLUMNS];
                alignas(64) X planes[Arch::PLANES][COLUMNS];
                const int64_t columns = min_of(p.K - g * 4, COLUMNS);
                if (columns == COLUMNS) {
                    for (int c = 0; c < COLUMNS; c++) wide[c] = widen(in[g * 4 + c]);
                } else {
                    for (int64_t c = 0; c < COLUMNS; c++) wide[c] = c < columns ? widen(in[g * 4 + c]) : 0.0f;
                }
                const int found = Arch::template quantise<OFFSET>(wide, planes, steps);
                if (found & SPECIAL) __atomic_store_n(&is_special[m_begin + begin + m], 1, __ATOMIC_RELAXED);
                if (found & WIDE) pack_rest(wide, planes, steps, begin + m, g);
                const int64_t count = min_of(g_end - g, SCALED_GROUPS);
                for (int64_t i = 0; i < count; i++, to += vectors * 4) {
                    UNROLL for (int v = 0; v < Arch::PLANES; v++) memcpy(to + v * 4, planes[v] + i * 4, 4 * sizeof(X));
                }
            }
        }
    }

    void slab(int64_t s, void* scratch) const {
        const int64_t block = s * SLAB_ROWS / QUANTISED_ROWS, next_block = (s + 1) * SLAB_ROWS / QUANTISED_ROWS;
        auto* totals = (Totals*)((char*)scratch + panel_bytes());
        memset((void*)totals, 0, num_tokens * Arch::UNITS * sizeof(Totals));
        Tile<Arch> t;
        t.panel = (Weights*)scratch;
        t.first_row = s * SLAB_ROWS % QUANTISED_ROWS;
        for (int64_t g = 0; g < groups; g += strip) {
            t.groups = min_of(strip, groups - g);
            const int64_t at = block * groups + g, next = g + t.groups < groups ? at + t.groups : next_block * groups;
            set_weights(&t, block, g);
            // An address past the last weight is never read: to prefetch it is harmless.
            t.next_values = (const uint8_t*)p.values + next * VALUE_BYTES;
            t.next_masks = (const uint8_t*)p.masks + next * MASK_BYTES;
            for (int64_t i = 0; i < num_tiles; i++) {
                const int64_t begin = tile_begin(i);
                t.x = x_of(g, begin);
                t.steps = steps_of(g, begin);
                t.totals = totals + begin * Arch::UNITS;
                t.wants_next = i == 1;
                const Source source = num_tiles == 1 ? EXPAND : i == 0 ? EXPAND_AND_STORE : PANEL;
                Dispatch<Arch, BITS, Arch::MAX_TOKENS>::run(t, (int)(tile_begin(i + 1) - begin), source);
            }
        }
        if (any_rest) add_rests(t, block, totals);
        finish(s * SLAB_ROWS, totals);
    }

    // Let a tile begin at group g of a block of rows.
    void set_weights(Tile<Arch>* t, int64_t block, int64_t g) const {
        t->values = (const uint8_t*)p.values + (block * groups + g) * VALUE_BYTES;
        t->masks = (const uint8_t*)p.masks + (block * groups + g) * MASK_BYTES;
        t->scales = (const uint16_t*)p.scales + (block * num_steps(groups) + num_steps(g)) * QUANTISED_ROWS;
    }

    void add_rests(Tile<Arch> t, int64_t block, Totals* totals) const {
        const int64_t count = num_steps(groups);
        for (int64_t m = 0; m < num_tokens; m++) {
            const uint8_t* has = has_rest + (m_begin + m) * count;
            for (int64_t i = 0; i < count; i++) {
                if (!has[i]) continue;
                const Rest& rest = rests_of(m)[i];
                set_weights(&t, block, i * SCALED_GROUPS);
                t.groups = min_of(groups - i * SCALED_GROUPS, SCALED_GROUPS);
                t.x = rest.x[0][0];
                t.steps = rest.steps;
                t.totals = totals + m * Arch::UNITS;
                Dispatch<Arch, BITS, Arch::MAX_TOKENS>::run(t, 1, EXPAND);
            }
        }
    }

    // y = scale * totals + bias, for the rows of a slab and all tokens.
    void finish(int64_t n_begin, const Totals* totals) const {
        constexpr int ROWS = SLAB_ROWS;
        const int64_t rows = min_of(p.N - n_begin, ROWS);
        float bias[ROWS] = {}, scale[ROWS];
        for (int n = 0; n < ROWS; n++) scale[n] = BITS == 8 && n < rows ? ((const float*)p.scales)[n_begin + n] : 1.0f;
        if (p.bias) {
            for (int64_t n = 0; n < rows; n++) bias[n] = widen(((const Value*)p.bias)[n_begin + n]);
        }
        for (int64_t m = 0; m < num_tokens; m++) {
            alignas(64) float out[ROWS];
            UNROLL for (int u = 0; u < Arch::UNITS; u++) Arch::reduce(totals[m * Arch::UNITS + u], out + u * Arch::ROWS);
            Value* y = (Value*)p.y + (m_begin + m) * p.N + n_begin;
            if (rows == ROWS) {
                for (int n = 0; n < ROWS; n++) narrow(out[n] * scale[n] + bias[n], y + n);
            } else {
                for (int64_t n = 0; n < rows; n++) narrow(out[n] * scale[n] + bias[n], y + n);
            }
        }
    }

    float weight(int64_t n, int64_t k) const {
        const int64_t at = n / QUANTISED_ROWS * groups + k / 4, row = n % QUANTISED_ROWS;
        const int kept = ((const uint8_t*)p.masks)[at * (QUANTISED_ROWS / 2) + row / 2] >> row % 2 * 4 & 15;
        if (!(kept >> k % 4 & 1)) return 0.0f;
        const int64_t slot = (kept & ((1 << k % 4) - 1)) != 0;
        const uint8_t* values = (const uint8_t*)p.values;
        if (BITS == 8) return (values[at * 64 + row * 2 + slot] - 128) * ((const float*)p.scales)[n];
        const int64_t of_scale = (n / QUANTISED_ROWS * num_steps(groups) + k / (SCALED_GROUPS * 4)) * QUANTISED_ROWS + row;
        return ((values[at * 32 + row % 16 * 2 + slot] >> row / 16 * 4 & 15) - 8) * widen(((const uint16_t*)p.scales)[of_scale]);
    }

    // Add to y of one token what its NaN and infinities contribute.
    void add_special(int64_t m) const {
        const Value* in = (const Value*)p.x + m * p.stride_xm;
        Value* y = (Value*)p.y + m * p.N;
        for (int64_t k = 0; k < p.K; k++) {
            const float xk = widen(in[k]);
            if (xk - xk == 0) continue;
            for (int64_t n = 0; n < p.N; n++) {
                const float sum = widen(y[n]);
                if (sum == sum) narrow(sum + xk * (xk == xk ? weight(n, k) : 1), y + n);
            }
            if (xk != xk) return;
        }
    }
};

template <class Arch, int BITS, class Value>
int spmm24_quantised(const Problem& p) {
    QuantisedOf<Arch, BITS, Value> kernel(p);
    kernel.is_special = (uint8_t*)calloc(p.M + 1, 1 + kernel.num_steps(kernel.groups));
    if (!kernel.is_special) return 1;
    kernel.has_rest = kernel.is_special + p.M;
    int status = run(kernel);
    if (!status && memchr(kernel.is_special, 1, p.M)) {
        auto repair = [](int64_t begin, int64_t end, void* context) {
            auto& k = *(QuantisedOf<Arch, BITS, Value>*)context;
            for (int64_t m = begin; m < end; m++) {
                if (k.is_special[m]) k.add_special(m);
            }
        };
        if (p.parallel_for(0, p.M, 1, repair, &kernel)) status = 2;
    }
    free(kernel.is_special);
    return status;
}

// X / 128 for the same: below it an x is small. 0 where that is denormal: no x is small then.
INLINE int small_limit(uint32_t top) { return top >= 8u << 23 ? (int)(top - (7u << 23)) : 0; }

// The step of fixed-point x in 128 columns of which `top` holds the bits of the largest |x|: 2^*exponent, so that
// |x| < (1 - 1 / 128) 2^(*exponent + BITS - 1), which leaves room for the carry between signed bytes.
template <int BITS>
INLINE int step_exponent(uint32_t top) {
    const int exponent = (int)((top + (1 << 17)) >> 23) - 126 - (BITS - 1);
    return exponent < -126 ? -126 : exponent;
}
INLINE float power_of_two(int exponent) {  // -126 .. 127
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
