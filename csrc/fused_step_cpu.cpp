#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu.h"
#include "fused_step.h"
#include "operations.h"

namespace tcm_fast {
namespace {

// Weights that stay in the first-level cache until averages and copy have taken them.
constexpr int64_t kRun = 1024;
static_assert(kRun % kBlock8 == 0 && kChunk % kBlock8 == 0, "runs begin where blocks do");

// Elements of one tensor; where its rows are normalised, whole rows, and `line` is the first's
// number among all such.
struct Chunk {
  const int64_t* row;
  int64_t tensor, first, count, line;
};

template <typename T>
T* at(const int64_t* row, int64_t field) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(row[field]));
}

// The sum of squares of up to kChunk elements, in an order that no vector width changes.
TCM_FAST_VECTOR
double sum_of_squares(const float* x, int64_t count) {
  constexpr int kLanes = 32;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  }
  for (int lane = 0; i + lane < count; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

TCM_FAST_VECTOR
double sum_of_products(const float* x, const float* y, int64_t count) {
  constexpr int kLanes = 32;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * y[i + lane];
  }
  for (int lane = 0; i + lane < count; ++lane) lanes[lane] += x[i + lane] * y[i + lane];
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// NaN where an element is not finite; infinite where finite ones' squares overflow.
double checked_sum_of_squares(const float* x, int64_t count) {
  const double sum = sum_of_squares(x, count);
  if (std::isfinite(sum)) return sum;
  return std::all_of(x, x + count, [](float v) { return std::isfinite(v); }) ? INFINITY : NAN;
}

TCM_FAST_VECTOR
void update(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t count,
            float factor, Coefficients c) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    update_element(param[i], grad[i], exp_avg[i], exp_avg_sq[i], factor, c);
  }
}

TCM_FAST_VECTOR
void random_words(uint32_t* out, int64_t first, int64_t blocks, uint32_t tensor, Stream stream) {
#pragma omp simd
  for (int64_t block = 0; block < blocks; ++block) {
    const Words words = philox(static_cast<uint32_t>(first + block), tensor, stream);
    out[4 * block] = words.w0;
    out[4 * block + 1] = words.w1;
    out[4 * block + 2] = words.w2;
    out[4 * block + 3] = words.w3;
  }
}

TCM_FAST_VECTOR
void update_16(float* param, const float* grad, uint16_t* exp_avg, uint16_t* exp_avg_sq,
               const uint32_t* words, int64_t count, float factor, Coefficients c) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    update_element_16(param[i], grad[i], exp_avg[i], exp_avg_sq[i], factor, c, words[i]);
  }
}

// Codes of up to kBlock8 elements to floats.
TCM_FAST_VECTOR
void widen_8(float* out, const uint8_t* codes, int64_t count, uint32_t exponent, uint32_t top) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = from_8_bits(codes[i], exponent, top);
}

// And back; returns the block's new exponent. The random bits are those from `shift` on.
TCM_FAST_VECTOR
uint8_t narrow_8(uint8_t* codes, const float* x, const uint32_t* words, int shift, int64_t count,
                 uint32_t top) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(x[i]) & 0x7FFFFFFFu);
  const uint32_t exponent = exponent_of_block(largest);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<uint8_t>(to_8_bits(x[i], exponent, top, words[i] >> shift & 0xFFFFu));
  }
  return static_cast<uint8_t>(exponent);
}

TCM_FAST_VECTOR
void follow(float* average, const float* param, int64_t count, float weight, float keep) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) average[i] = lerp(average[i], param[i], weight, keep);
}

TCM_FAST_VECTOR
void project(float* out, const float* grad, const float* param, int64_t count, Projection p) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = projected(grad[i], param[i], p);
}

TCM_FAST_VECTOR
void multiply(float* out, const float* x, int64_t count, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = mul(x[i], factor);
}

TCM_FAST_VECTOR
void copy_half(uint16_t* copy, const float* param, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) copy[i] = to_half(param[i]);
}

TCM_FAST_VECTOR
void copy_bfloat(uint16_t* copy, const float* param, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) copy[i] = to_bfloat(param[i]);
}

// What a step does to a tensor's elements i ... i + count, count at most kRun.
struct Run {
  const int64_t* row;
  const double* options;
  int averages;
  uint32_t tensor;
  float factor;
  Coefficients coefficients;

  float* param(int64_t i) const { return at<float>(row, kParam) + i; }

  void update_with(const float* grad, int64_t i, int64_t count) const {
    TCM_FAST_BOUNDS(i, count, row[kNumel]);
    uint32_t words[kRun + 4];
    const int64_t before = i % 4;  // elements of the first block that come before
    if (row[kFlags] & (kMoments16 | kMoments8)) {
      const Stream stream = moments_stream(options, *at<float>(row, kStep));
      TCM_FAST_BOUNDS(before, count, kRun + 4);
      random_words(words, i / 4, blocks_of(before + count, 4), tensor, stream);
    }
    if (row[kFlags] & kMoments8) {
      update_8(grad, words + before, i, count);
    } else if (row[kFlags] & kMoments16) {
      update_16(param(i), grad, at<uint16_t>(row, kExpAvg) + i, at<uint16_t>(row, kExpAvgSq) + i,
                words + before, count, factor, coefficients);
    } else {
      update(param(i), grad, at<float>(row, kExpAvg) + i, at<float>(row, kExpAvgSq) + i, count,
             factor, coefficients);
    }
  }
  // Runs begin where blocks do.
  void update_8(const float* grad, const uint32_t* words, int64_t i, int64_t count) const {
    const int64_t length = row[kRow] ? row[kRow] : row[kNumel];
    const int64_t first = i / length * blocks_in(length) + i % length / kBlock8;
    TCM_FAST_BOUNDS(first, blocks_in(count), row[kNumel] / length * blocks_in(length));
    uint8_t *codes1 = at<uint8_t>(row, kExpAvg), *codes2 = at<uint8_t>(row, kExpAvgSq);
    uint8_t *exponents1 = codes1 + row[kNumel] + first, *exponents2 = codes2 + row[kNumel] + first;
    codes1 += i, codes2 += i;
    float moment1[kRun], moment2[kRun];
    for (int64_t k = 0; k < count; k += kBlock8) {
      const int64_t size = std::min(kBlock8, count - k);
      widen_8(moment1 + k, codes1 + k, size, exponents1[k / kBlock8], kTop1);
      widen_8(moment2 + k, codes2 + k, size, exponents2[k / kBlock8], kTop2);
    }
    update(param(i), grad, moment1, moment2, count, factor, coefficients);
    for (int64_t k = 0; k < count; k += kBlock8) {
      const int64_t size = std::min(kBlock8, count - k);
      exponents1[k / kBlock8] = narrow_8(codes1 + k, moment1 + k, words + k, 0, size, kTop1);
      exponents2[k / kBlock8] = narrow_8(codes2 + k, moment2 + k, words + k, 16, size, kTop2);
    }
  }
  void move_averages(int64_t i, int64_t count) const {
    TCM_FAST_BOUNDS(i, count, row[kNumel]);
    const double* betas = options + kOptions;
    for (int k = 0; k < averages; ++k) {
      follow(at<float>(row, kFields + k) + i, param(i), count, static_cast<float>(1 - betas[k]),
             static_cast<float>(betas[k]));
    }
  }
  void copy_from(const float* values, int64_t i, int64_t count) const {
    uint16_t* copy = at<uint16_t>(row, kCopy) + i;
    row[kFlags] & kBfloat ? copy_bfloat(copy, values, count) : copy_half(copy, values, count);
  }
};

template <typename Do>
void by_runs(int64_t first, int64_t count, const Do& act) {
  for (int64_t i = first; i < first + count; i += kRun) {
    act(i, std::min(kRun, first + count - i));
  }
}

void step_chunk(const Chunk& chunk, const Run& run) {
  by_runs(chunk.first, chunk.count, [&](int64_t i, int64_t count) {
    if (chunk.row[kGrad]) run.update_with(at<float>(chunk.row, kGrad) + i, i, count);
    run.move_averages(i, count);
    if (chunk.row[kCopy]) run.copy_from(run.param(i), i, count);
  });
}

// Update, normalise, copy: the row stays in the second-level cache between the three. Averages see
// it as it is after the update.
void step_row(const int64_t* row, int64_t first, const Projection& projection, const Run& run) {
  const int64_t n = row[kRow];
  float values[kRun];
  double squares = 0;
  if (row[kGrad]) {
    by_runs(first, n, [&](int64_t i, int64_t count) {
      project(values, at<float>(row, kGrad) + i, run.param(i), count, projection);
      run.update_with(values, i, count);
      run.move_averages(i, count);
      squares += sum_of_squares(run.param(i), count);
    });
    const float factor = static_cast<float>(row_factor(squares, n));
    squares = 0;
    by_runs(first, n,
            [&](int64_t i, int64_t count) { multiply(run.param(i), run.param(i), count, factor); });
  }
  by_runs(first, n, [&](int64_t i, int64_t count) {
    if (!row[kGrad]) run.move_averages(i, count);
    squares += sum_of_squares(run.param(i), count);
  });
  if (!row[kCopy]) return;
  const float factor = static_cast<float>(copy_factor(squares, n));
  by_runs(first, n, [&](int64_t i, int64_t count) {
    const bool wide = row[kFlags] & kFloatCopy;
    float* out = wide ? at<float>(row, kCopy) + i : values;
    multiply(out, run.param(i), count, factor);
    if (!wide) run.copy_from(values, i, count);
  });
}

// Sum of squares of the gradient of a chunk of rows, projected; and how.
double project_rows(const Chunk& chunk, Projection* projections) {
  const int64_t n = chunk.row[kRow];
  double all = 0;
  for (int64_t first = chunk.first; first < chunk.first + chunk.count; first += n) {
    double grads = 0, params = 0, product = 0;
    by_runs(first, n, [&](int64_t i, int64_t count) {
      const float* grad = at<float>(chunk.row, kGrad) + i;
      const float* param = at<float>(chunk.row, kParam) + i;
      grads += checked_sum_of_squares(grad, count);
      params += sum_of_squares(param, count);
      product += sum_of_products(grad, param, count);
    });
    *projections++ = projection_of(grads, params, product, n);
    all += grads;
  }
  return all;
}

}  // namespace

void fused_step_cpu(const int64_t* table, int64_t tensors, int averages, const double* options,
                    double* norm, int64_t* skips, float* scale, int32_t* tracker, int threads) {
  const int64_t width = kFields + averages;
  std::vector<Chunk> chunks;
  int64_t elements = 0, lines = 0;
  for (int64_t t = 0; t < tensors; ++t) {
    const int64_t* row = table + t * width;
    elements += row[kNumel];
    const int64_t together = row[kRow] ? std::max<int64_t>(kChunk / row[kRow], 1) : 0;
    const int64_t size = together ? together * row[kRow] : kChunk;
    for (int64_t first = 0; first < row[kNumel]; first += size, lines += together) {
      chunks.push_back({row, t, first, std::min(size, row[kNumel] - first), lines});
    }
  }
  const int64_t n = static_cast<int64_t>(chunks.size());
  const int team = team_for(n, elements, threads);

  std::vector<double> sums(n);
  std::vector<Projection> projections(lines);
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* row = chunks[i].row;
    if (row[kGrad] && row[kRow]) {
      TCM_FAST_BOUNDS(chunks[i].line, chunks[i].count / row[kRow], lines);
      sums[i] = project_rows(chunks[i], &projections[chunks[i].line]);
    } else if (row[kGrad]) {
      sums[i] = checked_sum_of_squares(at<float>(row, kGrad) + chunks[i].first, chunks[i].count);
    }
  }
  double sum = 0;
  for (double of_chunk : sums) sum += of_chunk;
  const Shared shared = prepare(sum, options, {norm, skips, scale, tracker});
  if (shared.skip) return;

  const double* groups = options + kOptions + averages;
  std::vector<Coefficients> coefficients(tensors);
  for (int64_t t = 0; t < tensors; ++t) {
    const int64_t* row = table + t * width;
    if (!row[kGrad]) continue;
    float* step = at<float>(row, kStep);
    *step += 1;
    coefficients[t] = coefficients_of(groups + row[kGroup] * kGroupFields, *step);
  }
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const Chunk& chunk = chunks[i];
    const Run run{chunk.row,     options,
                  averages,      static_cast<uint32_t>(chunk.tensor),
                  shared.factor, coefficients[chunk.tensor]};
    if (!chunk.row[kRow]) step_chunk(chunk, run);
    for (int64_t row = 0; row * chunk.row[kRow] < chunk.count && chunk.row[kRow]; ++row) {
      step_row(chunk.row, chunk.first + row * chunk.row[kRow], projections[chunk.line + row], run);
    }
  }
}

}  // namespace tcm_fast
