// The loops around a register tile, for one instruction set. Included by each instruction set's file inside an unnamed
// namespace, so that no function compiled for one machine can be linked in place of another's.
//
// An `Arch` gives the register tile its instructions. A *unit* is ROWS rows of a block, the rows that share one
// register: a tile holds TOKENS x UNITS accumulators, and for each group of four columns it expands UNITS registers of
// weights, broadcasts TOKENS groups of x, and multiplies them all.
//
//     few tokens (one tile)   each weight is expanded in registers and used at once; nothing but the packed bytes is read
//     more tokens             K is cut into strips. The first tile of a strip also stores what it expands in a panel
//                             that fits the L2 cache; the other tiles read the panel, and the second one asks for
//                             the packed bytes of the next strip, so that memory is never idle
//
// Accumulators of unfinished strips are kept as they are, so every y is one chain of sums over k whatever M, the number
// of threads or the tile: results do not depend on them.
#pragma once

#include "schedule.h"

INLINE void narrow_x(float v, float* out) { *out = v; }
INLINE void narrow_x(uint16_t v, float* out) { *out = widen(v); }
INLINE void narrow_x(uint16_t v, uint16_t* out) { *out = v; }

// What one tile works on: `groups` groups of four columns, for some tokens and units.
template <class Arch>
struct Tile {
    const typename Arch::X* x;                             // [groups][TOKENS][4]
    const typename Arch::Value* values[Arch::UNITS];   // of each unit, at the strip's first column
    const uint8_t* masks[Arch::UNITS];
    const char* next[Arch::UNITS];                         // what the next strip will expand: cache lines to ask for
    typename Arch::Weights* panel;                         // [groups][UNITS], expanded
    typename Arch::Sums* sums;                             // [TOKENS][UNITS], added to (set by the first strip)
    int64_t groups;
    bool first;
};

enum Source { EXPAND, EXPAND_AND_STORE, PANEL, PANEL_AND_PREFETCH };

template <class Arch, int TOKENS, int UNITS, Source SOURCE>
__attribute__((noinline)) void run_tile(const Tile<Arch>& t) {
    typename Arch::Sums sums[TOKENS][UNITS];
    if (t.first) {
        UNROLL for (int m = 0; m < TOKENS; m++) UNROLL for (int u = 0; u < UNITS; u++) sums[m][u] = Arch::zero();
    } else {
        UNROLL for (int m = 0; m < TOKENS; m++) UNROLL for (int u = 0; u < UNITS; u++) sums[m][u] = t.sums[m * UNITS + u];
    }
    const typename Arch::X* x = t.x;
    const typename Arch::Value* values[UNITS];
    const uint8_t* masks[UNITS];
    const char* next[UNITS];
    constexpr int BYTES = BLOCK_VALUES * sizeof(typename Arch::Value);
    UNROLL for (int u = 0; u < UNITS; u++) values[u] = t.values[u], masks[u] = t.masks[u], next[u] = t.next[u];
    typename Arch::Weights* panel = t.panel;
    const int64_t groups = t.groups;
    for (int64_t g = 0; g < groups; g++) {
        typename Arch::Weights w[UNITS];
        UNROLL for (int u = 0; u < UNITS; u++) {
            if (SOURCE == PANEL || SOURCE == PANEL_AND_PREFETCH) {
                w[u] = panel[u];
            } else {
                w[u] = Arch::expand(values[u] + g * BLOCK_VALUES, masks[u] + g * 4);
                if (Arch::PREFETCH) __builtin_prefetch((const char*)(values[u] + g * BLOCK_VALUES) + Arch::PREFETCH, 0, 3);
            }
            if (SOURCE == EXPAND_AND_STORE) panel[u] = w[u];
            if (SOURCE == PANEL_AND_PREFETCH) __builtin_prefetch(next[u] + g * BYTES, 0, 2);
        }
        UNROLL for (int m = 0; m < TOKENS; m++) {
            const typename Arch::Inputs xm = Arch::broadcast(x + m * 4);
            UNROLL for (int u = 0; u < UNITS; u++) sums[m][u] = Arch::multiply_add(sums[m][u], w[u], xm);
        }
        x += TOKENS * 4;
        if (SOURCE != EXPAND) panel += UNITS;
    }
    UNROLL for (int m = 0; m < TOKENS; m++) UNROLL for (int u = 0; u < UNITS; u++) t.sums[m * UNITS + u] = sums[m][u];
}

template <class Arch, int TOKENS, int UNITS>
struct Dispatch {
    static void run(const Tile<Arch>& t, int tokens, Source source) {
        if (tokens != TOKENS) return Dispatch<Arch, TOKENS - 1, UNITS>::run(t, tokens, source);
        if (source == EXPAND) return run_tile<Arch, TOKENS, UNITS, EXPAND>(t);
        if (TOKENS < (Arch::MAX_TOKENS + 1) / 2) return;  // never: tokens are spread evenly over several tiles
        if (source == PANEL) return run_tile<Arch, TOKENS, UNITS, PANEL>(t);
        if (source == PANEL_AND_PREFETCH) return run_tile<Arch, TOKENS, UNITS, PANEL_AND_PREFETCH>(t);
        return run_tile<Arch, TOKENS, UNITS, EXPAND_AND_STORE>(t);
    }
};
template <class Arch, int UNITS>
struct Dispatch<Arch, 0, UNITS> {
    static void run(const Tile<Arch>&, int, Source) {}
};

// x is packed strip by strip and, in a strip, tile by tile.
template <class Arch>
struct Spmm24Of : Schedule {
    using X = typename Arch::X;
    using Value = typename Arch::Value;

    static constexpr int64_t MAX_TOKENS = Arch::MAX_TOKENS, STRIP = Arch::STRIP / 4, TOKEN_BLOCK = Arch::TOKEN_BLOCK;
    static constexpr int64_t SLAB_ROWS = Arch::UNITS * Arch::ROWS;
    static constexpr int UNITS_PER_BLOCK = BLOCK_ROWS / Arch::ROWS;

    explicit Spmm24Of(const Problem& problem) : Schedule(problem) {}

    int64_t bytes_of_x(int64_t tokens) const { return tokens * groups * 4 * (int64_t)sizeof(X); }
    int64_t bytes_of_rests(int64_t) const { return 0; }
    size_t panel_bytes() const { return num_tiles > 1 ? strip * Arch::UNITS * sizeof(typename Arch::Weights) : 0; }
    size_t scratch_bytes() const { return panel_bytes() + num_tokens * Arch::UNITS * sizeof(typename Arch::Sums); }

    void pack(int64_t g_begin, int64_t tile) const {
        const int64_t g_end = min_of(g_begin + strip, groups), begin = tile_begin(tile), tokens = tile_begin(tile + 1) - begin;
        X* out = (X*)x + (g_begin * num_tokens + begin * (g_end - g_begin)) * 4;
        for (int64_t m = 0; m < tokens; m++) {
            const Value* in = (const Value*)p.x + (m_begin + begin + m) * p.stride_xm;
            int64_t g = g_begin;
            X* to = out + m * 4;
            for (; g < g_end && g * 4 + 4 <= p.K; g++, to += tokens * 4) {
                UNROLL for (int c = 0; c < 4; c++) narrow_x(in[g * 4 + c], to + c);
            }
            for (; g < g_end; g++, to += tokens * 4) {
                for (int c = 0; c < 4; c++) {
                    to[c] = 0;
                    if (g * 4 + c < p.K) narrow_x(in[g * 4 + c], to + c);
                }
            }
        }
    }

    // y = sums + bias, for some units and all tokens.
    template <int UNITS>
    void finish(int64_t unit, const typename Arch::Sums* sums) const {
        constexpr int ROWS = UNITS * Arch::ROWS;
        const int64_t n_begin = unit * Arch::ROWS, rows = min_of(p.N - n_begin, ROWS);
        float bias[ROWS] = {};
        if (p.bias) {
            for (int64_t n = 0; n < rows; n++) bias[n] = widen(((const Value*)p.bias)[n_begin + n]);
        }
        for (int64_t m = 0; m < num_tokens; m++) {
            alignas(64) float out[ROWS];
            UNROLL for (int u = 0; u < UNITS; u++) Arch::reduce(sums[m * UNITS + u], out + u * Arch::ROWS);
            Value* y = (Value*)p.y + (m_begin + m) * p.N + n_begin;
            if (rows == ROWS) {
                for (int n = 0; n < ROWS; n++) narrow(out[n] + bias[n], y + n);
            } else {
                for (int64_t n = 0; n < rows; n++) narrow(out[n] + bias[n], y + n);
            }
        }
    }

    const Value* values_of(int64_t unit, int64_t g) const {
        return (const Value*)p.values + (unit / UNITS_PER_BLOCK * groups + g) * BLOCK_VALUES + unit % UNITS_PER_BLOCK * Arch::ROWS * 2;
    }
    const uint8_t* masks_of(int64_t unit, int64_t g) const {
        return (const uint8_t*)(p.masks + unit / UNITS_PER_BLOCK * groups + g) + unit % UNITS_PER_BLOCK * Arch::ROWS / 2;
    }

    template <int UNITS>
    void units(int64_t unit, typename Arch::Weights* panel, typename Arch::Sums* sums) const {
        Tile<Arch> t;
        t.panel = panel;
        for (int64_t g = 0; g == 0 || g < groups; g += strip) {
            t.groups = min_of(strip, groups - g);
            t.first = g == 0;
            const bool ends = g + t.groups == groups;
            for (int u = 0; u < UNITS; u++) {
                t.values[u] = values_of(unit + u, g);
                t.masks[u] = masks_of(unit + u, g);
                // An address past the last weight is never read: to prefetch it is harmless.
                t.next[u] = (const char*)(ends ? values_of(unit + UNITS + u, 0) : values_of(unit + u, g + t.groups));
            }
            for (int64_t i = 0; i < num_tiles; i++) {
                const int64_t begin = tile_begin(i);
                t.x = (const X*)x + (g * num_tokens + begin * t.groups) * 4;
                t.sums = sums + begin * UNITS;
                const Source source = num_tiles == 1 ? EXPAND : i == 0 ? EXPAND_AND_STORE : i == 1 ? PANEL_AND_PREFETCH : PANEL;
                Dispatch<Arch, Arch::MAX_TOKENS, UNITS>::run(t, (int)(tile_begin(i + 1) - begin), source);
            }
        }
        finish<UNITS>(unit, sums);
    }

    void slab(int64_t s, void* scratch) const {
        auto* panel = (typename Arch::Weights*)scratch;
        auto* sums = (typename Arch::Sums*)((char*)scratch + panel_bytes());
        const int64_t num_units = ceil_div(p.N, Arch::ROWS);
        int64_t unit = s * Arch::UNITS;
        if (unit + Arch::UNITS <= num_units) return units<Arch::UNITS>(unit, panel, sums);
        for (; unit < num_units; unit++) units<1>(unit, panel, sums);
    }
};

template <class Arch>
int spmm24(const Problem& p) {
    Spmm24Of<Arch> kernel(p);
    return run(kernel);
}
