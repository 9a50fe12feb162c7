// What module.cpp binds. Pointers are to contiguous memory; `sample` is int64 [n].
#pragma once

#include <cstdint>

namespace tcm_fast {

// out: int32 [n, num_blocks, 4]
void philox_bits_cpu(int32_t* out, const int64_t* sample, int64_t n, int64_t num_blocks,
                     int64_t seed, int64_t step, uint32_t layer, int threads);
// out: fp32 [n, elements]
void philox_normal_cpu(float* out, const int64_t* sample, int64_t n, int64_t elements, int64_t seed,
                       int64_t step, uint32_t layer, int threads);
// out: uint8 [n, elements], 1 where kept
void dropout_mask_cpu(uint8_t* out, const int64_t* sample, int64_t n, int64_t elements,
                      int64_t seed, int64_t step, uint32_t layer, uint32_t threshold, int threads);
// out, x: fp32 [n, pixels, channels] (channels_last) or [n, channels, pixels]
void dropout_cpu(float* out, const float* x, const int64_t* sample, int64_t n, int64_t channels,
                 int64_t pixels, bool channels_last, int64_t seed, int64_t step, uint32_t layer,
                 uint32_t threshold, int threads);

#ifdef TCM_FAST_WITH_CUDA
// The same on the device: seed and step are read from its memory, so that a graph can be replayed
// with other values. Each returns nullptr or the error's text.
const char* philox_bits_cuda(int32_t* out, const int64_t* sample, int64_t n, int64_t num_blocks,
                             const int64_t* seed, const int64_t* step, uint32_t layer, void* stream);
const char* philox_normal_cuda(float* out, const int64_t* sample, int64_t n, int64_t elements,
                               const int64_t* seed, const int64_t* step, uint32_t layer,
                               void* stream);
const char* dropout_mask_cuda(uint8_t* out, const int64_t* sample, int64_t n, int64_t elements,
                              const int64_t* seed, const int64_t* step, uint32_t layer,
                              uint32_t threshold, void* stream);
#endif

}  // namespace tcm_fast
