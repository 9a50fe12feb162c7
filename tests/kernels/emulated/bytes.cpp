// Bytes that the CUDA half's optimizer step moves for each parameter: fp32 weights, gradients and
// moments, one average, a 16-bit copy; without and with normalised rows.
#include <cstdio>

#include "fused_step_cuda.inc"

using namespace tcm_fast;

int main() {
  constexpr int64_t kSize = 1 << 16;
  for (int kind : {0, kRAdam}) {
    for (int64_t row : {0, 576, 1024, 8192}) {
      const int64_t rows = row ? kSize / row : 0, size = row ? kSize / row * row : kSize;
      std::vector<float4> memory(7 * kSize / 4, float4(0.5f, -1, 2, 1));
      float* at = reinterpret_cast<float*>(memory.data());
      float steps = 7;
      const auto of = [&](int place) { return reinterpret_cast<int64_t>(at + place * kSize); };
      const int64_t table[] = {of(0),
                               of(1),
                               of(2),
                               of(3),
                               reinterpret_cast<int64_t>(&steps),
                               of(4),
                               size,
                               0,
                               kAligned | kBfloat,
                               row,
                               of(5)};
      const double options[] = {1.0,  2,   0.5,   3,    7,   0.99,
                                1e-2, 0.9, 0.999, 1e-8, 0.1, static_cast<double>(kind)};
      std::vector<double> on_device(std::size(options));
      store_options_cuda(on_device.data(), options, std::size(options), nullptr);
      std::vector<int32_t> chunks;
      for (int64_t i = 0; i * (row ? row : kChunk) < size; ++i) {
        chunks.insert(chunks.end(), {0, static_cast<int32_t>(i)});
      }
      const int64_t count = chunks.size() / 2;
      std::vector<double> scratch(fused_step_scratch(1, count));
      double norm = 0;
      int64_t skips = 0;
      float scale = 4;
      int32_t tracker = 0;
      bytes_moved = 0;
      is_counted = [&](const void* address) {
        return address >= at && address < at + memory.size() * 4;
      };
      fused_step_cuda(table, 1, 1, chunks.data(), count, rows, row, on_device.data(), &norm, &skips,
                      &scale, &tracker, scratch.data(), false, nullptr);
      is_counted = nullptr;
      if (skips || bytes_moved % size) return 1;
      std::printf("%d %d\n", row != 0, static_cast<int>(bytes_moved / size));
    }
  }
}
