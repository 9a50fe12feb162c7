// What test_fused_step.py compiles together with the extension's CPU half under the sanitizers:
// every buffer has its exact size, so that one element too far is noticed.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#include "fused_step.h"
#include "operations.h"

using namespace tcm_fast;

void random_numbers() {
  const int64_t sample[] = {0, 7};
  for (int64_t elements : {1, 7, 8, 9, 2047, 2048, 2049, 5000}) {
    const int64_t blocks = (elements + 3) / 4;
    std::vector<int32_t> bits(2 * 4 * blocks);
    std::vector<float> x(2 * elements, 1.0f), y(2 * elements);
    std::vector<uint8_t> mask(2 * elements);
    philox_bits_cpu(bits.data(), sample, 2, blocks, 1, 2, 3, 2);
    philox_normal_cpu(y.data(), sample, 2, elements, 1, 2, 3, 2);
    dropout_mask_cpu(mask.data(), sample, 2, elements, 1, 2, 3, 6554, 2);
    for (bool last : {false, true}) {
      dropout_cpu(y.data(), x.data(), sample, 2, elements, 1, last, 1, 2, 3, 6554, 2);
      dropout_cpu(y.data(), x.data(), sample, 2, 1, elements, last, 1, 2, 3, 6554, 2);
    }
  }
}

void normalisation() {
  const int64_t sample[] = {0, 7};
  for (int64_t channels : {1, 6, 24, 2052}) {
    for (int64_t pixels : {0, 1, 35, 700}) {
      const int64_t groups = channels == 1 ? 1 : 3, size = 2 * channels * pixels;
      std::vector<float> x(size, 0.5f), y(size), grad(size, 1.0f), grad_x(size);
      std::vector<float> weight(channels, 1.0f), mean(2 * groups), rstd(2 * groups);
      std::vector<float> rows[6];
      for (auto& row : rows) row.assign(2 * channels, 0.25f);
      std::vector<float> affine(4 * channels);
      for (uint32_t threshold : {0, 6554}) {
        const GroupNormSilu op{x.data(),
                               weight.data(),
                               weight.data(),
                               rows[0].data(),
                               rows[1].data(),
                               rows[2].data(),
                               mean.data(),
                               rstd.data(),
                               2,
                               channels,
                               pixels,
                               groups,
                               1e-6,
                               true,
                               sample,
                               1,
                               2,
                               3,
                               threshold};
        group_norm_silu_fwd_cpu(op, y.data(), 2);
        const GroupNormSiluGrads grads{grad.data(),    grad.data(),    grad_x.data(),
                                       rows[3].data(), rows[4].data(), rows[5].data(),
                                       affine.data()};
        group_norm_silu_bwd_cpu(op, grads, 2);
      }
    }
  }
}

int main() {
  random_numbers();
  normalisation();
  const int64_t sizes[] = {1, 2, 3, 15, 16, 17, 31, 33, 1023, 1024, 1025, 8191, 8192, 8193, 70001};
  for (int averages = 0; averages <= 3; ++averages) {
    std::vector<int64_t> table;
    std::vector<std::unique_ptr<char[]>> memory;
    const auto tensor = [&](int64_t bytes) {
      memory.emplace_back(new char[bytes]());
      return reinterpret_cast<int64_t>(memory.back().get());
    };
    int kind = 0;
    for (int64_t size : sizes) {
      for (int variant = 0; variant < 8; ++variant, ++kind) {
        const bool rows = variant >= 5, wide = variant == 6;
        const int64_t length = !rows ? 0 : size % 3 ? size : 3;
        const int64_t grad = variant == 3 ? 0 : tensor(4 * size);
        if (grad) {
          for (int64_t i = 0; i < size; ++i) reinterpret_cast<float*>(grad)[i] = 1e-3f * (i % 97);
        }
        const int64_t moment = variant == 4 || variant == 7 ? 2 * size : 4 * size;
        const int64_t row[] = {tensor(4 * size),
                               grad,
                               grad ? tensor(moment) : 0,
                               grad ? tensor(moment) : 0,
                               grad ? tensor(4) : 0,
                               variant ? tensor(wide ? 4 * size : 2 * size) : 0,
                               size,
                               kind % 4,
                               variant == 2                   ? kBfloat
                               : variant == 4 || variant == 7 ? kMoments16
                               : wide                         ? kFloatCopy
                                                              : 0,
                               length};
        table.insert(table.end(), row, row + kFields);
        for (int k = 0; k < averages; ++k) table.push_back(tensor(4 * size));
      }
    }
    std::vector<double> options = {1.0, 2.0, 0.5, 2.0, 7.0};
    for (int k = 0; k < averages; ++k) options.push_back(0.9 - 0.4 * k);
    for (int group = 0; group < 4; ++group) {
      options.insert(options.end(), {1e-3, 0.9, 0.999, 1e-8, 0.1, static_cast<double>(group)});
    }
    double norm;
    int64_t skips = 0;
    float scale = 4;
    int32_t tracker = 0;
    const int64_t rows = kind;
    for (int step = 0; step < 9; ++step) {
      float& last = reinterpret_cast<float*>(table[kGrad])[0];
      last = step == 5 ? INFINITY : 0.5f;
      fused_step_cpu(table.data(), rows, averages, options.data(), &norm, &skips,
                     averages ? &scale : nullptr, averages ? &tracker : nullptr, 1 + step % 3);
    }
    if (skips != 1 || !std::isfinite(norm)) return 1;
  }
  std::puts("clean");
}
