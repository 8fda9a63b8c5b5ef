// What the translation units of this library share. Plain C++17 and libc: no torch headers, no OpenMP.
//
// A weight W [N, K] with two of every four entries kept is held as blocks of 8 rows x 4 columns, each block 32 weights:
//
//     values [N8][G][8 rows][2]   the kept pair of each row, ascending in k;   N8 = ceil(N / 8), G = 2 ceil(K / 8)
//     masks  [N8][G] uint32       bit 4 r + c says that row r keeps column c;  eight bits set for every four rows
//
// So 16 consecutive values and one mask *are* a dense 8 x 4 tile: one `vpexpandw` makes it a register, in which 64 bits
// belong to one row. Multiplied by the four x of these columns, broadcast as one 64-bit word, `vdpbf16ps` gives a
// register of 8 rows x 2 partial sums. Nothing is transposed or shuffled until the last column; and a thread reads its
// weights as a few sequential streams, whatever M is.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK_ROWS 8
#define BLOCK_VALUES 16  // of one block of 8 rows x 4 columns

// The C function `torch_parallel_for` of libtorch_cpu: torch's own threads, torch.set_num_threads obeyed.
typedef void (*ChunkFunc)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, ChunkFunc func, void* context);

enum Dtype { BFLOAT16 = 0, FLOAT32 = 1 };

struct Problem {
    const void* x;  // [M, K], rows `stride_xm` elements apart
    int64_t stride_xm;
    const void* values;
    const uint32_t* masks;
    const void* bias;  // [N] or null
    void* y;           // [M, N]
    int64_t M, N, K;
    ParallelFor parallel_for;
    const void* scales;  // of a quantised weight, see quantised.h
};

// One per instruction set; 0 is success, 1 out of memory, 2 an error inside parallel_for.
typedef int (*Spmm24)(const Problem&, Dtype);
int spmm24_portable(const Problem&, Dtype);
#if defined(__x86_64__)
int spmm24_avx2(const Problem&, Dtype);
int spmm24_avx512(const Problem&, Dtype);
int spmm24_avx512_bf16(const Problem&, Dtype);
#endif
