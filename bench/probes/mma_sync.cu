// Does mma.sp.sync run at twice the rate of mma.sync?  One JSON line for each instruction, rates in dense-equivalent
// TFLOP/s (2 * M * N * K of the product that the instruction stands for, zeros included).
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -o mma_sync mma_sync.cu && ./mma_sync
//
// Every warp keeps CHAINS independent accumulators busy and touches no memory, so nothing but the tensor cores (and,
// over seconds, the power limit) sets the pace. Operands are random finite numbers: zeros run faster than real data.

#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>

#include "probe.cuh"

constexpr int CHAINS = 8;

// Each struct is one instruction: K columns of A (16 rows) against 8 columns of B.
#define DENSE_16(NAME, TYPE)                                                                                     \
  struct NAME {                                                                                                  \
    static constexpr int K = 16;                                                                                 \
    static constexpr bool SPARSE = false, INTEGER = false;                                                       \
    __device__ static void run(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t) {      \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},"     \
                   "{%8,%9},{%0,%1,%2,%3};"                                                                      \
                   : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                          \
    }                                                                                                            \
  };

#define SPARSE_16(NAME, FORM, TYPE)                                                                              \
  struct NAME {                                                                                                  \
    static constexpr int K = 32;                                                                                 \
    static constexpr bool SPARSE = true, INTEGER = false;                                                        \
    __device__ static void run(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {    \
      asm volatile("mma." FORM ".sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3},"          \
                   "{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,0x0;"                                        \
                   : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),     \
                     "r"(e));                                                                                    \
    }                                                                                                            \
  };

DENSE_16(DenseBf16, "bf16")
DENSE_16(DenseFp16, "f16")
SPARSE_16(SparseBf16, "sp", "bf16")
SPARSE_16(SparseFp16, "sp", "f16")
SPARSE_16(OrderedBf16, "sp::ordered_metadata", "bf16")
SPARSE_16(OrderedFp16, "sp::ordered_metadata", "f16")

struct DenseInt8 {
  static constexpr int K = 32;
  static constexpr bool SPARSE = false, INTEGER = true;
  __device__ static void run(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct SparseInt8 {
  static constexpr int K = 64;
  static constexpr bool SPARSE = true, INTEGER = true;
  __device__ static void run(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {
    asm volatile("mma.sp.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},"
                 "{%8,%9,%10,%11},{%0,%1,%2,%3},%12,0x0;"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e));
  }
};

// Two random 16-bit floats with |value| in [2^-3, 2), or four random bytes.
template <class Mma>
__device__ uint32_t operand(uint32_t seed, bool bf16) {
  uint32_t bits = hash32(seed);
  if (Mma::INTEGER) return bits;
  uint32_t exponent = bf16 ? 0x3E003E00u : 0x30003000u;
  uint32_t mantissa = bf16 ? 0x81FF81FFu : 0x8FFF8FFFu;
  return (bits & mantissa) | exponent;
}

template <class Mma>
__global__ void __launch_bounds__(512) run_chains(int steps, bool bf16, uint32_t* sink) {
  uint32_t seed = (blockIdx.x * blockDim.x + threadIdx.x) * 64;
  uint32_t a[2][4], b[2][4], d[CHAINS][4] = {};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      a[j][i] = operand<Mma>(seed + 8 * j + i, bf16);
      b[j][i] = operand<Mma>(seed + 8 * j + i + 32, bf16);
    }
  // Legal nibbles only; 0xE = (2, 3), 0x4 = (0, 1), 0x9 = (1, 2), 0xD = (1, 3).
  uint32_t e = (hash32(seed) & 1) ? 0xE49DE49Du : 0x4D9E4D9Eu;
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int chain = 0; chain < CHAINS; ++chain) Mma::run(d[chain], a[chain & 1], b[chain >> 1 & 1], e);
  uint32_t mixed = 0;
  for (int chain = 0; chain < CHAINS; ++chain)
    for (int i = 0; i < 4; ++i) mixed ^= d[chain][i];
  if (mixed == 0x5EED1234u) *sink = mixed;  // never the case in practice, but the compiler cannot know
}

template <class Mma>
void measure(const char* name, const char* dtype, bool bf16, int sms) {
  uint32_t* sink;
  CHECK(cudaMalloc(&sink, sizeof *sink));
  double best = 0;
  int best_warps = 0;
  for (int warps : {4, 8, 16}) {
    int steps = 200000 / warps;
    float ms = best_ms(5, [&] { run_chains<Mma><<<sms, 32 * warps>>>(steps, bf16, sink); });
    double tflops = 2.0 * 16 * 8 * Mma::K * CHAINS * double(steps) * warps * sms / (ms * 1e-3) / 1e12;
    if (tflops > best) best = tflops, best_warps = warps;
  }
  std::printf("{\"probe\": \"mma_sync\", \"instruction\": \"%s\", \"dtype\": \"%s\", \"sparse\": %s, \"tflop_s\": %.1f, "
              "\"warps_per_sm\": %d}\n",
              name, dtype, Mma::SPARSE ? "true" : "false", best, best_warps);
  std::fflush(stdout);
  CHECK(cudaFree(sink));
}

int main() {
  int sms = num_sms();
  measure<DenseBf16>("mma.sync.m16n8k16", "bf16", true, sms);
  measure<SparseBf16>("mma.sp.sync.m16n8k32", "bf16", true, sms);
  measure<OrderedBf16>("mma.sp::ordered_metadata.sync.m16n8k32", "bf16", true, sms);
  measure<DenseFp16>("mma.sync.m16n8k16", "fp16", false, sms);
  measure<SparseFp16>("mma.sp.sync.m16n8k32", "fp16", false, sms);
  measure<OrderedFp16>("mma.sp::ordered_metadata.sync.m16n8k32", "fp16", false, sms);
  measure<DenseInt8>("mma.sync.m16n8k32", "int8", false, sms);
  measure<SparseInt8>("mma.sp.sync.m16n8k64", "int8", false, sms);
}
