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

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float widen(float v) { return v; }
INLINE float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float v;
    memcpy(&v, &wide, 4);
    return v;
}
INLINE void narrow(float v, float* out) { *out = v; }
INLINE void narrow(float v, uint16_t* out) {  // to nearest even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    *out = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16 | 0x40) : rounded);
}
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

// One block of tokens: cut evenly into tiles, with x packed strip by strip and, in a strip, tile by tile.
template <class Arch>
struct Run {
    using X = typename Arch::X;
    using Value = typename Arch::Value;

    static constexpr int UNITS_PER_BLOCK = BLOCK_ROWS / Arch::ROWS;

    const Problem& p;
    int64_t m_begin, num_tokens, num_tiles, groups, strip, num_units;
    X* x;
    volatile bool out_of_memory;

    int64_t tile_begin(int64_t i) const { return i * (num_tokens / num_tiles) + min_of(i, num_tokens % num_tiles); }

    void pack(int64_t g_begin, int64_t tile) const {
        const int64_t g_end = min_of(g_begin + strip, groups), begin = tile_begin(tile), tokens = tile_begin(tile + 1) - begin;
        X* out = x + (g_begin * num_tokens + begin * (g_end - g_begin)) * 4;
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
    void slab(int64_t unit, typename Arch::Weights* panel, typename Arch::Sums* sums) const {
        Tile<Arch> t;
        t.panel = panel;
        for (int64_t g = 0; g < groups; g += strip) {
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
                t.x = x + (g * num_tokens + begin * t.groups) * 4;
                t.sums = sums + begin * UNITS;
                const Source source = num_tiles == 1 ? EXPAND : i == 0 ? EXPAND_AND_STORE : i == 1 ? PANEL_AND_PREFETCH : PANEL;
                Dispatch<Arch, Arch::MAX_TOKENS, UNITS>::run(t, (int)(tile_begin(i + 1) - begin), source);
            }
        }
        finish<UNITS>(unit, sums);
    }

    void slabs(int64_t begin, int64_t end) {
        const size_t panel_bytes = num_tiles > 1 ? strip * Arch::UNITS * sizeof(typename Arch::Weights) : 0;
        const size_t sums_bytes = num_tokens * Arch::UNITS * sizeof(typename Arch::Sums);
        void* scratch = nullptr;
        if (posix_memalign(&scratch, 64, panel_bytes + sums_bytes)) {
            out_of_memory = true;
            return;
        }
        auto* panel = (typename Arch::Weights*)scratch;
        auto* sums = (typename Arch::Sums*)((char*)scratch + panel_bytes);
        for (int64_t s = begin; s < end; s++) {
            int64_t unit = s * Arch::UNITS;
            if (unit + Arch::UNITS <= num_units) {
                slab<Arch::UNITS>(unit, panel, sums);
            } else {
                for (; unit < num_units; unit++) slab<1>(unit, panel, sums);
            }
        }
        free(scratch);
    }
};

template <class Arch>
int spmm24(const Problem& p) {
    constexpr int64_t X_BYTES = 8 << 20;  // fp32 M=512 K=14336: 1.6 times 32 MB (one core of an EPYC, Zen 4)
    constexpr int64_t SMALL_JOB = 1 << 17;  // multiplications that one thread does sooner than it wakes another
    const int64_t groups = ceil_div(p.K, 8) * 2;
    if (p.M == 0 || p.N == 0) return 0;
    // The packed x of a block is read once for every slab: it should stay in the last cache beside the weights.
    const int64_t fit = X_BYTES / (groups * 4 * (int64_t)sizeof(typename Arch::X));
    const int64_t most_tokens = fit < 96 ? 96 : min_of(fit, Arch::TOKEN_BLOCK);
    const int64_t num_token_blocks = ceil_div(p.M, most_tokens), token_block = ceil_div(p.M, num_token_blocks);
    void* packed = nullptr;
    if (posix_memalign(&packed, 64, (size_t)(token_block * groups * 4) * sizeof(typename Arch::X))) return 1;
    int status = 0;
    for (int64_t m = 0; m < p.M && !status; m += token_block) {
        const int64_t tokens = min_of(token_block, p.M - m);
        Run<Arch> run{p, m, tokens, 0, groups, 0, 0, (typename Arch::X*)packed, false};
        run.num_tiles = ceil_div(tokens, Arch::MAX_TOKENS);
        run.strip = run.num_tiles > 1 ? min_of(Arch::STRIP / 4, groups) : groups;
        run.num_units = ceil_div(p.N, Arch::ROWS);
        const int64_t num_packs = ceil_div(groups, run.strip) * run.num_tiles;
        auto pack = [](int64_t begin, int64_t end, void* context) {
            auto& r = *(Run<Arch>*)context;
            for (int64_t i = begin; i < end; i++) r.pack(i / r.num_tiles * r.strip, i % r.num_tiles);
        };
        if (tokens * groups * 4 < SMALL_JOB || num_packs == 1) {
            pack(0, num_packs, &run);
        } else if (p.parallel_for(0, num_packs, 1, pack, &run)) {
            status = 2;
        }
        auto multiply = [](int64_t begin, int64_t end, void* context) { ((Run<Arch>*)context)->slabs(begin, end); };
        const int64_t num_slabs = ceil_div(run.num_units, Arch::UNITS);
        const int64_t per_slab = tokens * groups * 4 * Arch::UNITS * Arch::ROWS;
        if (!status && p.parallel_for(0, num_slabs, ceil_div(SMALL_JOB, per_slab), multiply, &run)) status = 2;
        if (!status && run.out_of_memory) status = 1;
    }
    free(packed);
    return status;
}
