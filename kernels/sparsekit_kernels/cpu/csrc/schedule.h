// What every kernel here shares besides its problem: a few scalars, and how tokens are spread over tiles, strips and
// threads. Included inside an unnamed namespace, see driver.h.
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

// How one product is cut: tokens into blocks whose packed x stays in the last cache, a block evenly into tiles, the
// columns into strips, the rows into slabs. A kernel derives from this and gives
//
//     MAX_TOKENS, STRIP, TOKEN_BLOCK    tokens of a tile, groups of four columns of a strip, tokens of a block, at most
//     SLAB_ROWS                         rows of W that are one piece of work
//     bytes_of_x(tokens)                room for the packed x of a block
//     bytes_of_rests(tokens)            room after it that is rarely touched
//     scratch_bytes()                   room that a thread needs
//     pack(g, tile)                     pack x of one tile, in the strip that begins at group g
//     slab(s, scratch)                  y of slab s for all tokens of the block
struct Schedule {
    const Problem& p;
    int64_t groups, m_begin, num_tokens, num_tiles, strip;
    void* x;
    volatile bool out_of_memory;

    explicit Schedule(const Problem& problem) : p(problem), groups(ceil_div(problem.K, 8) * 2), out_of_memory(false) {}
    int64_t tile_begin(int64_t i) const { return i * (num_tokens / num_tiles) + min_of(i, num_tokens % num_tiles); }
};

// Return 0, 1 if out of memory, 2 after an error inside parallel_for.
template <class Kernel>
int run(Kernel& kernel) {
    constexpr int64_t X_BYTES = 8 << 20;    // fp32 M=512 K=14336: 1.6 times 32 MB (one core of an EPYC, Zen 4)
    constexpr int64_t SMALL_JOB = 1 << 17;  // multiplications that one thread does sooner than it wakes another
    const Problem& p = kernel.p;
    if (p.M == 0 || p.N == 0) return 0;
    const int64_t columns = kernel.groups * 4;
    // The packed x of a block is read once for every slab: it should stay in the last cache beside the weights.
    const int64_t fit = X_BYTES / (kernel.bytes_of_x(1) + 1);
    const int64_t most_tokens = fit < 96 ? 96 : min_of(fit, Kernel::TOKEN_BLOCK);
    const int64_t num_token_blocks = ceil_div(p.M, most_tokens), token_block = ceil_div(p.M, num_token_blocks);
    const int64_t bytes = kernel.bytes_of_x(token_block) + kernel.bytes_of_rests(token_block);
    if (posix_memalign(&kernel.x, 64, (size_t)bytes)) return 1;
    int status = 0;
    for (kernel.m_begin = 0; kernel.m_begin < p.M && !status; kernel.m_begin += token_block) {
        kernel.num_tokens = min_of(token_block, p.M - kernel.m_begin);
        kernel.num_tiles = ceil_div(kernel.num_tokens, Kernel::MAX_TOKENS);
        kernel.strip = kernel.num_tiles > 1 ? min_of(Kernel::STRIP, kernel.groups) : kernel.groups;
        if (kernel.strip == 0) kernel.strip = 1;  // K = 0: y is the bias
        const int64_t num_packs = kernel.groups ? ceil_div(kernel.groups, kernel.strip) * kernel.num_tiles : 0;
        auto pack = [](int64_t begin, int64_t end, void* context) {
            auto& k = *(Kernel*)context;
            for (int64_t i = begin; i < end; i++) k.pack(i / k.num_tiles * k.strip, i % k.num_tiles);
        };
        if (kernel.num_tokens * columns < SMALL_JOB || num_packs <= 1) {
            pack(0, num_packs, &kernel);
        } else if (p.parallel_for(0, num_packs, 1, pack, &kernel)) {
            status = 2;
        }
        auto multiply = [](int64_t begin, int64_t end, void* context) {
            auto& k = *(Kernel*)context;
            void* scratch = nullptr;
            if (posix_memalign(&scratch, 64, k.scratch_bytes())) {
                k.out_of_memory = true;
                return;
            }
            for (int64_t s = begin; s < end; s++) k.slab(s, scratch);
            free(scratch);
        };
        const int64_t per_slab = kernel.num_tokens * columns * Kernel::SLAB_ROWS + 1;
        const int64_t grain = ceil_div(SMALL_JOB, per_slab);
        if (!status && p.parallel_for(0, ceil_div(p.N, Kernel::SLAB_ROWS), grain, multiply, &kernel)) status = 2;
        if (!status && kernel.out_of_memory) status = 1;
    }
    free(kernel.x);
    return status;
}
