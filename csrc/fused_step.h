// One optimizer step on many tensors: what host and device share. Adam and AdamW as in Kingma & Ba
// 2015 and Loshchilov & Hutter 2019, RAdam as in Liu et al. 2020, all with torch.optim's
// conventions: where epsilon stands, L2 or decoupled weight decay, RAdam unadapted while its length
// is at most 5.
//
// A step has three parts. (1) The gradients' sum of squares, by chunks. (2) `prepare`: whether to
// skip, the gradients' common factor (unscaling and clipping), the loss scale's next value, and for
// each tensor the coefficients of its update. (3) The update itself, by chunks: moments, weights,
// averages and 16-bit copies, each element read and written once.
//
// Of a tensor whose rows are normalised (Karras et al. 2024) only each row's direction counts. With
// normalize(w) = w / (rms(w) + 1e-4) over a row of n elements, the network computes with
// normalize(w)/√n, which is this tensor's copy, and its gradient is with respect to that: part 1
// finds for each row what takes it to w, and part 3 normalises the new row in place.
//
// kernels/fused_step.py states the same in PyTorch. Sums and products are not fused, so that both
// halves round alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bounds.h"
#include "philox.h"

namespace tcm_fast {

// A tensor is one row of int64: these fields, then the addresses of its averages.
enum Field {
  kParam,     // fp32 [numel]
  kGrad,      // fp32 [numel], or 0: only averages and copy follow the weights
  kExpAvg,    // fp32 or bf16 [numel], or 8-bit; 0 without gradient, as the next two
  kExpAvgSq,  // likewise
  kStep,      // fp32 scalar, steps taken
  kCopy,      // 16-bit [numel], or 0
  kNumel,
  kGroup,  // row of the groups' options
  kFlags,
  kRow,  // elements of a row, where rows are normalised; else 0
  kFields
};
constexpr int64_t kAligned = 1;    // all addresses allow accesses of 4 elements at once
constexpr int64_t kBfloat = 2;     // the copy is bf16, else fp16
constexpr int64_t kMoments16 = 4;  // the moments are bf16, rounded at random
constexpr int64_t kFloatCopy = 8;  // the copy is fp32
constexpr int64_t kMoments8 = 32;  // the moments are 8-bit, by blocks; kAligned too

// The options are fp64: these, then one beta for each average, then kGroupFields for each group.
enum Option { kMaxNorm, kGrowth, kBackoff, kInterval, kSeed, kOptions };
enum GroupOption { kRate, kBeta1, kBeta2, kEpsilon, kDecay, kKind, kGroupFields };
constexpr int kRAdam = 1, kDecoupled = 2;  // bits of kKind

// A pass over the table takes this many elements of one tensor at a time; sums are kept for each.
constexpr int64_t kChunk = 8192;

constexpr double kNormEpsilon = 1e-4;

// What one step changes besides the tensors. `scale` and `tracker` are null without a loss scale.
struct Control {
  double* norm;      // of the unscaled gradient; NaN where an element is not finite
  int64_t* skips;    // steps skipped so far
  float* scale;      // loss scale
  int32_t* tracker;  // steps since it changed
};

// What the update of a whole step shares.
struct Shared {
  float factor;  // of the gradients: clipping over loss scale
  int32_t skip;
};

// Of one tensor's update.
struct Coefficients {
  float weight1, keep1;  // 1 - beta1, beta1
  float weight2, keep2;
  float l2;          // weight decay added to the gradient
  float shrink;      // decoupled: 1 - lr · decay
  float size;        // of the step
  float root_scale;  // of the second moment's root
  float epsilon;
  int32_t adapted;
};

// Of one row's gradient: across · grad - along · param is with respect to the row itself.
struct Projection {
  float across, along;
};

#if defined(__CUDA_ARCH__)
TCM_FAST_INLINE float quotient(float a, float b) { return __fdiv_rn(a, b); }
#else
TCM_FAST_INLINE float quotient(float a, float b) { return a / b; }
#endif

// a + (b - a) · weight, from the nearer end as in torch.lerp; keep = 1 - weight.
TCM_FAST_INLINE float lerp(float a, float b, float weight, float keep) {
  const float way = add(b, -a);
  return weight < 0.5f ? add(a, mul(weight, way)) : add(b, -mul(way, keep));
}

TCM_FAST_INLINE void update_element(float& param, float grad, float& exp_avg, float& exp_avg_sq,
                                    float factor, const Coefficients& c) {
  grad = add(mul(grad, factor), mul(c.l2, param));
  exp_avg = lerp(exp_avg, grad, c.weight1, c.keep1);
  exp_avg_sq = add(mul(exp_avg_sq, c.keep2), mul(mul(grad, grad), c.weight2));
  const float adapted = add(mul(root(exp_avg_sq), c.root_scale), c.epsilon);
  const float denominator = c.adapted ? adapted : 1.0f;
  param = add(mul(param, c.shrink), -quotient(mul(c.size, exp_avg), denominator));
}

TCM_FAST_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Round to nearest even, as integer arithmetic that vectorises everywhere.
TCM_FAST_INLINE uint16_t to_bfloat(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

TCM_FAST_INLINE uint16_t to_half(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  float size;
  std::memcpy(&size, &magnitude, sizeof size);
  const uint32_t rebiased = magnitude - (112u << 23);
  const uint32_t normal = (rebiased + 0xFFFu + ((rebiased >> 13) & 1u)) >> 13;
  // Floats in [1/2, 1) are multiples of 2^-24, which is the subnormal halves' unit.
  const uint32_t subnormal = bits_of(add(size, 0.5f)) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // from 65520 on
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

TCM_FAST_INLINE uint16_t to_16_bits(float x, bool bfloat) {
  return bfloat ? to_bfloat(x) : to_half(x);
}

TCM_FAST_INLINE float from_bfloat(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To one of the two neighbours, the nearer the likelier, so that the mean is x: a moment moves by
// less than half of bf16's last place in most steps, and rounding to the nearest would stop it.
TCM_FAST_INLINE uint16_t to_bfloat_at_random(float x, uint32_t random_16_bits) {
  return static_cast<uint16_t>((bits_of(x) + random_16_bits) >> 16);
}

// The random bits of a tensor's step: word e % 4 of block e / 4 for element e, the low half for the
// first moment, the high half for the second.
constexpr uint32_t kMomentsLayer = 0x6D6F6D74u;
TCM_FAST_INLINE Stream moments_stream(const double* options, float step) {
  return Stream(static_cast<int64_t>(options[kSeed]), static_cast<int64_t>(step), kMomentsLayer);
}

TCM_FAST_INLINE void update_element_16(float& param, float grad, uint16_t& exp_avg,
                                       uint16_t& exp_avg_sq, float factor, const Coefficients& c,
                                       uint32_t word) {
  float first = from_bfloat(exp_avg), second = from_bfloat(exp_avg_sq);
  update_element(param, grad, first, second, factor, c);
  exp_avg = to_bfloat_at_random(first, word & 0xFFFFu);
  exp_avg_sq = to_bfloat_at_random(second, word >> 16);
}

// Moments of 8 bits are floats with three bits of mantissa, each block of kBlock8 elements (of a
// row, where rows are normalised; the last block of a row or tensor may be shorter) with exponents
// of its own: kTop1 = 127 magnitudes and a sign for the first moment, kTop2 = 255 for the second.
// The largest magnitude has the block's exponent and a full mantissa, code 0 is zero. A moment is
// one array of bytes: the codes [numel], then the blocks' exponents. Floats, and blocks scaled by
// powers of two, for a value then stays one whatever the rest of its block does, and random
// rounding adds nothing to a moment that does not move.
constexpr int64_t kBlock8 = 128;
constexpr uint32_t kTop1 = 127, kTop2 = 255;

TCM_FAST_INLINE int64_t blocks_in(int64_t count) { return (count + kBlock8 - 1) / kBlock8; }

// Of a block whose largest magnitude has these bits; no less than what keeps all codes normal.
TCM_FAST_INLINE uint32_t exponent_of_block(uint32_t largest) {
  const uint32_t exponent = (largest + 0xFFFFFu) >> 23;
  return exponent < 32u ? 32u : exponent;
}

TCM_FAST_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

TCM_FAST_INLINE uint32_t first_code(uint32_t exponent, uint32_t top) {
  return (exponent << 3 | 7u) - top;  // the top 11 bits of the float that code 0 would be
}

TCM_FAST_INLINE float from_8_bits(uint32_t code, uint32_t exponent, uint32_t top) {
  const uint32_t magnitude = code & top;
  const uint32_t bits = magnitude ? (first_code(exponent, top) + magnitude) << 20 : 0u;
  return float_of(bits | (code & ~top) << 24);
}

// To one of the two neighbours at random. What lies below the least magnitude becomes that or zero,
// but a second moment only if it is zero: a step divides by its root.
TCM_FAST_INLINE uint32_t to_8_bits(float x, uint32_t exponent, uint32_t top,
                                   uint32_t random_16_bits) {
  const uint32_t bits = bits_of(x), size = bits & 0x7FFFFFFFu, zero = first_code(exponent, top);
  const uint32_t least = (zero + 1u) << 20;
  const uint32_t above = (size + (random_16_bits << 4 | 8u)) >> 20;
  const float bar = mul(float_of(least), (static_cast<float>(random_16_bits) + 0.5f) * 0x1p-16f);
  const bool up = top == kTop2 ? size != 0u : float_of(size) > bar;
  const uint32_t code = size < least ? static_cast<uint32_t>(up) : above - zero;
  return code | (bits >> 31) * ((top + 1u) & 0xFFu);
}

// What a row is multiplied by, from its sum of squares: to be normalised, and to be the copy.
TCM_FAST_INLINE double row_factor(double squares, int64_t n) {
  return 1 / (sqrt(squares / static_cast<double>(n)) + kNormEpsilon);
}
TCM_FAST_INLINE double copy_factor(double squares, int64_t n) {
  return row_factor(squares, n) / sqrt(static_cast<double>(n));
}

TCM_FAST_INLINE float projected(float grad, float param, const Projection& p) {
  return add(mul(p.across, grad), -mul(p.along, param));
}

// A row's projection, and its projected gradient's sum of squares in place of the gradient's, from
// the sums of grad², param² and grad · param. Where finite gradients' squares overflow the sum is
// infinite, and the step's factor 0.
TCM_FAST_INLINE Projection projection_of(double& grads, double params, double product, int64_t n) {
  const double rms = sqrt(params / static_cast<double>(n));
  const double across = copy_factor(params, n);
  double along = rms > 0 ? across * product / (n * rms * (rms + kNormEpsilon)) : 0;
  double left = across * across * grads - 2 * across * along * product + along * along * params;
  if (grads != grads) {
    left = grads;
  } else if (!(left - left == 0)) {
    left = INFINITY, along = 0;
  }
  grads = left < 0 ? 0 : left;  // a NaN stays
  return {static_cast<float>(across), static_cast<float>(along)};
}

// The coefficients of a tensor's step number `step`, in fp64 as torch has them.
TCM_FAST_INLINE Coefficients coefficients_of(const double* group, double step) {
  const double rate = group[kRate], beta1 = group[kBeta1], beta2 = group[kBeta2];
  const int kind = static_cast<int>(group[kKind]);
  const bool decoupled = kind & kDecoupled;
  const double power2 = pow(beta2, step);
  const double correction1 = 1 - pow(beta1, step), correction2 = 1 - power2;
  double size = rate / correction1, root_scale = 1 / sqrt(correction2);
  bool adapted = true;
  if (kind & kRAdam) {
    const double longest = 2 / (1 - beta2) - 1;
    const double length = longest - 2 * step * power2 / correction2;
    adapted = length > 5;
    root_scale = 1;
    if (adapted) {
      const double rectified = (length - 4) * (length - 2) * longest;
      size *= sqrt(correction2 * rectified / ((longest - 4) * (longest - 2) * length));
    }
  }
  Coefficients c;
  c.weight1 = static_cast<float>(1 - beta1);
  c.keep1 = static_cast<float>(beta1);
  c.weight2 = static_cast<float>(1 - beta2);
  c.keep2 = static_cast<float>(beta2);
  c.l2 = decoupled ? 0.0f : static_cast<float>(group[kDecay]);
  c.shrink = decoupled ? static_cast<float>(1 - rate * group[kDecay]) : 1.0f;
  c.size = static_cast<float>(size);
  c.root_scale = static_cast<float>(root_scale);
  c.epsilon = static_cast<float>(group[kEpsilon]);
  c.adapted = adapted;
  return c;
}

// From the sum of squares of the scaled gradient to what the step shares; advances the loss scale
// by torch.amp.GradScaler's rules and counts a skip.
TCM_FAST_INLINE Shared prepare(double sum_of_squares, const double* options,
                               const Control& control) {
  const double scale = control.scale ? static_cast<double>(*control.scale) : 1.0;
  const double norm = sqrt(sum_of_squares) / scale;
  const bool skip = norm != norm;
  // torch.nn.utils.clip_grad_norm_'s coefficient.
  const double clip = options[kMaxNorm] / (norm + 1e-6);
  Shared shared;
  shared.skip = skip;
  shared.factor = static_cast<float>((clip < 1 ? clip : 1.0) / scale);
  *control.norm = norm;
  if (skip) ++*control.skips;
  if (control.scale) {
    int32_t tracker = skip ? 0 : *control.tracker + 1;
    float next = static_cast<float>(skip ? scale * options[kBackoff] : scale);
    if (tracker == static_cast<int32_t>(options[kInterval])) {
      const float grown = static_cast<float>(scale * options[kGrowth]);
      next = grown <= 3.402823466e38f ? grown : next;
      tracker = 0;
    }
    *control.scale = next;
    *control.tracker = tracker;
  }
  return shared;
}

}  // namespace tcm_fast
