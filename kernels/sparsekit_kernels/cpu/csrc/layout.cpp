// Between the canonical layout (layout24.py), the dense weight and the blocks of spmm24.h and quantised.h. Exact, and at
// memory speed.
#include "quantised.h"

namespace {

// Both directions between a canonical nibble idx0 | idx1 << 2 and the mask of its two columns; 0 is "not legal".
struct Nibbles {
    uint8_t mask_of[16] = {}, nibble_of[16] = {};
    constexpr Nibbles() {
        for (int first = 0; first < 4; first++) {
            for (int second = first + 1; second < 4; second++) {
                mask_of[first | second << 2] = (uint8_t)(1 << first | 1 << second);
                nibble_of[1 << first | 1 << second] = (uint8_t)(first | second << 2);
            }
        }
    }
};
constexpr Nibbles nibbles;

// The nibble of a group by which of its four are non-zero, free slots filled at the highest free positions; 0 where
// more than two are.
struct Fill {
    uint8_t nibble_of[16] = {};
    constexpr Fill() {
        for (int nonzero = 0; nonzero < 16; nonzero++) {
            int taken = nonzero, count = (nonzero & 1) + (nonzero >> 1 & 1) + (nonzero >> 2 & 1) + (nonzero >> 3);
            for (int position = 3; position >= 0 && count < 2; position--) {
                if (taken >> position & 1) continue;
                taken |= 1 << position;
                count++;
            }
            nibble_of[nonzero] = count == 2 ? nibbles.nibble_of[taken] : 0;
        }
    }
};
constexpr Fill fill;

struct Job {
    void *values, *meta;          // canonical: [N, Kp / 2], [N, Kp / 8]
    void *block_values, *masks;   // blocked; or block_values is the dense weight [N, K], rows `stride` apart
    int64_t N, K, stride;
    int64_t bad;                  // groups that are not legal
};

template <class Pair>  // the two values of a group
void prepare_blocks(int64_t begin, int64_t end, void* context) {
    auto& job = *(Job*)context;
    const int64_t groups = (job.K + 7) / 8 * 2;
    int64_t bad = 0;
    for (int64_t b = begin; b < end; b++) {
        Pair* out = (Pair*)job.block_values + b * groups * BLOCK_ROWS;
        uint32_t* masks = (uint32_t*)job.masks + b * groups;
        const int rows = (int)(job.N - b * BLOCK_ROWS < BLOCK_ROWS ? job.N - b * BLOCK_ROWS : BLOCK_ROWS);
        for (int64_t g = 0; g < groups; g++) masks[g] = 0;
        for (int r = 0; r < BLOCK_ROWS; r++) {
            if (r >= rows) {  // rows that only fill the last block: zeros, in the first two columns
                for (int64_t g = 0; g < groups; g++) out[g * BLOCK_ROWS + r] = 0, masks[g] |= 3u << 4 * r;
                continue;
            }
            const Pair* in = (const Pair*)job.values + (b * BLOCK_ROWS + r) * groups;
            const uint8_t* meta = (const uint8_t*)job.meta + (b * BLOCK_ROWS + r) * (groups / 2);
            for (int64_t g = 0; g < groups; g += 2) {
                const uint32_t even = nibbles.mask_of[meta[g / 2] & 15], odd = nibbles.mask_of[meta[g / 2] >> 4];
                bad += (even == 0) + (odd == 0);
                out[g * BLOCK_ROWS + r] = in[g];
                out[(g + 1) * BLOCK_ROWS + r] = in[g + 1];
                masks[g] |= even << 4 * r;
                masks[g + 1] |= odd << 4 * r;
            }
        }
    }
    if (bad) __atomic_fetch_add(&job.bad, bad, __ATOMIC_RELAXED);
}

template <class Pair>
void restore_blocks(int64_t begin, int64_t end, void* context) {
    auto& job = *(Job*)context;
    const int64_t groups = (job.K + 7) / 8 * 2;
    for (int64_t b = begin; b < end; b++) {
        const Pair* in = (const Pair*)job.block_values + b * groups * BLOCK_ROWS;
        const uint32_t* masks = (const uint32_t*)job.masks + b * groups;
        for (int r = 0; r < BLOCK_ROWS && b * BLOCK_ROWS + r < job.N; r++) {
            Pair* out = (Pair*)job.values + (b * BLOCK_ROWS + r) * groups;
            uint8_t* meta = (uint8_t*)job.meta + (b * BLOCK_ROWS + r) * (groups / 2);
            for (int64_t g = 0; g < groups; g += 2) {
                out[g] = in[g * BLOCK_ROWS + r];
                out[g + 1] = in[(g + 1) * BLOCK_ROWS + r];
                const uint8_t even = nibbles.nibble_of[masks[g] >> 4 * r & 15], odd = nibbles.nibble_of[masks[g + 1] >> 4 * r & 15];
                meta[g / 2] = (uint8_t)(even | odd << 4);
            }
        }
    }
}

template <class Value>
uint8_t compress_group(const Value* in, Value* out, int64_t* bad) {
    constexpr Value magnitude = (Value)~((Value)1 << (sizeof(Value) * 8 - 1));  // -0.0 is zero
    int nonzero = 0;
    for (int c = 0; c < 4; c++) nonzero |= ((in[c] & magnitude) != 0) << c;
    const uint8_t nibble = fill.nibble_of[nonzero];
    *bad += nibble == 0;
    const Value first = in[nibble & 3], second = in[nibble >> 2];
    out[0] = first & magnitude ? first : 0;
    out[1] = second & magnitude ? second : 0;
    return nibble;
}

template <class Value>
void compress_rows(int64_t begin, int64_t end, void* context) {
    auto& job = *(Job*)context;
    const int64_t groups = (job.K + 7) / 8 * 2, whole = job.K / 8 * 2;
    int64_t bad = 0;
    for (int64_t n = begin; n < end; n++) {
        const Value* in = (const Value*)job.block_values + n * job.stride;
        Value* out = (Value*)job.values + n * groups * 2;
        uint8_t* meta = (uint8_t*)job.meta + n * (groups / 2);
        for (int64_t g = 0; g < whole; g += 2) {
            const uint8_t even = compress_group(in + g * 4, out + g * 2, &bad);
            meta[g / 2] = (uint8_t)(even | compress_group(in + g * 4 + 4, out + g * 2 + 2, &bad) << 4);
        }
        if (whole < groups) {
            Value rest[8] = {};
            memcpy(rest, in + whole * 4, (size_t)(job.K - whole * 4) * sizeof(Value));
            const uint8_t even = compress_group(rest, out + whole * 2, &bad);
            meta[whole / 2] = (uint8_t)(even | compress_group(rest + 4, out + whole * 2 + 2, &bad) << 4);
        }
    }
    if (bad) __atomic_fetch_add(&job.bad, bad, __ATOMIC_RELAXED);
}

// The kept pair of a group, with its offset, into its place in a block of 32 rows; and back.
template <int BITS>
void store_pair(uint8_t* block, int row, const uint8_t* pair) {
    if (BITS == 8) {
        for (int i = 0; i < 2; i++) block[row * 2 + i] = pair[i] ^ 0x80;
    } else {
        for (int i = 0; i < 2; i++) block[row % 16 * 2 + i] |= ((*pair >> 4 * i & 15) ^ 8) << row / 16 * 4;
    }
}
template <int BITS>
void load_pair(const uint8_t* block, int row, uint8_t* pair) {
    if (BITS == 8) {
        for (int i = 0; i < 2; i++) pair[i] = block[row * 2 + i] ^ 0x80;
    } else {
        const uint8_t* both = block + row % 16 * 2;
        const int shift = row / 16 * 4;
        *pair = (uint8_t)(((both[0] >> shift & 15) ^ 8) | ((both[1] >> shift & 15) ^ 8) << 4);
    }
}

template <int BITS>
void prepare_quantised(int64_t begin, int64_t end, void* context) {
    auto& job = *(Job*)context;
    constexpr int PAIR_BYTES = BITS / 4, BLOCK_BYTES = QUANTISED_ROWS * PAIR_BYTES;
    const int64_t groups = (job.K + 7) / 8 * 2;
    const uint8_t zeros[2] = {};
    int64_t bad = 0;
    for (int64_t b = begin; b < end; b++) {
        uint8_t* out = (uint8_t*)job.block_values + b * groups * BLOCK_BYTES;
        uint64_t* masks = (uint64_t*)job.masks + b * groups * 2;
        memset(out, 0, groups * BLOCK_BYTES);
        memset(masks, 0, groups * 2 * sizeof(uint64_t));
        for (int r = 0; r < QUANTISED_ROWS; r++) {
            const int64_t n = b * QUANTISED_ROWS + r;
            const int half = r / 16, shift = r % 16 * 4;
            const uint8_t* in = (const uint8_t*)job.values + n * groups * PAIR_BYTES;
            const uint8_t* meta = (const uint8_t*)job.meta + n * (groups / 2);
            for (int64_t g = 0; g < groups; g++) {
                uint64_t mask = 3;  // rows that only fill the last block: zeros, in the first two columns
                if (n < job.N) mask = nibbles.mask_of[meta[g / 2] >> g % 2 * 4 & 15];
                bad += mask == 0;
                store_pair<BITS>(out + g * BLOCK_BYTES, r, n < job.N ? in + g * PAIR_BYTES : zeros);
                masks[g * 2 + half] |= mask << shift;
            }
        }
    }
    if (bad) __atomic_fetch_add(&job.bad, bad, __ATOMIC_RELAXED);
}

template <int BITS>
void restore_quantised(int64_t begin, int64_t end, void* context) {
    auto& job = *(Job*)context;
    constexpr int PAIR_BYTES = BITS / 4, BLOCK_BYTES = QUANTISED_ROWS * PAIR_BYTES;
    const int64_t groups = (job.K + 7) / 8 * 2;
    for (int64_t n = begin; n < end; n++) {
        const int64_t b = n / QUANTISED_ROWS;
        const int r = n % QUANTISED_ROWS;
        const uint8_t* in = (const uint8_t*)job.block_values + b * groups * BLOCK_BYTES;
        const uint64_t* masks = (const uint64_t*)job.masks + b * groups * 2 + r / 16;
        uint8_t* out = (uint8_t*)job.values + n * groups * PAIR_BYTES;
        uint8_t* meta = (uint8_t*)job.meta + n * (groups / 2);
        for (int64_t g = 0; g < groups; g++) {
            load_pair<BITS>(in + g * BLOCK_BYTES, r, out + g * PAIR_BYTES);
            const uint8_t nibble = nibbles.nibble_of[masks[g * 2] >> r % 16 * 4 & 15];
            meta[g / 2] = (uint8_t)(g % 2 ? meta[g / 2] | nibble << 4 : nibble);
        }
    }
}

int64_t run(ParallelFor parallel_for, int64_t count, int64_t grain, ChunkFunc func, Job* job) {
    const int32_t error = parallel_for(0, count, grain, func, job);
    return error ? -1 : job->bad;
}

int64_t grain_of(int64_t weights_each) { return (1 << 16) / (weights_each + 1) + 1; }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// All return how many groups are not legal, or -1 after an error inside parallel_for.
EXPORT int64_t sparsekit_prepare24(int64_t value_bytes, void* values, void* meta, void* block_values, void* masks, int64_t N,
                                   int64_t K, ParallelFor parallel_for) {
    Job job{values, meta, block_values, masks, N, K, 0, 0};
    return run(parallel_for, (N + BLOCK_ROWS - 1) / BLOCK_ROWS, grain_of(K * BLOCK_ROWS),
               value_bytes == 2 ? prepare_blocks<uint32_t> : prepare_blocks<uint64_t>, &job);
}

EXPORT int64_t sparsekit_restore24(int64_t value_bytes, void* values, void* meta, void* block_values, void* masks, int64_t N,
                                   int64_t K, ParallelFor parallel_for) {
    Job job{values, meta, block_values, masks, N, K, 0, 0};
    return run(parallel_for, (N + BLOCK_ROWS - 1) / BLOCK_ROWS, grain_of(K * BLOCK_ROWS),
               value_bytes == 2 ? restore_blocks<uint32_t> : restore_blocks<uint64_t>, &job);
}

EXPORT int64_t sparsekit_compress24(int64_t value_bytes, void* dense, int64_t stride, void* values, void* meta, int64_t N,
                                    int64_t K, ParallelFor parallel_for) {
    Job job{values, meta, dense, nullptr, N, K, stride, 0};
    return run(parallel_for, N, grain_of(K), value_bytes == 2 ? compress_rows<uint16_t> : compress_rows<uint32_t>, &job);
}

EXPORT int64_t sparsekit_prepare24_quantised(int64_t bits, void* values, void* meta, void* block_values, void* masks, int64_t N,
                                             int64_t K, ParallelFor parallel_for) {
    Job job{values, meta, block_values, masks, N, K, 0, 0};
    return run(parallel_for, (N + QUANTISED_ROWS - 1) / QUANTISED_ROWS, grain_of(K * QUANTISED_ROWS),
               bits == 8 ? prepare_quantised<8> : prepare_quantised<4>, &job);
}

EXPORT int64_t sparsekit_restore24_quantised(int64_t bits, void* values, void* meta, void* block_values, void* masks, int64_t N,
                                             int64_t K, ParallelFor parallel_for) {
    Job job{values, meta, block_values, masks, N, K, 0, 0};
    return run(parallel_for, N, grain_of(K), bits == 8 ? restore_quantised<8> : restore_quantised<4>, &job);
}
