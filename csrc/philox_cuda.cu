#include <cuda_runtime.h>

#include <algorithm>

#include "bounds.h"
#include "operations.h"
#include "philox.h"

namespace tcm_fast {
namespace {

constexpr int kThreads = 256;

dim3 grid_of(int64_t n, int64_t num_blocks) {
  return dim3(static_cast<unsigned>((num_blocks + kThreads - 1) / kThreads),
              static_cast<unsigned>(std::min<int64_t>(n, 65535)));
}

// One thread makes one block of Philox, for the samples blockIdx.y, blockIdx.y + gridDim.y, ...
template <typename Body>
__global__ void __launch_bounds__(kThreads)
    for_each_block(const int64_t* sample, int64_t n, int64_t num_blocks, const int64_t* seed,
                   const int64_t* step, uint32_t layer, Body body) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= num_blocks) return;
  const Stream stream(*seed, *step, layer);
  for (int64_t i = blockIdx.y; i < n; i += gridDim.y) {
    body(i, block, philox(static_cast<uint32_t>(block), static_cast<uint32_t>(sample[i]), stream));
  }
}

template <typename Body>
const char* launch(const int64_t* sample, int64_t n, int64_t num_blocks, const int64_t* seed,
                   const int64_t* step, uint32_t layer, void* stream, Body body) {
  if (n == 0 || num_blocks == 0) return nullptr;
  for_each_block<<<grid_of(n, num_blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      sample, n, num_blocks, seed, step, layer, body);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

struct StoreBits {
  int32_t* out;
  int64_t num_blocks;
  __device__ void operator()(int64_t i, int64_t block, const Words& words) const {
    TCM_FAST_BOUNDS(block, 1, num_blocks);
    reinterpret_cast<uint4*>(out)[i * num_blocks + block] =
        make_uint4(words.w0, words.w1, words.w2, words.w3);
  }
};

struct StoreNormals {
  float* out;
  int64_t elements;
  __device__ void operator()(int64_t i, int64_t block, const Words& words) const {
    TCM_FAST_BOUNDS(4 * block, 1, elements);
    const Pair low = normal_pair(words.w0, words.w1);
    const Pair high = normal_pair(words.w2, words.w3);
    const float values[4] = {low.first, low.second, high.first, high.second};
    for (int j = 0; j < 4; ++j) {
      if (4 * block + j < elements) out[i * elements + 4 * block + j] = values[j];
    }
  }
};

struct StoreMask {
  uint8_t* out;
  int64_t elements;
  uint32_t threshold;
  __device__ void operator()(int64_t i, int64_t block, const Words& words) const {
    TCM_FAST_BOUNDS(8 * block, 1, elements);
    const uint64_t kept = kept_bytes(words, threshold);
    for (int lane = 0; lane < 8; ++lane) {
      const int64_t e = 8 * block + lane;
      if (e < elements) out[i * elements + e] = static_cast<uint8_t>(kept >> (8 * lane));
    }
  }
};

}  // namespace

const char* philox_bits_cuda(int32_t* out, const int64_t* sample, int64_t n, int64_t num_blocks,
                             const int64_t* seed, const int64_t* step, uint32_t layer,
                             void* stream) {
  return launch(sample, n, num_blocks, seed, step, layer, stream, StoreBits{out, num_blocks});
}

const char* philox_normal_cuda(float* out, const int64_t* sample, int64_t n, int64_t elements,
                               const int64_t* seed, const int64_t* step, uint32_t layer,
                               void* stream) {
  return launch(sample, n, blocks_of(elements, 4), seed, step, layer, stream,
                StoreNormals{out, elements});
}

const char* dropout_mask_cuda(uint8_t* out, const int64_t* sample, int64_t n, int64_t elements,
                              const int64_t* seed, const int64_t* step, uint32_t layer,
                              uint32_t threshold, void* stream) {
  return launch(sample, n, blocks_of(elements, 8), seed, step, layer, stream,
                StoreMask{out, elements, threshold});
}

}  // namespace tcm_fast
