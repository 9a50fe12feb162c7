// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the unit
// Gaussians made from it, for host and device. kernels/philox.py states the same in PyTorch; all
// three agree bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TCM_FAST_INLINE __host__ __device__ __forceinline__
#else
#define TCM_FAST_INLINE inline __attribute__((always_inline))
#endif

namespace tcm_fast {

struct Words {
  uint32_t w0, w1, w2, w3;
};

// What all blocks of a call share: the high counter words and the key.
struct Stream {
  uint32_t step_low, step_high, seed, layer;

  TCM_FAST_INLINE Stream(int64_t seed, int64_t step, uint32_t layer)
      : step_low(static_cast<uint32_t>(step)),
        step_high(static_cast<uint32_t>(static_cast<uint64_t>(step) >> 32)),
        seed(static_cast<uint32_t>(seed)),
        layer(layer) {}
};

TCM_FAST_INLINE Words philox(uint32_t block, uint32_t sample, const Stream& stream) {
  uint32_t c0 = block, c1 = sample, c2 = stream.step_low, c3 = stream.step_high;
  uint32_t k0 = stream.seed, k1 = stream.layer;
  for (int round = 0; round < 7; ++round) {
    const uint64_t p = uint64_t{0xD2511F53u} * c0, q = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(q >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(q);
    c3 = static_cast<uint32_t>(p);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// 1 where the low or high 16-bit lane of a word is kept (lane >= threshold), else 0.
TCM_FAST_INLINE uint32_t low_kept(uint32_t word, uint32_t threshold) {
  return ((word & 0xFFFFu) + 65536u - threshold) >> 16;
}
TCM_FAST_INLINE uint32_t high_kept(uint32_t word, uint32_t threshold) {
  return ((word >> 16) + 65536u - threshold) >> 16;
}

// A block's eight mask bytes in the order of its lanes 0 ... 7: the low half of word 0, its high
// half, the low half of word 1, ...
TCM_FAST_INLINE uint64_t kept_bytes(Words words, uint32_t threshold) {
  const uint32_t first = low_kept(words.w0, threshold) | high_kept(words.w0, threshold) << 8 |
                         low_kept(words.w1, threshold) << 16 | high_kept(words.w1, threshold) << 24;
  const uint32_t second = low_kept(words.w2, threshold) | high_kept(words.w2, threshold) << 8 |
                          low_kept(words.w3, threshold) << 16 |
                          high_kept(words.w3, threshold) << 24;
  return first | static_cast<uint64_t>(second) << 32;
}

// Products and sums that no compiler may fuse: the host's sources are built with -ffp-contract=off.
#if defined(__CUDA_ARCH__)
TCM_FAST_INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
TCM_FAST_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
TCM_FAST_INLINE float root(float a) { return __fsqrt_rn(a); }
#else
TCM_FAST_INLINE float mul(float a, float b) { return a * b; }
TCM_FAST_INLINE float add(float a, float b) { return a + b; }
TCM_FAST_INLINE float root(float a) { return std::sqrt(a); }
#endif

template <int N>
TCM_FAST_INLINE float polynomial(float x, const float (&coefficients)[N]) {
  float y = coefficients[N - 1];
  for (int i = N - 2; i >= 0; --i) y = add(mul(y, x), coefficients[i]);
  return y;
}

struct Pair {
  float first, second;
};

// Box-Muller: sqrt(-2 ln u(radius_word)) · (cos, sin)(2π u(angle_word)), u(w) = ((w>>8) + 1/2)
// 2^-24.
TCM_FAST_INLINE Pair normal_pair(uint32_t radius_word, uint32_t angle_word) {
  // u = m 2^-25 with m odd; m 2^j in [2^24, 2^25), so -ln u = j ln 2 - log1p(-f) with f in (0,
  // 1/2].
  const uint32_t k = radius_word >> 8, m = 2 * k + 1;
  const float leading = static_cast<float>(static_cast<int32_t>(k ? 2 * k : 1));
  uint32_t bits;
  std::memcpy(&bits, &leading, sizeof bits);
  const uint32_t j = 24 + 127 - (bits >> 23);
  const float f = mul(static_cast<float>(static_cast<int32_t>((1u << 25) - (m << j))), 0x1p-25f);
  // -2 log1p(-f) / f
  const float logarithm[] = {2.0f,         1.00000238f,  0.666510344f, 0.503913581f, 0.350881547f,
                             0.681492925f, -1.18017745f, 3.91974115f,  -4.91792393f, 3.46722388f};
  const float radius = root(add(mul(static_cast<float>(static_cast<int32_t>(j)), 1.38629436f),
                                mul(f, polynomial(f, logarithm))));

  // The angle is `quarter` quarter turns and s/8 of a turn, s in (-1, 1).
  const uint32_t a = 2 * (angle_word >> 8) + 1, quarter = (a + (1u << 22)) >> 23;
  const float s = mul(
      static_cast<float>(static_cast<int32_t>(a) - static_cast<int32_t>(quarter << 23)), 0x1p-22f);
  const float z = mul(s, s);
  const float sines[] = {0.785398185f, -0.0807454363f, 0.00249000685f, -3.59542901e-05f};
  const float cosines[] = {1.0f, -0.308425128f, 0.0158543251f, -0.000325938599f, 3.52979714e-06f};
  const float sine = mul(s, polynomial(z, sines)), cosine = polynomial(z, cosines);
  const float x = quarter & 1 ? -sine : cosine, y = quarter & 1 ? cosine : sine;
  const float sign = quarter & 2 ? -1.0f : 1.0f;
  return {mul(radius, mul(sign, x)), mul(radius, mul(sign, y))};
}

// Number of blocks of `per_block` elements that hold `elements`.
TCM_FAST_INLINE int64_t blocks_of(int64_t elements, int per_block) {
  return (elements + per_block - 1) / per_block;
}

}  // namespace tcm_fast
