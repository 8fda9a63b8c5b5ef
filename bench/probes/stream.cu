// Which shape of loads streams packed 2:4 fragments fastest?  Loads alone, no arithmetic to speak of; one JSON line for
// each shape of grid and layer, in GB/s of the bytes asked for.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -o stream stream.cu && ./stream
//
// The unit is what the decode kernels read: a step of 16 rows x 256 columns is CHUNKS 16-byte loads a lane of values (8 at
// 16 bits, 4 at 8 bits, 2 at 4 bits) and one of metadata. Each lane has STEPS steps in flight before it uses the first.
// A block owns a run of steps; its warps take turns along it. Every launch of a graph reads another copy, so that
// nothing is found in the L2.

#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>

#include "probe.cuh"

enum Policy { PLAIN, NO_ALLOCATE, EVICT_FIRST };

template <Policy POLICY>
__device__ uint4 load16(const uint4* p) {
  uint4 v;
  if (POLICY == PLAIN)
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  else if (POLICY == NO_ALLOCATE)
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  else  // what Triton writes for eviction_policy="evict_first"
    asm volatile("{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; "
                 "ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%0,%1,%2,%3}, [%4], policy;}"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// values [steps][CHUNKS][32] and meta [steps][32], 16 bytes each; block b reads steps b * steps_per_block onwards.
template <int WARPS, int CHUNKS, int STEPS, Policy POLICY>
__global__ void __launch_bounds__(32 * WARPS) read_steps(const uint4* values, const uint4* meta, int steps_per_block,
                                                         int steps, uint32_t* sink) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first = blockIdx.x * steps_per_block, last = min(first + steps_per_block, steps);
  uint32_t mixed = 0;
  for (int step = first + warp * STEPS; step < last; step += WARPS * STEPS) {
    uint4 v[STEPS][CHUNKS + 1];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      size_t s = min(step + i, last - 1);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) v[i][c] = load16<POLICY>(values + (s * CHUNKS + c) * 32 + lane);
      v[i][CHUNKS] = load16<POLICY>(meta + s * 32 + lane);
    }
    // No load may move below the barrier and no use above the shuffle: or the compiler would use each load as it comes,
    // and keep few in flight.
    __syncwarp();
    mixed = __shfl_xor_sync(~0u, mixed, 1);
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
#pragma unroll
      for (int c = 0; c <= CHUNKS; ++c)
        mixed = (((mixed * 5 + v[i][c].x) * 5 + v[i][c].y) * 5 + v[i][c].z) * 5 + v[i][c].w;
  }
  if (mixed == 0x5EED1234u) *sink = mixed;
}

struct Layer {
  const char* name;
  int N, K;
};
constexpr Layer LAYERS[] = {{"8B o", 4096, 4096}, {"8B gate_up", 28672, 4096}, {"70B down", 8192, 28672}};
constexpr size_t COLD_BYTES = size_t(600) << 20;  // a graph walks over this much, ten times the L2

template <int WARPS, int CHUNKS, int STEPS, Policy POLICY>
void measure(const Layer& layer, const char* policy, const uint4* pool, int sms, uint32_t* sink) {
  auto kernel = read_steps<WARPS, CHUNKS, STEPS, POLICY>;
  int steps = layer.N / 16 * (layer.K / 256), resident;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * WARPS, 0));
  size_t words = size_t(steps) * (CHUNKS + 1) * 32, bytes = words * sizeof(uint4);
  int copies = int(COLD_BYTES / bytes), launches = copies < 4 ? 4 : copies > 40 ? 40 : copies;
  for (int per_sm : {1, 2, 4, 8, 16, 32}) {
    int blocks = per_sm * sms, share = (steps + blocks - 1) / blocks;
    if (share < WARPS * STEPS) break;  // some warps would have nothing to read
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < launches; ++i) {
      const uint4* values = pool + size_t(i % copies) * words;
      kernel<<<blocks, 32 * WARPS, 0, stream>>>(values, values + size_t(steps) * CHUNKS * 32, share, steps, sink);
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&replay, graph, 0));
    float ms = best_ms(4, [&] { CHECK(cudaGraphLaunch(replay, stream)); }, stream);
    double us = ms * 1e3 / launches;
    std::printf("{\"probe\": \"stream\", \"layer\": \"%s\", \"bytes\": %zu, \"policy\": \"%s\", \"warps\": %d, "
                "\"chunks\": %d, \"steps\": %d, \"blocks_per_sm\": %d, \"resident\": %d, \"us\": %.2f, \"gb_s\": %.0f}\n",
                layer.name, bytes, policy, WARPS, CHUNKS, STEPS, per_sm, resident, us, bytes / us / 1e3);
    std::fflush(stdout);
    CHECK(cudaGraphExecDestroy(replay));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
  }
}

template <int WARPS>
void all(const Layer& layer, const uint4* pool, int sms, uint32_t* sink) {
  measure<WARPS, 8, 1, EVICT_FIRST>(layer, "evict_first", pool, sms, sink);
  measure<WARPS, 8, 2, EVICT_FIRST>(layer, "evict_first", pool, sms, sink);
  measure<WARPS, 4, 1, EVICT_FIRST>(layer, "evict_first", pool, sms, sink);
  measure<WARPS, 4, 2, EVICT_FIRST>(layer, "evict_first", pool, sms, sink);
  measure<WARPS, 4, 4, EVICT_FIRST>(layer, "evict_first", pool, sms, sink);
  measure<WARPS, 2, 2, EVICT_FIRST>(layer, "evict_first", pool, sms, sink);
  measure<WARPS, 2, 4, EVICT_FIRST>(layer, "evict_first", pool, sms, sink);
}

int main() {
  uint4* pool;
  uint32_t* sink;
  CHECK(cudaMalloc(&pool, COLD_BYTES));
  CHECK(cudaMalloc(&sink, sizeof *sink));
  CHECK(cudaMemset(pool, 0x5A, COLD_BYTES));
  int sms = num_sms();
  for (const Layer& layer : LAYERS) {
    all<1>(layer, pool, sms, sink);
    all<2>(layer, pool, sms, sink);
    all<4>(layer, pool, sms, sink);
    all<8>(layer, pool, sms, sink);
    all<16>(layer, pool, sms, sink);
    measure<4, 8, 1, PLAIN>(layer, "plain", pool, sms, sink);
    measure<4, 8, 1, NO_ALLOCATE>(layer, "no_allocate", pool, sms, sink);
    measure<8, 8, 1, PLAIN>(layer, "plain", pool, sms, sink);
    measure<8, 8, 1, NO_ALLOCATE>(layer, "no_allocate", pool, sms, sink);
  }
}
