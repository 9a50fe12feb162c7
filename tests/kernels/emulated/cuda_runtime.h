// As much of CUDA as the kernels use, on the host: a block is a team of threads, blocks run in turn. The
// tests compile the .cu sources against it, `kernel<<<...>>>(` replaced by `emulate(...)(`; it shows
// what the kernels compute and that their threads agree, not that nvcc or a GPU does the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static
#define __isGlobal(address) true
#define __builtin_assume(holds) static_cast<void>(holds)

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

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

// Where a block's threads wait for each other.
class Team {
 public:
  void start(unsigned size) { size_ = size, waiting_ = 0, values_.assign(size, 0); }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned turn = turn_;
    if (++waiting_ == size_) {
      waiting_ = 0, ++turn_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return turn_ != turn; });
    }
  }
  // Every thread's value, seen by every thread.
  template <typename Read>
  double exchange(double value, const Read& read) {
    values_[threadIdx.x] = value;
    wait();
    const double result = read(values_);
    wait();
    return result;
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  std::vector<double> values_;
  unsigned size_ = 0, waiting_ = 0, turn_ = 0;
};
inline Team team;

inline void __syncthreads() { team.wait(); }
inline int __syncthreads_and(int holds) {
  return team.exchange(holds, [](const std::vector<double>& all) {
    return std::all_of(all.begin(), all.end(), [](double x) { return x != 0; });
  });
}
// Of whole blocks alone, which is how the kernels use it.
inline double __shfl_down_sync(unsigned, double x, int offset) {
  const unsigned lane = threadIdx.x % 32, from = threadIdx.x + (lane + offset < 32 ? offset : 0);
  return team.exchange(x, [&](const std::vector<double>& all) { return all[from]; });
}

template <typename Kernel>
auto emulate(Kernel kernel, dim3 grid, dim3 block, int, cudaStream_t) {
  return [=](auto... arguments) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        team.start(block.x);
        std::vector<std::thread> threads;
        for (unsigned i = 0; i < block.x; ++i) {
          threads.emplace_back([=] {
            threadIdx = {i}, blockIdx = {x, y}, blockDim = block, gridDim = grid;
            kernel(arguments...);
          });
        }
        for (std::thread& thread : threads) thread.join();
      }
    }
  };
}
