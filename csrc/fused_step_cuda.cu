#include <cuda_runtime.h>

#include <algorithm>

#include "fused_step.h"
#include "operations.h"

namespace tcm_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kPrepareThreads = 512;
static_assert(kChunk % (4 * kThreads) == 0, "a chunk is a whole number of rounds");
static_assert(kBlock8 == 4 * 32, "a warp has a block");
// Elements of a row that a block keeps on chip; further ones it reads again from the second-level
// cache.
constexpr int64_t kKept = 11776;

template <typename T>
__device__ __forceinline__ T* at(const int64_t* row, int64_t field) {
  return reinterpret_cast<T*>(row[field]);
}

// What the compiler cannot see of an address that was read from memory.
template <typename T>
__device__ __forceinline__ T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

__device__ __forceinline__ bool finite(float x) {
  return (__float_as_uint(x) & 0x7F800000u) != 0x7F800000u;
}

// The sum over a block in an order that does not vary, in thread 0.
template <int kSize>
__device__ double block_sum(double x) {
  __shared__ double of_warp[kSize / 32];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kSize / 32; ++warp) x += of_warp[warp];
  }
  return x;
}

// What a block works on: some elements of one tensor, one row where rows are normalised.
struct Span {
  const int64_t* row;
  int64_t first;
  int number, count, vectors;

  // chunk: (tensor, number of the span within it)
  __device__ __forceinline__ Span(const int64_t* table, int64_t width, int2 chunk)
      : row(table + chunk.x * width), number(chunk.y) {
    const int64_t size = row[kRow] ? row[kRow] : kChunk;
    first = chunk.y * size;
    count = static_cast<int>(min(size, row[kNumel] - first));
    TCM_FAST_BOUNDS(first, count, row[kNumel]);
    vectors = row[kFlags] & kAligned ? count / 4 : 0;
  }
  // The first of the 8-bit moments' blocks.
  __device__ __forceinline__ int64_t block_8() const {
    return number * blocks_in(row[kRow] ? row[kRow] : kChunk);
  }
};

// The sum of squares of a row's gradient, projected, in thread 0; and how it is projected.
__device__ double project_row(const Span& span, Projection* projection) {
  float grads = 0, params = 0, product = 0;
  const float* grad = at<float>(span.row, kGrad);
  const float* param = global(at<float>(span.row, kParam) + span.first);
  if (!grad) return 0;
  grad = global(grad + span.first);
  bool good = true;
  const auto take = [&](float g, float w) {
    good &= finite(g);
    grads += g * g, params += w * w, product += g * w;
  };
#pragma unroll 2
  for (int i = threadIdx.x; i < span.vectors; i += kThreads) {
    const float4 g = reinterpret_cast<const float4*>(grad)[i];
    const float4 w = reinterpret_cast<const float4*>(param)[i];
    take(g.x, w.x), take(g.y, w.y), take(g.z, w.z), take(g.w, w.w);
  }
  for (int i = 4 * span.vectors + threadIdx.x; i < span.count; i += kThreads) {
    take(grad[i], param[i]);
  }
  good = __syncthreads_and(good);
  double squares = block_sum<kThreads>(good ? grads : NAN);
  __syncthreads();
  const double of_params = block_sum<kThreads>(params);
  __syncthreads();
  const double of_products = block_sum<kThreads>(product);
  if (threadIdx.x == 0) *projection = projection_of(squares, of_params, of_products, span.count);
  return squares;
}

// One block for each chunk: (tensor, its number among the tensor's chunks).
__global__ void __launch_bounds__(kThreads)
    sum_squares(const int64_t* table, int64_t width, const int2* chunks, double* sums,
                Projection* projections) {
  const Span span(table, width, chunks[blockIdx.x]);
  const int64_t* row = span.row;
  const int count = span.count;
  if (row[kRow]) {
    const double total = project_row(span, projections + blockIdx.x);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
    return;
  }
  const float* grad = at<float>(row, kGrad);
  float sum = 0;
  bool good = true;
  if (grad) {
    grad = global(grad + span.first);
    const int vectors = span.vectors;
#pragma unroll 4
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
      const float4 x = reinterpret_cast<const float4*>(grad)[i];
      sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
    for (int i = 4 * vectors + threadIdx.x; i < count; i += kThreads) sum += grad[i] * grad[i];
    if (!finite(sum)) {  // an element, or only a square: worth a second look
      for (int i = threadIdx.x; i < count; i += kThreads) good &= finite(grad[i]);
      for (int i = threadIdx.x; i < vectors; i += kThreads) {
        for (int j = 0; j < 4; ++j) good &= finite(grad[4 * i + j]);
      }
    }
  }
  good = __syncthreads_and(good);
  // Infinities of either kind add up to infinity: squares are not negative.
  double total = block_sum<kThreads>(isnan(sum) ? INFINITY : sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = good ? total : NAN;
}

// One block: norm, skip and factor for all, coefficients and step count for each tensor.
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_step(const int64_t* table, int64_t tensors, int64_t width, const double* sums,
                 int64_t chunks, int averages, const double* options, Control control,
                 Shared* shared, Coefficients* coefficients) {
  __shared__ bool skip;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kPrepareThreads) sum += sums[i];
  sum = block_sum<kPrepareThreads>(sum);
  if (threadIdx.x == 0) {
    *shared = prepare(sum, options, control);
    skip = shared->skip;
  }
  __syncthreads();
  if (skip) return;
  const double* groups = options + kOptions + averages;
  for (int64_t t = threadIdx.x; t < tensors; t += kPrepareThreads) {
    const int64_t* row = table + t * width;
    if (!row[kGrad]) continue;
    float* step = at<float>(row, kStep);
    *step += 1;
    coefficients[t] = coefficients_of(groups + row[kGroup] * kGroupFields, *step);
  }
}

template <int kWide>
__device__ __forceinline__ void load_16(uint16_t (&bits)[kWide], const uint16_t* from) {
  if constexpr (kWide == 4) {
    const uint2 x = *reinterpret_cast<const uint2*>(global(from));
    bits[0] = static_cast<uint16_t>(x.x), bits[1] = static_cast<uint16_t>(x.x >> 16);
    bits[2] = static_cast<uint16_t>(x.y), bits[3] = static_cast<uint16_t>(x.y >> 16);
  } else {
    bits[0] = *global(from);
  }
}

template <int kWide>
__device__ __forceinline__ void store_16(const uint16_t (&bits)[kWide], uint16_t* to) {
  if constexpr (kWide == 4) {
    *reinterpret_cast<uint2*>(global(to)) =
        make_uint2(bits[0] | uint32_t{bits[1]} << 16, bits[2] | uint32_t{bits[3]} << 16);
  } else {
    *global(to) = bits[0];
  }
}

// Four moments of 8 bits, of which a warp has a block: their codes with the block's exponent.
struct Moments8 {
  uint8_t *codes, *exponent;

  __device__ __forceinline__ Moments8(float* moment, int64_t i, int64_t numel, int64_t block)
      : codes(global(reinterpret_cast<uint8_t*>(moment) + i)),
        exponent(global(reinterpret_cast<uint8_t*>(moment) + numel + block)) {}

  __device__ __forceinline__ void load(float (&to)[4], uint32_t top) const {
    const uint32_t four = *reinterpret_cast<const uint32_t*>(codes), of_block = *exponent;
    for (int j = 0; j < 4; ++j) to[j] = from_8_bits(four >> 8 * j & 0xFFu, of_block, top);
  }
  // members: the lanes whose elements there are.
  __device__ __forceinline__ void store(const float (&x)[4], uint32_t top,
                                        const uint32_t (&words)[4], int shift,
                                        uint32_t members) const {
    uint32_t largest = 0, four = 0;
    for (int j = 0; j < 4; ++j) largest = max(largest, bits_of(x[j]) & 0x7FFFFFFFu);
    const uint32_t of_block = exponent_of_block(__reduce_max_sync(members, largest));
    for (int j = 0; j < 4; ++j) {
      four |= to_8_bits(x[j], of_block, top, words[j] >> shift & 0xFFFFu) << 8 * j;
    }
    *reinterpret_cast<uint32_t*>(codes) = four;
    if (threadIdx.x % 32 == 0) *exponent = static_cast<uint8_t>(of_block);
  }
};

// The chunk's elements i, i + 1, ... of all arrays: kWide are 4 with 16-byte accesses, or 1.
template <int kWide>
struct Elements {
  float of[kWide];

  __device__ __forceinline__ void load(const float* from) {
    if constexpr (kWide == 4) {
      const float4 x = *reinterpret_cast<const float4*>(global(from));
      of[0] = x.x, of[1] = x.y, of[2] = x.z, of[3] = x.w;
    } else {
      of[0] = *global(from);
    }
  }
  __device__ __forceinline__ void store(float* to) const {
    if constexpr (kWide == 4) {
      *reinterpret_cast<float4*>(global(to)) = make_float4(of[0], of[1], of[2], of[3]);
    } else {
      *global(to) = of[0];
    }
  }
  __device__ __forceinline__ void load_kept(const float* from) {
    if constexpr (kWide == 4) {
      const float4 x = *reinterpret_cast<const float4*>(from);
      of[0] = x.x, of[1] = x.y, of[2] = x.z, of[3] = x.w;
    } else {
      of[0] = *from;
    }
  }
  __device__ __forceinline__ void keep(float* to) const {
    if constexpr (kWide == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(of[0], of[1], of[2], of[3]);
    } else {
      *to = of[0];
    }
  }
  __device__ __forceinline__ float multiply(float factor) {
    float squares = 0;
    for (int j = 0; j < kWide; ++j) of[j] = mul(of[j], factor);
    for (int j = 0; j < kWide; ++j) squares += of[j] * of[j];
    return squares;
  }
  __device__ __forceinline__ void store(uint16_t* to, bool bfloat) const {
    uint16_t bits[kWide];
    for (int j = 0; j < kWide; ++j) bits[j] = to_16_bits(of[j], bfloat);
    store_16<kWide>(bits, to);
  }
};

// A row's addresses and what the chunk's elements share, in registers.
struct Places {
  float *param, *grad, *exp_avg, *exp_avg_sq, *average;
  uint16_t* copy;
  bool bfloat, moments_16;
  double beta;  // of the first average
  uint32_t tensor;
  Stream stream;  // of random bits, for moments of 16 and 8

  __device__ __forceinline__ Places(const int64_t* row, int averages, int tensor,
                                    const double* options)
      : param(at<float>(row, kParam)),
        grad(at<float>(row, kGrad)),
        exp_avg(at<float>(row, kExpAvg)),
        exp_avg_sq(at<float>(row, kExpAvgSq)),
        average(averages ? at<float>(row, kFields) : nullptr),
        copy(at<uint16_t>(row, kCopy)),
        bfloat(row[kFlags] & kBfloat),
        moments_16(grad && row[kFlags] & kMoments16),
        beta(averages ? options[kOptions] : 0),
        tensor(static_cast<uint32_t>(tensor)),
        stream(moments_stream(options, grad && row[kFlags] & (kMoments16 | kMoments8)
                                           ? *at<float>(row, kStep)
                                           : 0.0f)) {}
};

template <int kWide>
__device__ __forceinline__ void move_average(Elements<kWide>& average, const Elements<kWide>& param,
                                             double beta) {
  const float weight = static_cast<float>(1 - beta), keep = static_cast<float>(beta);
  for (int j = 0; j < kWide; ++j) average.of[j] = lerp(average.of[j], param.of[j], weight, keep);
}

__device__ __forceinline__ void update_elements_8(const Places& at_row, const Span& span, int64_t i,
                                                  Elements<4>& param, const Elements<4>& grad,
                                                  float factor, const Coefficients& c) {
  const int within = static_cast<int>(i - span.first);
  const int64_t block = span.block_8() + within / kBlock8, numel = span.row[kNumel];
  TCM_FAST_BOUNDS(within, 4, span.count);
  const Moments8 first(at_row.exp_avg, i, numel, block), second(at_row.exp_avg_sq, i, numel, block);
  float exp_avg[4], exp_avg_sq[4];
  first.load(exp_avg, kTop1);
  second.load(exp_avg_sq, kTop2);
  for (int j = 0; j < 4; ++j) {
    update_element(param.of[j], grad.of[j], exp_avg[j], exp_avg_sq[j], factor, c);
  }
  const Words random = philox(static_cast<uint32_t>(i / 4), at_row.tensor, at_row.stream);
  const uint32_t words[4] = {random.w0, random.w1, random.w2, random.w3};
  const int lanes = min(32, span.vectors - within / static_cast<int>(kBlock8) * 32);
  const uint32_t members = lanes == 32 ? ~0u : (1u << lanes) - 1u;
  first.store(exp_avg, kTop1, words, 0, members);
  second.store(exp_avg_sq, kTop2, words, 16, members);
}

// Reads weights, gradient and moments; writes the moments. kRows: the gradient is projected.
// kEight: some tensors have moments of 8 bits; the others do not pay for them in registers.
template <int kWide, bool kRows, bool kEight>
__device__ __forceinline__ void update_elements(const Places& at_row, const Span& span, int64_t i,
                                                Elements<kWide>& param, float factor,
                                                const Coefficients& c,
                                                const Projection& projection) {
  Elements<kWide> grad, exp_avg, exp_avg_sq;
  grad.load(at_row.grad + i);
  if (kRows) {
    for (int j = 0; j < kWide; ++j) grad.of[j] = projected(grad.of[j], param.of[j], projection);
  }
  if constexpr (kEight && kWide == 4) {
    if (span.row[kFlags] & kMoments8) {
      return update_elements_8(at_row, span, i, param, grad, factor, c);
    }
  }
  if (at_row.moments_16) {
    uint16_t first[kWide], second[kWide];
    uint16_t* firsts = reinterpret_cast<uint16_t*>(at_row.exp_avg) + i;
    uint16_t* seconds = reinterpret_cast<uint16_t*>(at_row.exp_avg_sq) + i;
    load_16(first, firsts);
    load_16(second, seconds);
    const Words words = philox(static_cast<uint32_t>(i / 4), at_row.tensor, at_row.stream);
    const uint32_t of[4] = {words.w0, words.w1, words.w2, words.w3};
    for (int j = 0; j < kWide; ++j) {
      const int lane = kWide == 4 ? j : static_cast<int>(i % 4);
      const uint32_t word = lane == 0 ? of[0] : lane == 1 ? of[1] : lane == 2 ? of[2] : of[3];
      update_element_16(param.of[j], grad.of[j], first[j], second[j], factor, c, word);
    }
    store_16(first, firsts);
    store_16(second, seconds);
  } else {
    exp_avg.load(at_row.exp_avg + i);
    exp_avg_sq.load(at_row.exp_avg_sq + i);
    for (int j = 0; j < kWide; ++j) {
      update_element(param.of[j], grad.of[j], exp_avg.of[j], exp_avg_sq.of[j], factor, c);
    }
    exp_avg.store(at_row.exp_avg + i);
    exp_avg_sq.store(at_row.exp_avg_sq + i);
  }
}

template <int kWide>
__device__ __forceinline__ void move_averages(const Places& at_row, int64_t i, int averages,
                                              const int64_t* row, const double* betas,
                                              Elements<kWide>& average,
                                              const Elements<kWide>& param) {
  if (at_row.average) {
    move_average(average, param, at_row.beta);
    average.store(at_row.average + i);
  }
  for (int k = 1; k < averages; ++k) {
    float* further = at<float>(row, kFields + k) + i;
    average.load(further);
    move_average(average, param, betas[k]);
    average.store(further);
  }
}

// Most runs have one average: its load is under way with the others.
template <int kWide, bool kEight>
__device__ __forceinline__ void step_elements(const Places& at_row, int64_t i, int averages,
                                              const Span& span, const double* betas, float factor,
                                              const Coefficients& c) {
  Elements<kWide> param, average;
  param.load(at_row.param + i);
  if (at_row.average) average.load(at_row.average + i);
  if (at_row.grad) {
    update_elements<kWide, false, kEight>(at_row, span, i, param, factor, c, {});
    param.store(at_row.param + i);
  }
  move_averages(at_row, i, averages, span.row, betas, average, param);
  if (at_row.copy) param.store(at_row.copy + i, at_row.bfloat);
}

template <bool kEight>
__global__ void __launch_bounds__(kThreads)
    update_tensors(const int64_t* table, int64_t width, const int2* chunks, int averages,
                   const double* options, const Shared* shared, const Coefficients* coefficients) {
  const Shared all = *shared;
  if (all.skip) return;
  const int2 chunk = chunks[blockIdx.x];
  const Span span(table, width, chunk);
  const Places places(span.row, averages, chunk.x, options);
  const Coefficients c = coefficients[chunk.x];
  const double* betas = options + kOptions;
  for (int i = threadIdx.x; i < span.vectors; i += kThreads) {
    step_elements<4, kEight>(places, span.first + 4 * i, averages, span, betas, all.factor, c);
  }
  for (int i = 4 * span.vectors + threadIdx.x; i < span.count; i += kThreads) {
    step_elements<1, kEight>(places, span.first + i, averages, span, betas, all.factor, c);
  }
}

// A row's update, its normalisation and its copy. Averages see it as it is after the update.
// Between the three a thread keeps its elements in shared memory, as many as fit; the others go
// through `param`.
struct RowStep {
  const Places& at_row;
  const Span& span;
  int averages;
  const double* betas;
  float* kept;
  int capacity;

  template <int kWide>
  __device__ __forceinline__ void load(Elements<kWide>& param, int i) const {
    const bool is_kept = at_row.grad && i + kWide <= capacity;
    is_kept ? param.load_kept(kept + i) : param.load(at_row.param + span.first + i);
  }
  template <int kWide, bool kEight>
  __device__ __forceinline__ float update(int i, float factor, const Coefficients& c,
                                          const Projection& projection) const {
    Elements<kWide> param, average;
    const int64_t e = span.first + i;
    param.load(at_row.param + e);
    if (at_row.average) average.load(at_row.average + e);
    update_elements<kWide, true, kEight>(at_row, span, e, param, factor, c, projection);
    i + kWide <= capacity ? param.keep(kept + i) : param.store(at_row.param + e);
    move_averages(at_row, e, averages, span.row, betas, average, param);
    return param.multiply(1);
  }
  template <int kWide>
  __device__ __forceinline__ float normalize(int i, float factor) const {
    Elements<kWide> param, average;
    const int64_t e = span.first + i;
    if (!at_row.grad && at_row.average) average.load(at_row.average + e);
    load(param, i);
    const float squares = param.multiply(factor);
    if (at_row.grad) {
      param.store(at_row.param + e);
      if (i + kWide <= capacity) param.keep(kept + i);
    }
    if (!at_row.grad) move_averages(at_row, e, averages, span.row, betas, average, param);
    return squares;
  }
  template <int kWide>
  __device__ __forceinline__ void copy(int i, float factor) const {
    Elements<kWide> param;
    const int64_t e = span.first + i;
    load(param, i);
    param.multiply(factor);
    if (span.row[kFlags] & kFloatCopy) {
      param.store(reinterpret_cast<float*>(at_row.copy) + e);
    } else {
      param.store(at_row.copy + e, at_row.bfloat);
    }
  }
};

template <bool kEight>
__global__ void __launch_bounds__(kThreads, kEight ? 2 : 4)
    update_rows(const int64_t* table, int64_t width, const int2* chunks, int averages,
                const double* options, const Shared* shared, const Coefficients* coefficients,
                const Projection* projections, int capacity) {
  extern __shared__ float4 kept[];
  __shared__ float common;
  const Shared all = *shared;
  if (all.skip) return;
  const int2 chunk = chunks[blockIdx.x];
  const Span span(table, width, chunk);
  const Places places(span.row, averages, chunk.x, options);
  const RowStep step{places,  span, averages, options + kOptions, reinterpret_cast<float*>(kept),
                     capacity};
  const int rest = 4 * span.vectors + threadIdx.x;
  float factor = 1;
  if (places.grad) {
    const Coefficients c = coefficients[chunk.x];
    const Projection projection = projections[blockIdx.x];
    float sum = 0;
    for (int i = threadIdx.x; i < span.vectors; i += kThreads) {
      sum += step.template update<4, kEight>(4 * i, all.factor, c, projection);
    }
    for (int i = rest; i < span.count; i += kThreads) {
      sum += step.template update<1, kEight>(i, all.factor, c, projection);
    }
    const double squares = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) common = static_cast<float>(row_factor(squares, span.count));
    __syncthreads();
    factor = common;
  }
  float sum = 0;
  for (int i = threadIdx.x; i < span.vectors; i += kThreads)
    sum += step.normalize<4>(4 * i, factor);
  for (int i = rest; i < span.count; i += kThreads) sum += step.normalize<1>(i, factor);
  if (!places.copy) return;
  const double squares = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) common = static_cast<float>(copy_factor(squares, span.count));
  __syncthreads();
  factor = common;
  for (int i = threadIdx.x; i < span.vectors; i += kThreads) step.copy<4>(4 * i, factor);
  for (int i = rest; i < span.count; i += kThreads) step.copy<1>(i, factor);
}

// Options travel as kernel arguments: nothing on the host has to outlive the call or be waited for.
constexpr int kPiece = 256;
struct Piece {
  double values[kPiece];
};

__global__ void store_piece(double* to, int count, Piece piece) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = piece.values[i];
}

const char* status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* store_options_cuda(double* to, const double* values, int64_t count, void* stream) {
  for (int64_t i = 0; i < count; i += kPiece) {
    Piece piece;
    const int n = static_cast<int>(std::min<int64_t>(kPiece, count - i));
    std::copy_n(values + i, n, piece.values);
    store_piece<<<1, kPiece, 0, static_cast<cudaStream_t>(stream)>>>(to + i, n, piece);
  }
  return status();
}

int64_t fused_step_scratch(int64_t tensors, int64_t chunks) {
  const int64_t bytes = chunks * (sizeof(double) + sizeof(Projection)) + sizeof(Shared) +
                        tensors * sizeof(Coefficients);
  return (bytes + 7) / 8;
}

const char* fused_step_cuda(const int64_t* table, int64_t tensors, int averages,
                            const int32_t* chunks, int64_t num_chunks, int64_t num_rows,
                            int64_t longest, const double* options, double* norm, int64_t* skips,
                            float* scale, int32_t* tracker, double* scratch, bool eight,
                            void* stream) {
  const int64_t width = kFields + averages;
  const auto pairs = reinterpret_cast<const int2*>(chunks);
  const auto projections = reinterpret_cast<Projection*>(scratch + num_chunks);
  const auto shared = reinterpret_cast<Shared*>(projections + num_chunks);
  const auto coefficients = reinterpret_cast<Coefficients*>(shared + 1);
  const Control control{norm, skips, scale, tracker};
  const auto on = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(num_chunks), rows = static_cast<unsigned>(num_rows);
  if (blocks) {
    sum_squares<<<blocks, kThreads, 0, on>>>(table, width, pairs, scratch, projections);
  }
  prepare_step<<<1, kPrepareThreads, 0, on>>>(table, tensors, width, scratch, num_chunks, averages,
                                              options, control, shared, coefficients);
  if (blocks > rows) {
    const auto update = eight ? update_tensors<true> : update_tensors<false>;
    update<<<blocks - rows, kThreads, 0, on>>>(table, width, pairs, averages, options, shared,
                                               coefficients);
  }
  if (rows) {
    const int64_t before = num_chunks - num_rows;
    const int capacity = static_cast<int>(std::min((longest + 3) / 4 * 4, kKept));
    const auto update = eight ? update_rows<true> : update_rows<false>;
    update<<<rows, kThreads, capacity * sizeof(float), on>>>(table, width, pairs + before, averages,
                                                             options, shared, coefficients,
                                                             projections + before, capacity);
  }
  return status();
}

}  // namespace tcm_fast
