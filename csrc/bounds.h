// Indices checked in debug builds (TCM_FAST_DEBUG=1), on the host and in kernels; else nothing.
#pragma once

#include <cstdint>

#ifdef TCM_FAST_DEBUG
#include <cstdio>
#include <cstdlib>

namespace tcm_fast {

// Elements first ... first + count - 1 of `size`; the process ends, or the kernel with an error.
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline void check_bounds(int64_t first, int64_t count, int64_t size, const char* file,
                             int line) {
  if (first >= 0 && count >= 0 && first <= size && count <= size - first) return;
  std::printf("%s:%d: elements %lld + %lld of %lld\n", file, line, static_cast<long long>(first),
              static_cast<long long>(count), static_cast<long long>(size));
#if defined(__CUDA_ARCH__)
  __trap();
#else
  std::fflush(stdout);
  std::abort();
#endif
}

}  // namespace tcm_fast

#define TCM_FAST_BOUNDS(first, count, size) \
  ::tcm_fast::check_bounds((first), (count), (size), __FILE__, __LINE__)
#else
#define TCM_FAST_BOUNDS(first, count, size) static_cast<void>(0)
#endif
