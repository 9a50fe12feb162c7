// The Python face of the extension: tensors arrive as addresses and sizes, so that no torch header
// is needed and one binary serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "fused_step.h"
#include "operations.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* name, const std::string& rule) {
  if (!holds) throw std::invalid_argument(std::string(name) + ": " + rule);
}

void check(const char* name, std::initializer_list<Address> addresses, int64_t n, int64_t size,
           int64_t num_blocks) {
  require(n >= 0 && size >= 0, name,
          "sizes must not be negative, got " + std::to_string(n) + " and " + std::to_string(size));
  require(num_blocks <= int64_t{1} << 32, name,
          "a sample has at most 2**32 blocks, got " + std::to_string(num_blocks));
  for (Address address : addresses) {
    require(n == 0 || size == 0 || address != 0, name, "addresses must not be null, got 0");
  }
}

int64_t read(const char* name, Address scalar) {
  require(scalar != 0, name, "addresses must not be null, got 0");
  return *at<int64_t>(scalar);
}

void check_threshold(const char* name, uint32_t threshold) {
  require(threshold < 65536, name,
          "threshold must be below 65536, got " + std::to_string(threshold));
}

void check_threads(const char* name, int threads) {
  require(threads > 0, name, "threads must be positive, got " + std::to_string(threads));
}

void philox_bits_cpu(Address out, Address sample, int64_t n, int64_t num_blocks, Address seed,
                     Address step, uint32_t layer, int threads) {
  check("philox_bits_cpu", {out, sample}, n, num_blocks, num_blocks);
  check_threads("philox_bits_cpu", threads);
  tcm_fast::philox_bits_cpu(at<int32_t>(out), at<int64_t>(sample), n, num_blocks,
                            read("philox_bits_cpu", seed), read("philox_bits_cpu", step), layer,
                            threads);
}

void philox_normal_cpu(Address out, Address sample, int64_t n, int64_t elements, Address seed,
                       Address step, uint32_t layer, int threads) {
  check("philox_normal_cpu", {out, sample}, n, elements, elements / 4);
  check_threads("philox_normal_cpu", threads);
  tcm_fast::philox_normal_cpu(at<float>(out), at<int64_t>(sample), n, elements,
                              read("philox_normal_cpu", seed), read("philox_normal_cpu", step),
                              layer, threads);
}

void dropout_mask_cpu(Address out, Address sample, int64_t n, int64_t elements, Address seed,
                      Address step, uint32_t layer, uint32_t threshold, int threads) {
  check("dropout_mask_cpu", {out, sample}, n, elements, elements / 8);
  check_threshold("dropout_mask_cpu", threshold);
  check_threads("dropout_mask_cpu", threads);
  tcm_fast::dropout_mask_cpu(at<uint8_t>(out), at<int64_t>(sample), n, elements,
                             read("dropout_mask_cpu", seed), read("dropout_mask_cpu", step), layer,
                             threshold, threads);
}

void dropout_cpu(Address out, Address x, Address sample, int64_t n, int64_t channels,
                 int64_t pixels, bool channels_last, Address seed, Address step, uint32_t layer,
                 uint32_t threshold, int threads) {
  require(channels >= 0, "dropout_cpu",
          "channels must not be negative, got " + std::to_string(channels));
  check("dropout_cpu", {out, x, sample}, n, channels * pixels, channels * pixels / 8);
  check_threshold("dropout_cpu", threshold);
  check_threads("dropout_cpu", threads);
  tcm_fast::dropout_cpu(at<float>(out), at<float>(x), at<int64_t>(sample), n, channels, pixels,
                        channels_last, read("dropout_cpu", seed), read("dropout_cpu", step), layer,
                        threshold, threads);
}

tcm_fast::GroupNormSilu group_norm_silu(const char* name, Address x, Address weight, Address bias,
                                        Address add, Address scale, Address shift, Address mean,
                                        Address rstd, int64_t n, int64_t channels, int64_t pixels,
                                        int64_t groups, double eps, bool silu, Address sample,
                                        Address seed, Address step, uint32_t layer,
                                        uint32_t threshold, int threads) {
  require(groups > 0 && channels > 0 && channels % groups == 0, name,
          "groups must divide the channels, got " + std::to_string(groups) + " and " +
              std::to_string(channels));
  check(name, {x, weight, bias, mean, rstd}, n, channels * pixels, channels * pixels / 8);
  check_threshold(name, threshold);
  check_threads(name, threads);
  if (threshold > 0) check(name, {sample}, n, 1, 0);
  return {at<float>(x),
          at<float>(weight),
          at<float>(bias),
          at<float>(add),
          at<float>(scale),
          at<float>(shift),
          at<float>(mean),
          at<float>(rstd),
          n,
          channels,
          pixels,
          groups,
          eps,
          silu,
          at<int64_t>(sample),
          threshold > 0 ? read(name, seed) : 0,
          threshold > 0 ? read(name, step) : 0,
          layer,
          threshold};
}

void group_norm_silu_fwd_cpu(Address y, Address x, Address weight, Address bias, Address add,
                             Address scale, Address shift, Address mean, Address rstd, int64_t n,
                             int64_t channels, int64_t pixels, int64_t groups, double eps,
                             bool silu, Address sample, Address seed, Address step, uint32_t layer,
                             uint32_t threshold, int threads) {
  const char* name = "group_norm_silu_fwd_cpu";
  const auto op =
      group_norm_silu(name, x, weight, bias, add, scale, shift, mean, rstd, n, channels, pixels,
                      groups, eps, silu, sample, seed, step, layer, threshold, threads);
  check(name, {y}, n, channels * pixels, 0);
  tcm_fast::group_norm_silu_fwd_cpu(op, at<float>(y), threads);
}

void group_norm_silu_bwd_cpu(Address grad_y, Address grad_past, Address grad_x, Address grad_affine,
                             Address grad_add, Address grad_scale, Address grad_shift, Address x,
                             Address weight, Address bias, Address add, Address scale,
                             Address shift, Address mean, Address rstd, int64_t n, int64_t channels,
                             int64_t pixels, int64_t groups, bool silu, Address sample,
                             Address seed, Address step, uint32_t layer, uint32_t threshold,
                             int threads) {
  const char* name = "group_norm_silu_bwd_cpu";
  const auto op =
      group_norm_silu(name, x, weight, bias, add, scale, shift, mean, rstd, n, channels, pixels,
                      groups, 0.0, silu, sample, seed, step, layer, threshold, threads);
  check(name, {grad_y, grad_x}, n, channels * pixels, 0);
  tcm_fast::group_norm_silu_bwd_cpu(
      op,
      {at<float>(grad_y), at<float>(grad_past), at<float>(grad_x), at<float>(grad_add),
       at<float>(grad_scale), at<float>(grad_shift), at<float>(grad_affine)},
      threads);
}

void check_counts(const char* name, int64_t tensors, int averages, int64_t groups) {
  require(tensors >= 0 && averages >= 0 && groups >= 0, name,
          "counts must not be negative, got " + std::to_string(tensors) + ", " +
              std::to_string(averages) + " and " + std::to_string(groups));
}

void check_scale(const char* name, std::initializer_list<Address> needed, Address scale,
                 Address tracker) {
  for (Address address : needed) {
    require(address != 0, name, "addresses must not be null, got 0");
  }
  require((scale == 0) == (tracker == 0), name, "scale and tracker must come together");
}

// A table on the host, row by row.
void fused_step_check(Address table, int64_t tensors, int averages, int64_t groups) {
  const char* name = "fused_step_check";
  check_counts(name, tensors, averages, groups);
  require(tensors == 0 || table != 0, name, "addresses must not be null, got 0");
  for (int64_t t = 0; t < tensors; ++t) {
    using namespace tcm_fast;
    const int64_t* row = at<int64_t>(table) + t * (kFields + averages);
    const std::string where = " in row " + std::to_string(t);
    require(row[kNumel] >= 0, name, "sizes must not be negative, got one" + where);
    require(row[kGroup] >= 0 && row[kGroup] < groups, name, "no such group" + where);
    if (row[kNumel] == 0) continue;
    require(row[kParam] != 0, name, "addresses must not be null, got 0" + where);
    if (row[kGrad]) {
      require(row[kExpAvg] && row[kExpAvgSq] && row[kStep], name,
              "a gradient needs its moments and step count, got none" + where);
    }
    for (int k = 0; k < averages; ++k) {
      require(row[kFields + k] != 0, name, "addresses must not be null, got 0" + where);
    }
    require(row[kRow] >= 0 && (row[kRow] == 0 || row[kNumel] % row[kRow] == 0), name,
            "elements must be whole rows, got others" + where);
    const bool blocks = row[kFlags] & kMoments8;
    require(!blocks || row[kFlags] & kAligned, name,
            "8-bit moments must be aligned, got others" + where);
    require(!blocks || (row[kRow] ? row[kRow] : row[kNumel]) % 4 == 0, name,
            "8-bit moments must be of a multiple of 4 elements, got others" + where);
    const bool wide = row[kFlags] & kFloatCopy;
    require(!wide || row[kRow], name, "only normalised rows have fp32 copies, got one" + where);
    if (row[kFlags] & kAligned) {
      // 4 elements of 16 bits are 8 bytes, of 8 bits 4
      const int half = row[kFlags] & kMoments16 ? 1 : blocks ? 2 : 0;
      int64_t any = row[kParam] | row[kGrad] | (row[kExpAvg] | row[kExpAvgSq]) << half |
                    row[kCopy] << (wide ? 0 : 1) | row[kRow] << 2;
      for (int k = 0; k < averages; ++k) any |= row[kFields + k];
      require(any % 16 == 0, name, "an address is not aligned as the flags say" + where);
    }
  }
}

void fused_step_cpu(Address table, int64_t tensors, int averages, Address options, int64_t groups,
                    Address norm, Address skips, Address scale, Address tracker, int threads) {
  fused_step_check(table, tensors, averages, groups);
  check_scale("fused_step_cpu", {options, norm, skips}, scale, tracker);
  check_threads("fused_step_cpu", threads);
  tcm_fast::fused_step_cpu(at<int64_t>(table), tensors, averages, at<double>(options),
                           at<double>(norm), at<int64_t>(skips), at<float>(scale),
                           at<int32_t>(tracker), threads);
}

#ifdef TCM_FAST_WITH_CUDA
void launched(const char* name, const char* error) {
  if (error) throw std::runtime_error(std::string(name) + ": " + error);
}

void philox_bits_cuda(Address out, Address sample, int64_t n, int64_t num_blocks, Address seed,
                      Address step, uint32_t layer, Address stream) {
  check("philox_bits_cuda", {out, sample, seed, step}, n, num_blocks, num_blocks);
  launched("philox_bits_cuda", tcm_fast::philox_bits_cuda(
                                   at<int32_t>(out), at<int64_t>(sample), n, num_blocks,
                                   at<int64_t>(seed), at<int64_t>(step), layer, at<void>(stream)));
}

void philox_normal_cuda(Address out, Address sample, int64_t n, int64_t elements, Address seed,
                        Address step, uint32_t layer, Address stream) {
  check("philox_normal_cuda", {out, sample, seed, step}, n, elements, elements / 4);
  launched(
      "philox_normal_cuda",
      tcm_fast::philox_normal_cuda(at<float>(out), at<int64_t>(sample), n, elements,
                                   at<int64_t>(seed), at<int64_t>(step), layer, at<void>(stream)));
}

void dropout_mask_cuda(Address out, Address sample, int64_t n, int64_t elements, Address seed,
                       Address step, uint32_t layer, uint32_t threshold, Address stream) {
  check("dropout_mask_cuda", {out, sample, seed, step}, n, elements, elements / 8);
  check_threshold("dropout_mask_cuda", threshold);
  launched("dropout_mask_cuda",
           tcm_fast::dropout_mask_cuda(at<uint8_t>(out), at<int64_t>(sample), n, elements,
                                       at<int64_t>(seed), at<int64_t>(step), layer, threshold,
                                       at<void>(stream)));
}

void fused_step_cuda(Address table, int64_t tensors, int averages, Address chunks,
                     int64_t num_chunks, int64_t num_rows, int64_t longest, Address options,
                     int64_t groups, Address norm, Address skips, Address scale, Address tracker,
                     Address scratch, int64_t scratch_size, bool eight, Address stream) {
  const char* name = "fused_step_cuda";
  check_counts(name, tensors, averages, groups);
  check_scale(name, {table, chunks, options, norm, skips, scratch}, scale, tracker);
  require(num_chunks >= 0 && num_chunks < int64_t{1} << 31, name,
          "chunks must be fewer than 2**31, got " + std::to_string(num_chunks));
  require(num_rows >= 0 && num_rows <= num_chunks && longest >= 0 && longest < int64_t{1} << 31,
          name,
          "rows must be among the chunks and below 2**31, got " + std::to_string(num_rows) +
              " of " + std::to_string(longest));
  const int64_t needed = tcm_fast::fused_step_scratch(tensors, num_chunks);
  require(scratch_size >= needed, name,
          "scratch must hold " + std::to_string(needed) + ", got " + std::to_string(scratch_size));
  launched(name,
           tcm_fast::fused_step_cuda(
               at<int64_t>(table), tensors, averages, at<int32_t>(chunks), num_chunks, num_rows,
               longest, at<double>(options), at<double>(norm), at<int64_t>(skips), at<float>(scale),
               at<int32_t>(tracker), at<double>(scratch), eight, at<void>(stream)));
}

void store_options_cuda(Address to, const std::vector<double>& values, Address stream) {
  require(values.empty() || to != 0, "store_options_cuda", "addresses must not be null, got 0");
  launched("store_options_cuda",
           tcm_fast::store_options_cuda(at<double>(to), values.data(),
                                        static_cast<int64_t>(values.size()), at<void>(stream)));
}

constexpr const char* kCudaArchs = TCM_FAST_WITH_CUDA;
#else
constexpr const char* kCudaArchs = "";
#endif

#ifdef TCM_FAST_DEBUG
constexpr bool kDebug = true;
#else
constexpr bool kDebug = false;
#endif

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  std::string arch;
  for (const char* c = kCudaArchs;; ++c) {
    if (*c && *c != ';') {
      arch += *c;
    } else {
      if (!arch.empty()) archs.push_back(arch);
      arch.clear();
    }
    if (!*c) return archs;
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() =
      "Random numbers, dropout, normalisation and optimizer steps on raw memory; tcm_fast.kernels "
      "checks and "
      "wraps them.";
  m.def("has_cuda", [] { return *kCudaArchs != '\0'; }, "Was the CUDA half built?");
  m.def("cuda_archs", &cuda_archs, "Architectures of the CUDA half, such as ['80', '90'].");
  m.def("is_debug", [] { return kDebug; }, "Was it built with TCM_FAST_DEBUG=1?");

  m.def("philox_bits_cpu", &philox_bits_cpu, release(), py::arg("out"), py::arg("sample"),
        py::arg("n"), py::arg("num_blocks"), py::arg("seed"), py::arg("step"), py::arg("layer"),
        py::arg("threads"));
  m.def("philox_normal_cpu", &philox_normal_cpu, release(), py::arg("out"), py::arg("sample"),
        py::arg("n"), py::arg("elements"), py::arg("seed"), py::arg("step"), py::arg("layer"),
        py::arg("threads"));
  m.def("dropout_mask_cpu", &dropout_mask_cpu, release(), py::arg("out"), py::arg("sample"),
        py::arg("n"), py::arg("elements"), py::arg("seed"), py::arg("step"), py::arg("layer"),
        py::arg("threshold"), py::arg("threads"));
  m.def("dropout_cpu", &dropout_cpu, release(), py::arg("out"), py::arg("x"), py::arg("sample"),
        py::arg("n"), py::arg("channels"), py::arg("pixels"), py::arg("channels_last"),
        py::arg("seed"), py::arg("step"), py::arg("layer"), py::arg("threshold"),
        py::arg("threads"));
  m.def("group_norm_silu_fwd_cpu", &group_norm_silu_fwd_cpu, release(), py::arg("y"), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("add"), py::arg("scale"), py::arg("shift"),
        py::arg("mean"), py::arg("rstd"), py::arg("n"), py::arg("channels"), py::arg("pixels"),
        py::arg("groups"), py::arg("eps"), py::arg("silu"), py::arg("sample"), py::arg("seed"),
        py::arg("step"), py::arg("layer"), py::arg("threshold"), py::arg("threads"));
  m.def("group_norm_silu_bwd_cpu", &group_norm_silu_bwd_cpu, release(), py::arg("grad_y"),
        py::arg("grad_past"), py::arg("grad_x"), py::arg("grad_affine"), py::arg("grad_add"),
        py::arg("grad_scale"), py::arg("grad_shift"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("add"), py::arg("scale"), py::arg("shift"), py::arg("mean"),
        py::arg("rstd"), py::arg("n"), py::arg("channels"), py::arg("pixels"), py::arg("groups"),
        py::arg("silu"), py::arg("sample"), py::arg("seed"), py::arg("step"), py::arg("layer"),
        py::arg("threshold"), py::arg("threads"));
  m.attr("SOURCES") = TCM_FAST_SOURCES;
  m.attr("FUSED_STEP_CHUNK") = tcm_fast::kChunk;
  m.def("fused_step_check", &fused_step_check, release(), py::arg("table"), py::arg("tensors"),
        py::arg("averages"), py::arg("groups"));
  m.def("fused_step_cpu", &fused_step_cpu, release(), py::arg("table"), py::arg("tensors"),
        py::arg("averages"), py::arg("options"), py::arg("groups"), py::arg("norm"),
        py::arg("skips"), py::arg("scale"), py::arg("tracker"), py::arg("threads"));
#ifdef TCM_FAST_WITH_CUDA
  m.def("cuda_runtime_version", &tcm_fast::cuda_runtime_version,
        "CUDA that it was built with, such as 13000.");
  m.def("cuda_driver_version", &tcm_fast::cuda_driver_version,
        "Newest CUDA that the driver runs; 0 without a driver.");
  m.def("fused_step_scratch", &tcm_fast::fused_step_scratch, py::arg("tensors"),
        py::arg("num_chunks"));
  m.def("fused_step_cuda", &fused_step_cuda, release(), py::arg("table"), py::arg("tensors"),
        py::arg("averages"), py::arg("chunks"), py::arg("num_chunks"), py::arg("num_rows"),
        py::arg("longest"), py::arg("options"), py::arg("groups"), py::arg("norm"),
        py::arg("skips"), py::arg("scale"), py::arg("tracker"), py::arg("scratch"),
        py::arg("scratch_size"), py::arg("eight"), py::arg("stream"));
  m.def("store_options_cuda", &store_options_cuda, release(), py::arg("to"), py::arg("values"),
        py::arg("stream"));
  m.def("philox_bits_cuda", &philox_bits_cuda, release(), py::arg("out"), py::arg("sample"),
        py::arg("n"), py::arg("num_blocks"), py::arg("seed"), py::arg("step"), py::arg("layer"),
        py::arg("stream"));
  m.def("philox_normal_cuda", &philox_normal_cuda, release(), py::arg("out"), py::arg("sample"),
        py::arg("n"), py::arg("elements"), py::arg("seed"), py::arg("step"), py::arg("layer"),
        py::arg("stream"));
  m.def("dropout_mask_cuda", &dropout_mask_cuda, release(), py::arg("out"), py::arg("sample"),
        py::arg("n"), py::arg("elements"), py::arg("seed"), py::arg("step"), py::arg("layer"),
        py::arg("threshold"), py::arg("stream"));
#endif
}
