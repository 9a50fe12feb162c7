#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bounds.h"
#include "cpu.h"
#include "operations.h"
#include "philox.h"

namespace tcm_fast {
namespace {

// Elements that stay in the first-level cache from one pass over them to the next.
constexpr int64_t kRun = 2048;

struct Logistic {
  float numerator, denominator;  // of 1 / (1 + e^-z), within 4 units in the last place
};

// By e^-|z|, with |z| up to 64: denormal numbers would cost a hundred cycles each.
TCM_FAST_INLINE Logistic logistic(float z) {
  uint32_t bits;
  std::memcpy(&bits, &z, sizeof bits);
  const uint32_t magnitude = std::min(bits & 0x7FFFFFFFu, 0x42800000u);
  float x;
  std::memcpy(&x, &magnitude, sizeof x);
  // e^-x = 2^k e^r with |r| <= ln 2 / 2: k stands in the low bits of its sum with 3 · 2^22.
  const float shifted = 12582912.0f - x * 1.44269504f;
  const float k = shifted - 12582912.0f;
  const float r = k * 2.12194440e-4f - (x + k * 0.693359375f);
  const float series[] = {1.0f, 1.0f, 0.4999923f, 0.16667114f, 0.041890115f, 0.008312525f};
  uint32_t exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent << 23) + 0x3F800000u;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  const float e = polynomial(r, series) * power;
  return {z < 0.0f ? e : 1.0f, 1.0f + e};
}

// Of each channel, the sum of x - origin and of its square over `pixels` rows of x.
TCM_FAST_VECTOR
void moments(float* sums, float* squares, const float* x, const float* origin, int64_t pixels,
             int64_t channels) {
  std::fill_n(sums, channels, 0.0f);
  std::fill_n(squares, channels, 0.0f);
  for (int64_t p = 0; p < pixels; ++p, x += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float v = x[c] - origin[c];
      sums[c] += v;
      squares[c] += v * v;
    }
  }
}

TCM_FAST_VECTOR
void normalise(float* z, const float* x, const float* origin, const float* slope,
               const float* offset, int64_t pixels, int64_t channels) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, z += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) z[c] = (x[c] - origin[c]) * slope[c] + offset[c];
  }
}

TCM_FAST_VECTOR
void silu(float* z, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Logistic s = logistic(z[i]);
    z[i] = z[i] * s.numerator / s.denominator;
  }
}

// From the gradient at silu(z) the one at z.
TCM_FAST_VECTOR
void silu_backward(float* grad, const float* z, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Logistic l = logistic(z[i]);
    const float s = l.numerator / l.denominator;
    grad[i] *= s + z[i] * s * (1.0f - s);
  }
}

TCM_FAST_VECTOR
void keep(float* x, const uint8_t* kept, int64_t count, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float value = x[i] * scale;
    x[i] = kept[i] ? value : 0.0f;
  }
}

// Added to sum_b and sum_a: of each channel, the gradient at z and its product with x - origin.
TCM_FAST_VECTOR
void accumulate(float* sum_b, float* sum_a, const float* grad, const float* x, const float* origin,
                int64_t pixels, int64_t channels) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, grad += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      sum_b[c] += grad[c];
      sum_a[c] += grad[c] * (x[c] - origin[c]);
    }
  }
}

// grad: at z, then at x; total: of each channel, its sum.
TCM_FAST_VECTOR
void through_norm(float* grad, float* total, const float* x, const float* origin,
                  const float* slope, const float* from_all, const float* from_v, int64_t pixels,
                  int64_t channels) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, grad += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      grad[c] = grad[c] * slope[c] - from_all[c] - (x[c] - origin[c]) * from_v[c];
      total[c] += grad[c];
    }
  }
}

TCM_FAST_VECTOR
void add_to(float* out, const float* x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += x[i];
}

TCM_FAST_VECTOR
void mask_of_blocks(uint64_t* kept, int64_t first, int64_t num_blocks, uint32_t sample,
                    Stream stream, uint32_t threshold) {
#pragma omp simd
  for (int64_t block = 0; block < num_blocks; ++block) {
    const Words words = philox(static_cast<uint32_t>(first + block), sample, stream);
    kept[block] = kept_bytes(words, threshold);
  }
}

// What a thread needs for one sample after another.
struct Sample {
  const GroupNormSilu& op;
  int64_t width = op.channels / op.groups, size = op.pixels * op.channels;
  int64_t rows = std::max<int64_t>(kRun / op.channels, 1);  // of a run
  Stream stream{op.seed, op.step, op.layer};
  float keep_scale = static_cast<float>(65536.0 / (65536.0 - op.threshold));
  std::vector<float> origin, slope, offset, first, second;
  std::vector<uint64_t> kept;

  explicit Sample(const GroupNormSilu& op)
      : op(op),
        origin(op.channels),
        slope(op.channels),
        offset(op.channels),
        first(op.channels),
        second(op.channels),
        kept(op.threshold ? rows * op.channels / 8 + 2 : 0) {}

  // Reads `of_sample` [n, channels] where it is given.
  static float at(const float* of_sample, int64_t i) { return of_sample ? of_sample[i] : 0.0f; }

  // Mean and 1 / standard deviation of each group.
  void measure(int64_t n) {
    const float* x = op.x + n * size;
    const double count = static_cast<double>(width * op.pixels);
    // The first pass finds the mean, the second what that lacks and the variance: no digits are
    // lost to a large mean.
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t c = 0; c < op.channels; ++c) {
        const float mean = pass ? op.mean[n * op.groups + c / width] : 0.0f;
        origin[c] = mean - at(op.add, n * op.channels + c);
      }
      moments(first.data(), second.data(), x, origin.data(), op.pixels, op.channels);
      for (int64_t g = 0; g < op.groups; ++g) {
        double sum = 0, squares = 0;
        for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += first[c], squares += second[c];
        const double rest = sum / count, variance = std::max(squares / count - rest * rest, 0.0);
        float& mean = op.mean[n * op.groups + g];
        mean = static_cast<float>((pass ? mean : 0.0) + rest);
        op.rstd[n * op.groups + g] = static_cast<float>(1 / std::sqrt(variance + op.eps));
      }
    }
  }

  // z = (x - origin) slope + offset
  void prepare(int64_t n) {
    for (int64_t c = 0; c < op.channels; ++c) {
      const int64_t i = n * op.channels + c, g = n * op.groups + c / width;
      const float gain = 1.0f + at(op.scale, i);
      origin[c] = op.mean[g] - at(op.add, i);
      slope[c] = op.rstd[g] * op.weight[c] * gain;
      offset[c] = op.bias[c] * gain + at(op.shift, i);
    }
  }

  template <typename Body>
  void by_runs(const Body& body) const {
    for (int64_t p = 0; p < op.pixels; p += rows) {
      const int64_t pixels = std::min(rows, op.pixels - p);
      TCM_FAST_BOUNDS(p * op.channels, pixels * op.channels, size);
      body(p * op.channels, pixels, pixels * op.channels);
    }
  }

  // Drops of a sample's elements e ... e + count, which stand at x.
  void drop(float* x, int64_t n, int64_t e, int64_t count) {
    if (op.threshold == 0) return;
    const int64_t blocks = blocks_of(e % 8 + count, 8);
    TCM_FAST_BOUNDS(0, blocks, static_cast<int64_t>(kept.size()));
    mask_of_blocks(kept.data(), e / 8, blocks, static_cast<uint32_t>(op.sample[n]), stream,
                   op.threshold);
    keep(x, reinterpret_cast<const uint8_t*>(kept.data()) + e % 8, count, keep_scale);
  }

  void forward(int64_t n, float* y) {
    measure(n);
    prepare(n);
    by_runs([&](int64_t e, int64_t pixels, int64_t count) {
      normalise(y + e, op.x + n * size + e, origin.data(), slope.data(), offset.data(), pixels,
                op.channels);
      if (op.silu) silu(y + e, count);
      drop(y + e, n, e, count);
    });
  }

  void backward(int64_t n, const GroupNormSiluGrads& grads, float* z) {
    const float *x = op.x + n * size, *grad_y = grads.y + n * size;
    float* grad_x = grads.x + n * size;
    prepare(n);
    float *sum_b = first.data(), *sum_a = second.data();
    std::fill_n(sum_b, op.channels, 0.0f);
    std::fill_n(sum_a, op.channels, 0.0f);
    by_runs([&](int64_t e, int64_t pixels, int64_t count) {
      std::copy_n(grad_y + e, count, grad_x + e);
      drop(grad_x + e, n, e, count);
      if (op.silu) {
        normalise(z, x + e, origin.data(), slope.data(), offset.data(), pixels, op.channels);
        silu_backward(grad_x + e, z, count);
      }
      accumulate(sum_b, sum_a, grad_x + e, x + e, origin.data(), pixels, op.channels);
    });
    // grad_x = rstd (w gain g - mean of it over the group - xhat · mean of (w gain g xhat)).
    float *from_all = offset.data(), *from_v = z;  // neither is needed any more
    for (int64_t g = 0; g < op.groups; ++g) {
      const float rstd = op.rstd[n * op.groups + g];
      double to_a = 0, to_b = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const int64_t i = n * op.channels + c;
        const float gain = 1.0f + at(op.scale, i), a = sum_a[c] * rstd, b = sum_b[c];
        to_a += op.weight[c] * gain * a;
        to_b += op.weight[c] * gain * b;
        if (grads.affine) {
          grads.affine[i] = gain * a;
          grads.affine[op.n * op.channels + i] = gain * b;
        }
        if (grads.scale) grads.scale[i] = op.weight[c] * a + op.bias[c] * b;
        if (grads.shift) grads.shift[i] = b;
      }
      const double count = static_cast<double>(width * op.pixels);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        from_all[c] = static_cast<float>(rstd * (to_b / count));
        from_v[c] = static_cast<float>(rstd * (rstd * (to_a / count)));
      }
    }
    float* total = first.data();
    std::fill_n(total, op.channels, 0.0f);
    by_runs([&](int64_t e, int64_t pixels, int64_t count) {
      through_norm(grad_x + e, total, x + e, origin.data(), slope.data(), from_all, from_v, pixels,
                   op.channels);
      if (grads.past) add_to(grad_x + e, grads.past + n * size + e, count);
    });
    if (grads.add) std::copy_n(total, op.channels, grads.add + n * op.channels);
  }
};

template <typename Body>
void for_each_sample(const GroupNormSilu& op, int threads, const Body& body) {
  const int team = team_for(op.n, op.n * op.pixels * op.channels, threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    Sample sample(op);
    std::vector<float> scratch(sample.rows * op.channels);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < op.n; ++n) body(sample, n, scratch.data());
  }
}

}  // namespace

void group_norm_silu_fwd_cpu(const GroupNormSilu& op, float* y, int threads) {
  for_each_sample(op, threads, [&](Sample& sample, int64_t n, float*) {
    sample.forward(n, y + n * sample.size);
  });
}

void group_norm_silu_bwd_cpu(const GroupNormSilu& op, const GroupNormSiluGrads& grads,
                             int threads) {
  for_each_sample(op, threads, [&](Sample& sample, int64_t n, float* scratch) {
    sample.backward(n, grads, scratch);
  });
}

}  // namespace tcm_fast
