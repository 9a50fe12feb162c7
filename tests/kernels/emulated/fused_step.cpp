// The CUDA half's optimizer step beside the CPU half's, on the same tensors: equal bits, but for
// the last ones where clipping or normalised rows bring in the order of summation.
#include <cstdio>
#include <memory>

#include "fused_step_cuda.inc"

using namespace tcm_fast;

struct Tensors {
  std::vector<int64_t> table;
  std::vector<std::pair<std::unique_ptr<char[]>, int64_t>> memory;

  // Memory of just this size, `shift` bytes off a boundary of 16.
  int64_t tensor(int64_t bytes, int shift, unsigned seed) {
    memory.emplace_back(std::make_unique<char[]>(bytes + 32), bytes + 32);
    int64_t address = reinterpret_cast<int64_t>(memory.back().first.get());
    address += (16 - address % 16) % 16 + shift;
    if (bytes % 4 == 0 && seed) {
      for (int64_t i = 0; i < bytes / 4; ++i) {
        seed = seed * 1664525u + 1013904223u;
        reinterpret_cast<float*>(address)[i] = static_cast<int32_t>(seed) * 0x1p-31f;
      }
    }
    return address;
  }

  Tensors(int averages) {
    unsigned seed = 1;
    for (int64_t size : {1, 5, 1025, 8192, 9660, 10001, 13824}) {
      for (int variant = 0; variant < 12; ++variant) {
        // One or five; what is not along a row of one element is rounding alone.
        const bool rows = variant >= 6 && variant < 11 && size > 1;
        const int shift = variant == 1 || variant == 5 || variant == 7 ? 4 : 0;
        const bool is_short = variant == 4 || variant == 5 || variant == 8;
        const bool grad = variant != 3 && variant != 9;
        const bool wide = variant == 7;
        const bool fifths = (variant == 8 || variant == 10) && size % 5 == 0;
        const int64_t length = !rows ? 0 : fifths ? size / 5 : size;
        const int64_t line = rows ? length : size;
        const bool is_byte = variant >= 10 && line % 4 == 0;
        const int64_t moment = is_byte    ? size + size / line * blocks_in(line)
                               : is_short ? 2 * size
                                          : 4 * size;
        const auto of = [&](int64_t bytes, bool random) {
          return tensor(bytes, shift, random ? ++seed : 0);
        };
        const int64_t row[] = {of(4 * size, true),
                               grad ? of(4 * size, true) : 0,
                               grad ? of(moment, false) : 0,
                               grad ? of(moment, false) : 0,
                               grad ? of(4, false) : 0,
                               variant ? of(wide ? 4 * size : 2 * size, false) : 0,
                               size,
                               variant % 4,
                               (shift || length % 4 ? 0 : kAligned) | (variant == 2 ? kBfloat : 0) |
                                   (is_short ? kMoments16 : 0) | (is_byte ? kMoments8 : 0) |
                                   (wide ? kFloatCopy : 0),
                               length};
        table.insert(table.end(), row, row + kFields);
        for (int k = 0; k < averages; ++k) table.push_back(of(4 * size, true));
      }
    }
  }
};

int main() {
  for (int averages = 0; averages <= 2; ++averages) {
    for (double max_norm : {averages == 1 ? 0.5 : INFINITY}) {
      Tensors a(averages), b(averages);
      const int64_t width = kFields + averages, rows = a.table.size() / width;
      std::vector<double> options = {max_norm, 2.0, 0.5, 3.0, 7.0};
      for (int k = 0; k < averages; ++k) options.push_back(0.9 - 0.5 * k);
      for (int kind = 0; kind < 4; ++kind) {
        options.insert(options.end(), {1e-2, 0.9, 0.999, 1e-8, 0.1, static_cast<double>(kind)});
      }
      std::vector<double> on_device(options.size());
      store_options_cuda(on_device.data(), options.data(), options.size(), nullptr);
      std::vector<int32_t> chunks;
      int64_t lines = 0, longest = 0;
      for (bool by_rows : {false, true}) {
        for (int64_t t = 0; t < rows; ++t) {
          const int64_t row = a.table[t * width + kRow], size = row ? row : kChunk;
          if ((row > 0) != by_rows) continue;
          for (int64_t i = 0; i * size < a.table[t * width + kNumel]; ++i, lines += by_rows) {
            chunks.insert(chunks.end(), {static_cast<int32_t>(t), static_cast<int32_t>(i)});
          }
          longest = std::max(longest, row);
        }
      }
      const int64_t count = chunks.size() / 2;
      std::vector<double> scratch(fused_step_scratch(rows, count));
      double norm[2];
      int64_t skips[2] = {};
      float scale[2] = {4, 4};
      int32_t tracker[2] = {};
      for (int step = 0; step < 7; ++step) {
        for (Tensors* tensors : {&a, &b}) {
          // One element that is not finite, of a tensor with 16-byte accesses, one without, and a
          // row.
          const int64_t* row = &tensors->table[(60 + (step == 4 ? 6 : step % 2)) * width];
          const float bad[] = {1, 1, INFINITY, NAN, INFINITY, 1, 1};
          reinterpret_cast<float*>(row[kGrad])[9999] = bad[step];
        }
        fused_step_cpu(a.table.data(), rows, averages, options.data(), &norm[0], &skips[0],
                       &scale[0], &tracker[0], 1);
        fused_step_cuda(b.table.data(), rows, averages, chunks.data(), count, lines, longest,
                        on_device.data(), &norm[1], &skips[1], &scale[1], &tracker[1],
                        scratch.data(), true, nullptr);
        for (Tensors* tensors : {&a, &b}) {
          for (int64_t row : {60, 61, 66}) {
            reinterpret_cast<float*>(tensors->table[row * width + kGrad])[9999] = 1;
          }
        }
      }
      const bool same_norm = std::abs(norm[0] - norm[1]) <= 1e-6 * norm[0];
      if (skips[0] != 3 || skips[1] != 3 || scale[0] != scale[1] || tracker[0] != tracker[1] ||
          !same_norm) {
        std::printf("control: %g %g, %g %g\n", norm[0], norm[1], scale[0], scale[1]);
        return 1;
      }
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t field = 0; field < width; ++field) {
          if ((field >= kNumel && field < kFields) || !a.table[t * width + field]) continue;
          const int64_t size = field == kStep ? 1 : a.table[t * width + kNumel];
          const bool is_short = a.table[t * width + kFlags] & kMoments16;
          const bool is_moment = field == kExpAvg || field == kExpAvgSq;
          const bool has_bytes = a.table[t * width + kFlags] & kMoments8;
          const bool is_float = a.table[t * width + kFlags] & kFloatCopy;
          const bool halves = (field == kCopy && !is_float) || (is_moment && is_short);
          // Sums over rows, and over all where clipping, have another order.
          const bool loose = max_norm < 1 || a.table[t * width + kRow];
          const int64_t line = a.table[t * width + kRow] ? a.table[t * width + kRow] : size;
          const bool codes = is_moment && has_bytes;
          const int64_t bytes = codes    ? size + size / line * blocks_in(line)
                                : halves ? 2 * size
                                         : 4 * size;
          const void* x = reinterpret_cast<void*>(a.table[t * width + field]);
          const void* y = reinterpret_cast<void*>(b.table[t * width + field]);
          bool same = std::memcmp(x, y, bytes) == 0;
          if (!same && loose && field != kStep) {
            int64_t others = 0;  // a last place now and then rounds to another code
            for (int64_t i = 0; codes && i < bytes; ++i) {
              others += static_cast<const uint8_t*>(x)[i] != static_cast<const uint8_t*>(y)[i];
            }
            same = others <= bytes / 50;
            for (int64_t i = 0; !codes && i < size; ++i) {
              if (halves) {
                const auto* u = static_cast<const uint16_t*>(x) + i;
                const auto* v = static_cast<const uint16_t*>(y) + i;
                same &= is_short || std::abs(*u - *v) <= 1;
              } else {
                const float u = static_cast<const float*>(x)[i],
                            v = static_cast<const float*>(y)[i];
                same &= std::abs(u - v) <=
                        (is_short || has_bytes ? 1e-2f : 1e-5f) * (std::abs(u) + 1e-2f);
              }
            }
          }
          if (!same) {
            std::printf("row %ld field %ld differs\n", long(t), long(field));
            return 1;
          }
        }
      }
    }
  }
  std::puts("equal");
}
