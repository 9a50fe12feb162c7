#include "fused_step.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "operations.h"

// One binary for every x86-64: the widest vectors are chosen when the extension is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define TCM_FAST_VECTOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TCM_FAST_VECTOR
#endif

namespace tcm_fast {
namespace {

// Elements below which waking other threads costs more than it saves.
constexpr int64_t kSerial = 1 << 15;
// Weights that stay in the first-level cache until averages and copy have taken them.
constexpr int64_t kRun = 1024;

struct Chunk {
  const int64_t* row;
  int64_t tensor, first, count;
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

TCM_FAST_VECTOR
void follow(float* average, const float* param, int64_t count, float weight, float keep) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) average[i] = lerp(average[i], param[i], weight, keep);
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

void step_chunk(const Chunk& chunk, const Coefficients& coefficients, float factor,
                const double* options, int averages) {
  const int64_t* row = chunk.row;
  const double* betas = options + kOptions;
  const bool sixteen = row[kFlags] & kMoments16;
  uint32_t words[kRun];
  for (int64_t i = chunk.first; i < chunk.first + chunk.count; i += kRun) {
    const int64_t count = std::min(kRun, chunk.first + chunk.count - i);
    float* param = at<float>(row, kParam) + i;
    if (row[kGrad] && sixteen) {
      const Stream stream = moments_stream(options, *at<float>(row, kStep));
      random_words(words, i / 4, blocks_of(count, 4), static_cast<uint32_t>(chunk.tensor), stream);
      update_16(param, at<float>(row, kGrad) + i, at<uint16_t>(row, kExpAvg) + i,
                at<uint16_t>(row, kExpAvgSq) + i, words, count, factor, coefficients);
    } else if (row[kGrad]) {
      update(param, at<float>(row, kGrad) + i, at<float>(row, kExpAvg) + i,
             at<float>(row, kExpAvgSq) + i, count, factor, coefficients);
    }
    for (int k = 0; k < averages; ++k) {
      follow(at<float>(row, kFields + k) + i, param, count, static_cast<float>(1 - betas[k]),
             static_cast<float>(betas[k]));
    }
    if (row[kCopy]) {
      uint16_t* copy = at<uint16_t>(row, kCopy) + i;
      row[kFlags] & kBfloat ? copy_bfloat(copy, param, count) : copy_half(copy, param, count);
    }
  }
}

}  // namespace

void fused_step_cpu(const int64_t* table, int64_t tensors, int averages, const double* options,
                    double* norm, int64_t* skips, float* scale, int32_t* tracker, int threads) {
  const int64_t width = kFields + averages;
  std::vector<Chunk> chunks;
  int64_t elements = 0;
  for (int64_t t = 0; t < tensors; ++t) {
    const int64_t* row = table + t * width;
    elements += row[kNumel];
    for (int64_t first = 0; first < row[kNumel]; first += kChunk) {
      chunks.push_back({row, t, first, std::min(kChunk, row[kNumel] - first)});
    }
  }
  const int64_t n = static_cast<int64_t>(chunks.size());
  const int team = elements < kSerial ? 1 : static_cast<int>(std::min<int64_t>(threads, n));

  std::vector<double> sums(n);
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* row = chunks[i].row;
    if (row[kGrad]) {
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
    step_chunk(chunks[i], coefficients[chunks[i].tensor], shared.factor, options, averages);
  }
}

}  // namespace tcm_fast
