#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bounds.h"
#include "cpu.h"
#include "operations.h"
#include "philox.h"

namespace tcm_fast {
namespace {

template <typename Body>
void for_each_sample(int64_t n, int64_t elements, int threads, const Body& body) {
  const int team = team_for(n, n * elements, threads);
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t i = 0; i < n; ++i) body(i);
}

TCM_FAST_VECTOR
void bits_of_blocks(int32_t* out, int64_t num_blocks, uint32_t sample, Stream stream) {
#pragma omp simd
  for (int64_t block = 0; block < num_blocks; ++block) {
    const Words words = philox(static_cast<uint32_t>(block), sample, stream);
    out[4 * block] = static_cast<int32_t>(words.w0);
    out[4 * block + 1] = static_cast<int32_t>(words.w1);
    out[4 * block + 2] = static_cast<int32_t>(words.w2);
    out[4 * block + 3] = static_cast<int32_t>(words.w3);
  }
}

TCM_FAST_VECTOR
void normals_of_blocks(float* out, int64_t first, int64_t num_blocks, uint32_t sample,
                       Stream stream) {
#pragma omp simd
  for (int64_t block = 0; block < num_blocks; ++block) {
    const Words words = philox(static_cast<uint32_t>(first + block), sample, stream);
    const Pair low = normal_pair(words.w0, words.w1);
    const Pair high = normal_pair(words.w2, words.w3);
    out[4 * block] = low.first;
    out[4 * block + 1] = low.second;
    out[4 * block + 2] = high.first;
    out[4 * block + 3] = high.second;
  }
}

// kept: the mask bytes of blocks first ... first + num_blocks - 1, eight to a block.
TCM_FAST_VECTOR
void mask_of_blocks(uint64_t* kept, int64_t first, int64_t num_blocks, uint32_t sample,
                    Stream stream, uint32_t threshold) {
#pragma omp simd
  for (int64_t block = 0; block < num_blocks; ++block) {
    const Words words = philox(static_cast<uint32_t>(first + block), sample, stream);
    kept[block] = kept_bytes(words, threshold);
  }
}

TCM_FAST_VECTOR
void apply_mask(float* out, const float* x, const uint8_t* kept, int64_t count, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float value = x[i] * scale;
    out[i] = kept[i] ? value : 0.0f;
  }
}

// Channels 8·group ... 8·group + 7 of a [channels, pixels] sample: one block holds them at one
// pixel.
TCM_FAST_VECTOR
void apply_to_planes(float* out, const float* x, int64_t pixels, int64_t group, int64_t groups,
                     uint32_t sample, Stream stream, uint32_t threshold, float scale) {
#pragma omp simd
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const Words words = philox(static_cast<uint32_t>(pixel * groups + group), sample, stream);
    const auto apply = [&](int lane, uint32_t kept) {
      const float value = x[lane * pixels + pixel] * scale;
      out[lane * pixels + pixel] = kept ? value : 0.0f;
    };
    apply(0, low_kept(words.w0, threshold));
    apply(1, high_kept(words.w0, threshold));
    apply(2, low_kept(words.w1, threshold));
    apply(3, high_kept(words.w1, threshold));
    apply(4, low_kept(words.w2, threshold));
    apply(5, high_kept(words.w2, threshold));
    apply(6, low_kept(words.w3, threshold));
    apply(7, high_kept(words.w3, threshold));
  }
}

// Calls body(element, count, kept) for the runs of a sample's elements, in order.
template <typename Body>
void for_each_run(int64_t elements, uint32_t sample, Stream stream, uint32_t threshold,
                  const Body& body) {
  constexpr int64_t kBlocks = 256;
  uint64_t kept[kBlocks];
  for (int64_t e = 0; e < elements; e += 8 * kBlocks) {
    const int64_t count = std::min(elements - e, 8 * kBlocks);
    TCM_FAST_BOUNDS(0, blocks_of(count, 8), kBlocks);
    TCM_FAST_BOUNDS(e, count, elements);
    mask_of_blocks(kept, e / 8, blocks_of(count, 8), sample, stream, threshold);
    body(e, count, reinterpret_cast<const uint8_t*>(kept));
  }
}

}  // namespace

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "kept_bytes is stored lowest byte first");

void philox_bits_cpu(int32_t* out, const int64_t* sample, int64_t n, int64_t num_blocks,
                     int64_t seed, int64_t step, uint32_t layer, int threads) {
  const Stream stream(seed, step, layer);
  for_each_sample(n, 4 * num_blocks, threads, [&](int64_t i) {
    bits_of_blocks(out + i * num_blocks * 4, num_blocks, static_cast<uint32_t>(sample[i]), stream);
  });
}

void philox_normal_cpu(float* out, const int64_t* sample, int64_t n, int64_t elements, int64_t seed,
                       int64_t step, uint32_t layer, int threads) {
  const Stream stream(seed, step, layer);
  for_each_sample(n, elements, threads, [&](int64_t i) {
    const uint32_t number = static_cast<uint32_t>(sample[i]);
    float* row = out + i * elements;
    const int64_t whole = elements / 4, rest = elements % 4;
    normals_of_blocks(row, 0, whole, number, stream);
    if (rest) {
      TCM_FAST_BOUNDS(4 * whole, rest, elements);
      float last[4];
      normals_of_blocks(last, whole, 1, number, stream);
      std::copy_n(last, rest, row + 4 * whole);
    }
  });
}

void dropout_mask_cpu(uint8_t* out, const int64_t* sample, int64_t n, int64_t elements,
                      int64_t seed, int64_t step, uint32_t layer, uint32_t threshold, int threads) {
  const Stream stream(seed, step, layer);
  for_each_sample(n, elements, threads, [&](int64_t i) {
    for_each_run(elements, static_cast<uint32_t>(sample[i]), stream, threshold,
                 [&](int64_t e, int64_t count, const uint8_t* kept) {
                   std::memcpy(out + i * elements + e, kept, count);
                 });
  });
}

void dropout_cpu(float* out, const float* x, const int64_t* sample, int64_t n, int64_t channels,
                 int64_t pixels, bool channels_last, int64_t seed, int64_t step, uint32_t layer,
                 uint32_t threshold, int threads) {
  const Stream stream(seed, step, layer);
  const int64_t elements = channels * pixels;
  const float scale = static_cast<float>(65536.0 / (65536.0 - threshold));
  for_each_sample(n, elements, threads, [&](int64_t i) {
    const uint32_t number = static_cast<uint32_t>(sample[i]);
    const float* from = x + i * elements;
    float* to = out + i * elements;
    if (channels_last) {
      for_each_run(elements, number, stream, threshold,
                   [&](int64_t e, int64_t count, const uint8_t* kept) {
                     apply_mask(to + e, from + e, kept, count, scale);
                   });
    } else if (channels % 8 == 0) {
      for (int64_t g = 0; g < channels / 8; ++g) {
        TCM_FAST_BOUNDS(8 * g * pixels, 8 * pixels, elements);
        apply_to_planes(to + 8 * g * pixels, from + 8 * g * pixels, pixels, g, channels / 8, number,
                        stream, threshold, scale);
      }
    } else {
      for_each_run(elements, number, stream, threshold,
                   [&](int64_t e, int64_t count, const uint8_t* kept) {
                     for (int64_t k = 0; k < count; ++k) {
                       const int64_t at = (e + k) % channels * pixels + (e + k) / channels;
                       TCM_FAST_BOUNDS(at, 1, elements);
                       to[at] = kept[k] ? from[at] * scale : 0.0f;
                     }
                   });
    }
  });
}

}  // namespace tcm_fast
