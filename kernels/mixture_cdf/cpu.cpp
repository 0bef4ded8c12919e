// Rows and windows of mixtures on the CPU: checks and threads. The arithmetic is in csrc/mixture_cdf.inc.
#include "held.h"
#include "mixture_cdf.h"
#include "simd.h"
#include "vlkern.h"

#define VLKERN_ROOM mixture_cdf
#define VLKERN_ARITHMETIC "../kernels/mixture_cdf/cpu_kernel.inc"
// after the two names
#include "levels.inc"

namespace vlkern {
namespace {

using namespace mixture_cdf;

constexpr int64_t kPiece = 1 << 12;  // entries times components that a thread takes at a time, 10 us

struct Grid : mixture::Held {
  using Held::Held;

  mixture::Mixture operator()(int64_t point, int64_t channel) const {
    const int64_t at = point * components * channels + channel;
    return {means.const_data_ptr<int32_t>() + at, scales.const_data_ptr<uint8_t>() + at,
            weights.const_data_ptr<int16_t>() + at, int(components), channels};
  }
};

Tensor mixture_cdf_rows(const Tensor& means, const Tensor& scales, const Tensor& weights, const Tensor& low_,
                        int64_t size) {
  const Grid grid(means, scales, weights);
  VLKERN_CHECK(size >= 1 && size < mixture::kTotal - 1, "size must be from 1 to 65534");
  VLKERN_CHECK(low_.scalar_type() == ScalarType::Int, "low must be int32");
  Tensor low = torch::stable::contiguous(low_);
  auto shape = grid.symbols;
  shape.push_back(size + 2);
  Tensor rows = empty(grid.means, shape, ScalarType::Int);
  const auto* first = low.const_data_ptr<int32_t>();
  auto* out = rows.mutable_data_ptr<int32_t>();
  VLKERN_CHECK(low.numel() * (size + 2) == rows.numel(), "low must have shape [..., C]");
  with_kernels([&]<class Kernels>() {
    const int64_t piece = std::max<int64_t>(1, kPiece / (size * grid.components));
    torch::stable::parallel_for(0, low.numel(), piece, [&](int64_t begin, int64_t end) {
      std::vector<typename Kernels::Part> parts(grid.components);
      for (int64_t i = begin; i < end; ++i)
        Kernels::row(grid(i / grid.channels, i % grid.channels), parts.data(), first[i], size,
                     out + i * (size + 2));
    });
  });
  return rows;
}

std::tuple<Tensor, Tensor> mixture_window(const Tensor& means, const Tensor& scales, const Tensor& weights) {
  const Grid grid(means, scales, weights);
  Tensor low = empty(grid.means, grid.symbols, ScalarType::Int),
         half = empty(low, grid.symbols, ScalarType::Int);
  auto *first = low.mutable_data_ptr<int32_t>(), *reach = half.mutable_data_ptr<int32_t>();
  if (low.numel() == 0) return {low, half};
  with_kernels([&]<class Kernels>() {
    const int64_t piece = std::max<int64_t>(1, kPiece / (grid.channels * grid.components));
    torch::stable::parallel_for(0, low.numel() / grid.channels, piece, [&](int64_t begin, int64_t end) {
      std::vector<typename Kernels::Given> given(grid.components);
      for (int64_t i = begin; i < end; ++i)
        Kernels::windows(grid(i, 0), given.data(), first + i * grid.channels, reach + i * grid.channels);
    });
  });
  return {low, half};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("mixture_cdf.cpu", TORCH_BOX(&mixture_cdf_rows));
  m.impl("mixture_window.cpu", TORCH_BOX(&mixture_window));
}

}  // namespace vlkern
