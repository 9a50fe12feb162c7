// The CUDA half's optimizer step beside the CPU half's, on the same tensors: equal bits, but for the
// last ones where clipping brings in the norm's order of summation.
#include "fused_step_cuda.inc"

#include <cstdio>
#include <memory>

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
    for (int64_t size : {1, 5, 1025, 8192, 10001}) {
      for (int variant = 0; variant < 6; ++variant) {
        const int shift = variant == 1 || variant == 5 ? 4 : 0;
        const bool is_short = variant >= 4;
        const bool grad = variant != 3;
        const auto of = [&](int64_t bytes, bool random) {
          return tensor(bytes, shift, random ? ++seed : 0);
        };
        const int64_t row[] = {of(4 * size, true),
                               grad ? of(4 * size, true) : 0,
                               grad ? of(is_short ? 2 * size : 4 * size, false) : 0,
                               grad ? of(is_short ? 2 * size : 4 * size, false) : 0,
                               grad ? of(4, false) : 0,
                               variant ? of(2 * size, false) : 0,
                               size,
                               variant % 4,
                               (shift ? 0 : kAligned) | (variant == 2 ? kBfloat : 0) |
                                   (is_short ? kMoments16 : 0)};
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
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t i = 0; i * kChunk < a.table[t * width + kNumel]; ++i) {
          chunks.insert(chunks.end(), {static_cast<int32_t>(t), static_cast<int32_t>(i)});
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
          // One element that is not finite, of a tensor with and one without 16-byte accesses.
          const int64_t* row = &tensors->table[(24 + step % 2) * width];
          reinterpret_cast<float*>(row[kGrad])[9999] = step == 2 ? INFINITY : step == 3 ? NAN : 1;
        }
        fused_step_cpu(a.table.data(), rows, averages, options.data(), &norm[0], &skips[0],
                       &scale[0], &tracker[0], 1);
        fused_step_cuda(b.table.data(), rows, averages, chunks.data(), count, on_device.data(),
                        &norm[1], &skips[1], &scale[1], &tracker[1], scratch.data(), nullptr);
        for (Tensors* tensors : {&a, &b}) {
          reinterpret_cast<float*>(tensors->table[24 * width + kGrad])[9999] = 1;
          reinterpret_cast<float*>(tensors->table[25 * width + kGrad])[9999] = 1;
        }
      }
      const bool same_norm = std::abs(norm[0] - norm[1]) <= 1e-6 * norm[0];
      if (skips[0] != 2 || skips[1] != 2 || scale[0] != scale[1] || tracker[0] != tracker[1] ||
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
          const bool halves = field == kCopy || (is_moment && is_short);
          const int64_t bytes = halves ? 2 * size : 4 * size;
          const void* x = reinterpret_cast<void*>(a.table[t * width + field]);
          const void* y = reinterpret_cast<void*>(b.table[t * width + field]);
          bool same = std::memcmp(x, y, bytes) == 0;
          if (!same && max_norm < 1 && !halves && field != kStep) {
            same = true;
            for (int64_t i = 0; i < size; ++i) {
              const float u = static_cast<const float*>(x)[i], v = static_cast<const float*>(y)[i];
              same &= std::abs(u - v) <= (is_short ? 1e-2f : 1e-5f) * (std::abs(u) + 1e-3f);
            }
          }
          if (!same && !(max_norm < 1 && halves)) {
            std::printf("row %ld field %ld differs\n", long(t), long(field));
            return 1;
          }
        }
      }
    }
  }
  std::puts("equal");
}
