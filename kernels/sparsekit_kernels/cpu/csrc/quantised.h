// The 2:4 weights of 8 and 4 bits: y = x @ W.T + bias, W[n, k] = q * scale.
//
// Blocks are 32 rows x 4 columns, that is two registers of 16 rows x 4 columns of one byte each:
//
//     masks  [N32][G][2] uint64      bit 4 r + c of a half says that its row r keeps column c;  N32 = ceil(N / 32)
//     values [N32][G][32][2] uint8   8 bits: q + 128 of the kept pair of each row, ascending in k
//            [N32][G][16][2] uint8   4 bits: q + 8; of row r in the low nibble, of row r + 16 in the high one
//     scales [N] float32             8 bits: of each row
//            [N32][B][32] bf16       4 bits: of each row and 128 columns;  B = ceil(K / 128)
//
// So 32 values and 64 bits of mask are a dense 16 x 4 tile: one `vpexpandb` makes it a register in which 32 bits belong
// to one row, and `vpdpbusd` multiplies it by four x of a byte each, broadcast, into one integer sum a row. Values are
// kept with their offset because that instruction wants unsigned bytes on one side; the offset fills the zeros of the
// tile too, and offset * (sum of x) is what the sums start from, negated.
//
// x in fixed point. Each token's x are rounded to nearest in steps of 2^e, e for each 128 columns by their largest |x|,
// to 16 bits for bf16 x and 24 bits for fp32 x, and cut into signed bytes ("planes"), each multiplied on its own. Sums
// within 128 columns are exact integers; they are scaled and added up in fp32. With X the largest |x| of its 128 columns:
//
//     bf16   |x| >= X / 100 is exact, others are off by at most 1.01 X / 2^15
//     fp32   off by at most 1.01 X / 2^23
//
// An outlier forces a long step on its neighbours. So a block of 128 columns is *wide* where more than a quarter of its
// non-zero |x| are below X / 128: what rounding took from each of its x is then put into fixed point as well, with a
// step of its own, and multiplied too. With that
//
//     bf16   off by at most 1.02 X / 2^30
//     fp32   off by at most 1.02 X / 2^46
//
// In a block that is not wide, and has no zeros, half of the 64 x that a row keeps are X / 128 or more, whichever it
// keeps: next to them the steps are small. One outlier among normal x is wide from about 40 times their deviation on;
// just below, y loses 2^-10 (bf16) or 2^-18 (fp32) of itself, and rounding y to bf16 takes up to 2^-8. The rule sees
// nothing but 128 x of one token, so no y depends on other tokens, and only wide blocks are multiplied twice.
//
// NaN and infinities are left out of the sums and added to y afterwards, by the rules of a dense product. Steps are at
// least 2^-126: what is smaller than half of that is zero. The sums of q * x must fit fp32: from about |x| = 2^110 on
// they may be infinite where q * scale * x is still finite.
#pragma once
#include "spmm24.h"

#define QUANTISED_ROWS 32
#define SCALED_GROUPS 32  // of four columns: those that share a step of x, and a scale of W at 4 bits

// One per instruction set; `bits` is 8 or 4, Problem.scales is set. 0 is success, 1 out of memory, 2 an error inside
// parallel_for.
typedef int (*Spmm24Quantised)(const Problem&, Dtype, int bits);
int spmm24_quantised_portable(const Problem&, Dtype, int bits);
#if defined(__x86_64__)
int spmm24_quantised_avx2(const Problem&, Dtype, int bits);
int spmm24_quantised_avx512_vnni(const Problem&, Dtype, int bits);
#endif
