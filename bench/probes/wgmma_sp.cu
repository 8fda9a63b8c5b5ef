// How fast is wgmma.sp with the sparse operand in shared memory (SS) and in registers (RS), by the shape of the tile,
// and do the copies that fill shared memory slow it down?  One JSON line for each case, in dense-equivalent TFLOP/s.
//
//   python wgmma_forms.py > wgmma_forms.cuh
//   nvcc -O3 -std=c++17 -I. -gencode arch=compute_90a,code=sm_90a -o wgmma_sp wgmma_sp.cu && ./wgmma_sp
//
// A block has two consumer warpgroups and a producer. Each consumer multiplies ROWS tiles of 64 rows of W with T tokens;
// one step is 128 bytes of each token. Without copies the consumers run over STAGES tiles that lie in shared memory;
// with them the producer refills each tile from L2 by cp.async.bulk once it has been read, as a real kernel does (whose
// copies also swizzle; the bytes are the same). Only rates are measured: the sums are not looked at.

#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>

#include "probe.cuh"
#include "wgmma_forms.cuh"

constexpr int STAGES = 3, CONSUMERS = 2, STEP_BYTES = 128;

__device__ uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// A K-major operand of rows of 128 or 64 bytes, swizzled as wide as a row.
__device__ uint64_t descriptor(uint32_t address, int row_bytes) {
  uint64_t swizzle = row_bytes == 128 ? 1 : 2;
  return uint64_t(address >> 4 & 0x3FFF) | 1ull << 16 | uint64_t(8 * row_bytes >> 4) << 32 | swizzle << 62;
}

__device__ void wait(uint64_t* barrier, uint32_t phase) {
  asm volatile("{.reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra WAIT; DONE:}"
               ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}

__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

template <class Dtype, int T, int ROWS, bool SPARSE, bool REGISTERS>
struct Tile {
  static constexpr int W_ROW_BYTES = SPARSE ? STEP_BYTES / 2 : STEP_BYTES;
  static constexpr int X_BYTES = T * STEP_BYTES;
  static constexpr int W_BYTES = REGISTERS ? 0 : CONSUMERS * ROWS * 64 * W_ROW_BYTES;
  static constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + 1024;
};

template <class Dtype, int T, int ROWS, bool SPARSE, bool REGISTERS, bool COPIES>
__global__ void __launch_bounds__(384, 1) run_steps(int steps, const uint8_t* source, float* sink) {
  using Shape = Tile<Dtype, T, ROWS, SPARSE, REGISTERS>;
  using Mma = Wgmma<Dtype, T, SPARSE, REGISTERS>;
  constexpr int X_MMA_BYTES = SPARSE ? 64 : 32, MMAS = STEP_BYTES / X_MMA_BYTES;
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  uint8_t* shared = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(unaligned) + 1023) & ~uintptr_t(1023));
  for (int i = threadIdx.x * 4; i < STAGES * Shape::STAGE_BYTES; i += blockDim.x * 4)
    *reinterpret_cast<uint32_t*>(shared + i) = *reinterpret_cast<const uint32_t*>(source + i);
  if (threadIdx.x == 0)
    for (int stage = 0; stage < STAGES; ++stage) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + stage)));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(empty + stage)), "r"(CONSUMERS));
    }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  int group = threadIdx.x / 128;
  if (group == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (COPIES && threadIdx.x == CONSUMERS * 128) {
      for (int step = 0; step < steps; ++step) {
        int stage = step % STAGES;
        if (step >= STAGES) wait(empty + stage, (step / STAGES - 1) & 1);
        uint32_t barrier = shared_address(full + stage), bytes = Shape::STAGE_BYTES;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     ::"r"(shared_address(shared + stage * Shape::STAGE_BYTES)), "l"(source + stage * Shape::STAGE_BYTES),
                       "r"(bytes), "r"(barrier) : "memory");
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  float d[ROWS][T / 2];
  for (int row = 0; row < ROWS; ++row)
    for (int i = 0; i < T / 2; ++i) d[row][i] = 0.0f;
  uint32_t seed = (blockIdx.x * blockDim.x + threadIdx.x) * 8, a[4];
  for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const uint32_t*>(source + (threadIdx.x * 16 + i * 4) % 4096);
  uint32_t e = (hash32(seed) & 1) ? 0xE49DE49Du : 0x4D9E4D9Eu;
  for (int step = 0; step < steps; ++step) {
    int stage = step % STAGES;
    if (COPIES) wait(full + stage, step / STAGES & 1);
    uint32_t x = shared_address(shared + stage * Shape::STAGE_BYTES), w = x + Shape::X_BYTES;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int mma = 0; mma < MMAS; ++mma)
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        uint64_t x_desc = descriptor(x + mma * X_MMA_BYTES, STEP_BYTES);
        uint32_t w_tile = w + (group * ROWS + row) * 64 * Shape::W_ROW_BYTES + mma * 32;
        Mma::run(d[row], a, REGISTERS ? 0 : descriptor(w_tile, Shape::W_ROW_BYTES), x_desc, e);
      }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (COPIES && step > 0 && threadIdx.x % 128 == 0) arrive(empty + (step - 1) % STAGES);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  float sum = 0;
  for (int row = 0; row < ROWS; ++row)
    for (int i = 0; i < T / 2; ++i) sum += d[row][i];
  if (sum == 1.2345678f) *sink = sum;
}

template <class Dtype, int T, int ROWS, bool SPARSE, bool REGISTERS, bool COPIES>
void measure(const char* dtype, int sms, const uint8_t* source, float* sink) {
  using Shape = Tile<Dtype, T, ROWS, SPARSE, REGISTERS>;
  auto kernel = run_steps<Dtype, T, ROWS, SPARSE, REGISTERS, COPIES>;
  static_assert(Shape::SHARED_BYTES <= 227 * 1024, "the tile does not fit into shared memory");
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::SHARED_BYTES));
  constexpr int STEP_K = 4 * Wgmma<Dtype, T, false, false>::K;  // dense columns in 128 bytes of a token
  int steps = 30000;
  float ms = best_ms(3, [&] { kernel<<<sms, 384, Shape::SHARED_BYTES>>>(steps, source, sink); });
  double flops = 2.0 * CONSUMERS * ROWS * 64 * T * STEP_K * double(steps) * sms;
  std::printf("{\"probe\": \"wgmma_sp\", \"dtype\": \"%s\", \"rows\": %d, \"tokens\": %d, \"sparse\": %s, \"form\": \"%s\", "
              "\"copies\": %s, \"tflop_s\": %.1f}\n",
              dtype, CONSUMERS * ROWS * 64, T, SPARSE ? "true" : "false", REGISTERS ? "RS" : "SS",
              COPIES ? "true" : "false", flops / (ms * 1e-3) / 1e12);
  std::fflush(stdout);
}

template <class Dtype, int T, int ROWS, bool SPARSE, bool REGISTERS>
void both(const char* dtype, int sms, const uint8_t* source, float* sink) {
  measure<Dtype, T, ROWS, SPARSE, REGISTERS, false>(dtype, sms, source, sink);
  measure<Dtype, T, ROWS, SPARSE, REGISTERS, true>(dtype, sms, source, sink);
}

template <class Dtype>
void all(const char* dtype, int sms, const uint8_t* source, float* sink) {
  both<Dtype, 256, 1, false, false>(dtype, sms, source, sink);  // dense 128 x 256, what the best dense kernels use
  both<Dtype, 128, 1, true, false>(dtype, sms, source, sink);
  both<Dtype, 128, 1, true, true>(dtype, sms, source, sink);
  both<Dtype, 256, 1, true, false>(dtype, sms, source, sink);
  both<Dtype, 256, 1, true, true>(dtype, sms, source, sink);
  both<Dtype, 64, 2, true, true>(dtype, sms, source, sink);
  both<Dtype, 128, 2, true, false>(dtype, sms, source, sink);
  both<Dtype, 128, 2, true, true>(dtype, sms, source, sink);
  both<Dtype, 192, 2, true, false>(dtype, sms, source, sink);
  both<Dtype, 192, 2, true, true>(dtype, sms, source, sink);
}

// Random finite floats of both signs: bf16 in [2^-15, 2^-14) stays finite over all steps, e4m3 in [2^-6, 2^0).
__global__ void fill(uint32_t* words, int count, bool bf16) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) words[i] = bf16 ? (hash32(i) & 0x807F807Fu) | 0x38003800u : hash32(i) & 0xB7B7B7B7u;
}

int main() {
  constexpr int BYTES = 1 << 20;
  uint8_t* source;
  float* sink;
  CHECK(cudaMalloc(&source, BYTES));
  CHECK(cudaMalloc(&sink, sizeof *sink));
  int sms = num_sms();
  fill<<<BYTES / 4 / 256, 256>>>(reinterpret_cast<uint32_t*>(source), BYTES / 4, true);
  all<Bf16>("bf16", sms, source, sink);
  fill<<<BYTES / 4 / 256, 256>>>(reinterpret_cast<uint32_t*>(source), BYTES / 4, false);
  all<Fp8>("fp8", sms, source, sink);
}
