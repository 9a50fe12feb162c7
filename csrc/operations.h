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

// dropout(silu((1 + scale) · GN(x + add) + shift)) on x fp32 [n, pixels, channels] (channels_last).
// weight, bias: [channels]; add, scale, shift: [n, channels] or null; mean, rstd: [n, groups];
// sample: null where threshold is 0.
struct GroupNormSilu {
  const float *x, *weight, *bias, *add, *scale, *shift;
  float *mean, *rstd;
  int64_t n, channels, pixels, groups;
  double eps;
  bool silu;
  const int64_t* sample;
  int64_t seed, step;
  uint32_t layer, threshold;
};
// y, past: what arrives at the output and at x past the operation (or null); x, add, scale, shift:
// what leaves, the last three null where their inputs are; affine: [2, n, channels], of weight and
// bias by sample, or null.
struct GroupNormSiluGrads {
  const float *y, *past;
  float *x, *add, *scale, *shift, *affine;
};
// Writes y, mean and rstd.
void group_norm_silu_fwd_cpu(const GroupNormSilu& op, float* y, int threads);
// Reads mean and rstd.
void group_norm_silu_bwd_cpu(const GroupNormSilu& op, const GroupNormSiluGrads& grads, int threads);

// One optimizer step; fused_step.h has the layout of table and options and what the others are.
// `scale` and `tracker` may be null.
void fused_step_cpu(const int64_t* table, int64_t tensors, int averages, const double* options,
                    double* norm, int64_t* skips, float* scale, int32_t* tracker, int threads);

#ifdef TCM_FAST_WITH_CUDA
// Of CUDA, such as 13000: what the extension was built with, and the newest that the driver runs (0
// without a driver).
int cuda_runtime_version();
int cuda_driver_version();

// The same on the device: seed and step are read from its memory, so that a graph can be replayed
// with other values. Each returns nullptr or the error's text.
const char* philox_bits_cuda(int32_t* out, const int64_t* sample, int64_t n, int64_t num_blocks,
                             const int64_t* seed, const int64_t* step, uint32_t layer,
                             void* stream);
const char* philox_normal_cuda(float* out, const int64_t* sample, int64_t n, int64_t elements,
                               const int64_t* seed, const int64_t* step, uint32_t layer,
                               void* stream);
const char* dropout_mask_cuda(uint8_t* out, const int64_t* sample, int64_t n, int64_t elements,
                              const int64_t* seed, const int64_t* step, uint32_t layer,
                              uint32_t threshold, void* stream);

// All addresses are the device's. chunks: int32 [num_chunks, 2], tensor and number within the
// tensor, the last num_rows of them rows that are normalised, of `longest` elements at most;
// scratch: fp64 [fused_step_scratch(...)], zeros at first.
int64_t fused_step_scratch(int64_t tensors, int64_t num_chunks);
const char* fused_step_cuda(const int64_t* table, int64_t tensors, int averages,
                            const int32_t* chunks, int64_t num_chunks, int64_t num_rows,
                            int64_t longest, const double* options, double* norm, int64_t* skips,
                            float* scale, int32_t* tracker, double* scratch, bool eight,
                            void* stream);
// `values` on the host to `to` on the device.
const char* store_options_cuda(double* to, const double* values, int64_t count, void* stream);
#endif

}  // namespace tcm_fast
