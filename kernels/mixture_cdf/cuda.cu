// Rows and windows of mixtures on NVIDIA GPUs, by the same lines as on the host (csrc/mixture_cdf.h): a warp
// a row, whose lanes take its entries, and a thread a window.
#include <initializer_list>

#include "cuda/launch.cuh"
#include "held.h"
#include "mixture_cdf.h"
#include "vlkern.h"

namespace vlkern {
namespace {

using cuda::Stream;
using mixture::Mixture;

constexpr int kWarp = 32, kRows = 8;  // of a block
constexpr int kBlock = 128;           // windows of a block

// means, scales, weights [..., count, channels]
struct Grid {
  const int32_t* means;
  const uint8_t* scales;
  const int16_t* weights;
  int count;
  int64_t channels;

  __device__ Mixture operator()(int64_t symbol) const {
    const int64_t at = symbol / channels * count * channels + symbol % channels;
    return {means + at, scales + at, weights + at, count, channels};
  }
};

__global__ void __launch_bounds__(kWarp* kRows)
    rows(Grid grid, const int32_t* __restrict__ low, int size, int32_t* __restrict__ out, int64_t symbols) {
  const int64_t symbol = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (symbol >= symbols) return;  // a whole warp
  const int lane = int(threadIdx.x % kWarp), first = low[symbol];
  const Mixture m = grid(symbol);
  out += symbol * (size + 2);
  int32_t start = 0;
  for (int base = 0; base < size + 2; base += kWarp) {
    const int j = base + lane;
    const int32_t at = mixture::cumulative(m, first + j - 1);
    if (base == 0) start = __shfl_sync(0xffffffffu, at, 0);
    if (j < size + 2) out[j] = j > size ? mixture::kTotal : mixture::entry(start, at, j, size);
  }
}

__global__ void __launch_bounds__(kBlock)
    windows(Grid grid, int32_t* __restrict__ low, int32_t* __restrict__ half, int64_t symbols) {
  const int64_t symbol = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (symbol >= symbols) return;
  const mixture::Window found = mixture::window(grid(symbol));
  low[symbol] = found.low;
  half[symbol] = found.half;
}

Grid grid(const mixture::Held& held) {
  return {held.means.const_data_ptr<int32_t>(), held.scales.const_data_ptr<uint8_t>(),
          held.weights.const_data_ptr<int16_t>(), int(held.components), held.channels};
}

Tensor mixture_cdf(const Tensor& means, const Tensor& scales, const Tensor& weights, const Tensor& low_,
                   int64_t size) {
  const mixture::Held held(means, scales, weights);
  VLKERN_CHECK(size >= 1 && size < mixture::kTotal - 1, "size must be from 1 to 65534");
  VLKERN_CHECK(low_.scalar_type() == ScalarType::Int, "low must be int32");
  const Tensor low = torch::stable::contiguous(low_);
  Stream stream(held.means);
  for (const Tensor* t : {&held.scales, &held.weights, &low}) stream.check_device(*t);
  auto shape = held.symbols;
  shape.push_back(size + 2);
  Tensor out = empty(held.means, shape, ScalarType::Int);
  const int64_t symbols = low.numel();
  VLKERN_CHECK(symbols * (size + 2) == out.numel(), "low must have shape [..., C]");
  stream.launch(rows, cuda::blocks(ceil_div(symbols, kRows)), kWarp * kRows, grid(held),
                low.const_data_ptr<int32_t>(), int(size), out.mutable_data_ptr<int32_t>(), symbols);
  return out;
}

std::tuple<Tensor, Tensor> mixture_window(const Tensor& means, const Tensor& scales, const Tensor& weights) {
  const mixture::Held held(means, scales, weights);
  Stream stream(held.means);
  for (const Tensor* t : {&held.scales, &held.weights}) stream.check_device(*t);
  Tensor low = empty(held.means, held.symbols, ScalarType::Int),
         half = empty(held.means, held.symbols, ScalarType::Int);
  const int64_t symbols = low.numel();
  stream.launch(windows, cuda::blocks(ceil_div(symbols, kBlock)), kBlock, grid(held),
                low.mutable_data_ptr<int32_t>(), half.mutable_data_ptr<int32_t>(), symbols);
  return {low, half};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CUDA, m) {
  m.impl("mixture_cdf.cuda", TORCH_BOX(&mixture_cdf));
  m.impl("mixture_window.cuda", TORCH_BOX(&mixture_window));
}

}  // namespace vlkern
