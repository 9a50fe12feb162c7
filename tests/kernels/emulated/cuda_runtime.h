// As much of CUDA as the kernels use, on the host: a block's threads are coroutines that take turns
// from one barrier or shuffle to the next, blocks run one after another. The tests compile the .cu
// sources against it, `kernel<<<...>>>(` replaced by `emulate(...)(`; it shows what the kernels
// compute and that their threads agree, not that nvcc or a GPU does the same.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __isGlobal(address) true
#define __builtin_assume(holds) static_cast<void>(holds)

// Vectors note what is read from and written to memory that `is_counted`.
inline std::function<bool(const void*)> is_counted;
inline int64_t bytes_moved = 0;
template <typename T>
inline const T& noted(const T& at) {
  if (is_counted && is_counted(&at)) bytes_moved += sizeof(T);
  return at;
}
template <typename T>
struct alignas(4 * sizeof(T)) Vector4 {
  T x, y, z, w;
  Vector4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  Vector4(const Vector4& from) : Vector4(noted(from).x, from.y, from.z, from.w) {}
  void operator=(const Vector4& from) {
    noted(*this);
    x = from.x, y = from.y, z = from.z, w = from.w;
  }
};
template <typename T>
struct alignas(2 * sizeof(T)) Vector2 {
  T x, y;
  Vector2(T x, T y) : x(x), y(y) {}
  Vector2(const Vector2& from) : Vector2(noted(from).x, from.y) {}
  void operator=(const Vector2& from) {
    noted(*this);
    x = from.x, y = from.y;
  }
};
using float4 = Vector4<float>;
using uint4 = Vector4<unsigned>;
using uint2 = Vector2<unsigned>;
using int2 = Vector2<int>;
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::isnan;
using std::max;
using std::min;
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

// The threads of a block. In each round every one of them runs until it waits or ends.
class Team {
 public:
  void run(unsigned size, const std::function<void()>& body) {
    constexpr size_t kStack = 64 << 10;
    if (stacks_.size() < size * kStack) stacks_.resize(size * kStack);
    values_.assign(size, 0), done_.assign(size, false), contexts_.resize(size);
    came_.assign(size, 0), arrivals_ = 0;
    gave_.assign(size, 0), given_.assign(2 * size, 0);
    body_ = &body;
    for (unsigned i = 0; i < size; ++i) {
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks_.data() + i * kStack;
      contexts_[i].uc_stack.ss_size = kStack;
      contexts_[i].uc_link = &scheduler_;
      makecontext(&contexts_[i], &Team::start, 0);
    }
    for (unsigned left = size; left;) {
      for (unsigned i = 0; i < size; ++i) {
        if (done_[i]) continue;
        threadIdx = {i};
        swapcontext(&scheduler_, &contexts_[i]);
        left -= done_[i];
      }
    }
  }
  void wait() { swapcontext(&contexts_[threadIdx.x], &scheduler_); }
  // Until all have come as often.
  void barrier() {
    ++arrivals_;
    for (const size_t all = ++came_[threadIdx.x] * came_.size(); arrivals_ < all;) wait();
  }
  // Every thread's value, seen by every thread that waits with it.
  template <typename Read>
  double exchange(double value, const Read& read) {
    values_[threadIdx.x] = value;
    barrier();
    const double result = read(values_);
    barrier();
    return result;
  }
  // The largest value that these lanes of a warp give; the others need not come.
  unsigned largest(unsigned members, unsigned value) {
    const unsigned self = threadIdx.x, warp = self / 32 * 32;
    const size_t turn = ++gave_[self];
    given_[2 * self + turn % 2] = value;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(members >> lane & 1)) continue;
      while (gave_[warp + lane] < turn) wait();
      value = std::max(value, given_[2 * (warp + lane) + turn % 2]);
    }
    return value;
  }

 private:
  static void start();

  std::vector<char> stacks_;
  std::vector<double> values_;
  std::vector<char> done_;
  std::vector<size_t> came_, gave_;
  size_t arrivals_ = 0;
  std::vector<unsigned> given_;
  std::vector<ucontext_t> contexts_;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
};
inline Team team;
inline void Team::start() {
  (*team.body_)();
  team.done_[threadIdx.x] = true;
}
alignas(16) inline char dynamic_shared[48 << 10];

inline void __syncthreads() { team.barrier(); }
inline unsigned __reduce_max_sync(unsigned members, unsigned x) { return team.largest(members, x); }
inline int __syncthreads_and(int holds) {
  return team.exchange(holds, [](const std::vector<double>& all) {
    return std::all_of(all.begin(), all.end(), [](double x) { return x != 0; });
  });
}
inline double __shfl_down_sync(unsigned, double x, int offset) {
  const unsigned lane = threadIdx.x % 32, from = threadIdx.x + (lane + offset < 32 ? offset : 0);
  return team.exchange(x, [&](const std::vector<double>& all) { return all[from]; });
}

template <typename Kernel>
auto emulate(Kernel kernel, dim3 grid, dim3 block, int, cudaStream_t) {
  return [=](auto... arguments) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y}, blockDim = block, gridDim = grid;
        team.run(block.x, [&] { kernel(arguments...); });
      }
    }
  };
}
