// What the loops on a CPU share: vectors and threads.
#pragma once

#include <algorithm>
#include <cstdint>

// One binary for every x86-64: the widest vectors are chosen when the extension is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define TCM_FAST_VECTOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TCM_FAST_VECTOR
#endif

namespace tcm_fast {

// Elements below which waking other threads costs more than it saves.
constexpr int64_t kSerial = 1 << 15;

// Threads for `pieces` that can be computed side by side, `elements` in all.
inline int team_for(int64_t pieces, int64_t elements, int threads) {
  return elements < kSerial ? 1 : static_cast<int>(std::min<int64_t>(threads, pieces));
}

}  // namespace tcm_fast
