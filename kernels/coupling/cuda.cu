// Affine couplings on NVIDIA GPUs. Memory-bound: every tensor crosses memory once, in 16-byte accesses, and
// the permutations are addresses. A block takes a tile of one example's x [N, K] and leaves its share of the
// logdet; a second kernel adds these up in their order.
//
// Where channels are split, a tile is some rows of x in shared memory: loaded and stored as they lie, while
// the part's tensors are read and written as they lie, too, and only the tile is addressed through the index
// vector. Where all channels of a row change or none, a thread keeps its elements in registers.
//
// Rows that do not fit, and memory that is not aligned to 16 bytes, take single elements, and y itself is the
// tile.
#include <cmath>
#include <initializer_list>

#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "elements.cuh"

namespace vlkern {
namespace {

using namespace coupling;
using cuda::Stream;

constexpr int kBlock = 256;           // threads
constexpr int kEach = 2;              // vectors of a thread in a tile of whole rows
constexpr int kTileBytes = 8 << 10;   // of x in shared memory: four blocks and more fit at a time
constexpr int kNarrowTile = 1 << 11;  // elements, taken one by one

// x [B, N, K] in tiles, its part [B, n, k], and where that lies.
struct Layout {
  int64_t N, K, n, k;
  const int32_t* slots;     // token of x -> row of the part or -1; null: all, in order
  const int32_t* channels;  // channel of the part -> of x; null: all, in order
  int64_t tile;             // rows of a tile; its elements where a thread keeps its own
  unsigned tiles;           // of an example

  __device__ int64_t example() const { return blockIdx.x / tiles; }
  __device__ int64_t first() const { return int64_t(blockIdx.x % tiles) * tile; }
  __device__ int64_t row_of_part(int64_t token) const { return slots ? slots[token] : token; }
};

// A tensor of the part's shape with strides.
template <class T>
struct Strided {
  const T* data;
  int64_t example, row;

  __device__ const T* at(int64_t b, int64_t s, int64_t t) const { return data + b * example + s * row + t; }
};

// a / b, in 32 bits where that is enough.
__device__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : int64_t(unsigned(a) / unsigned(b));
}

// Calls f(element of the example, row of the part or -1, channel) for what a thread keeps in registers.
template <int kW, class F>
__device__ void each_in_registers(const Layout& at, F f) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    int64_t e = at.first() + (i * kBlock + int(threadIdx.x)) * kW;
    if (e >= at.N * at.K) continue;
    int64_t token = quotient(e, at.K);
    f(e, at.row_of_part(token), e - token * at.K);
  }
}

// Brings a tile of whole rows from `x` to `y`.
template <bool kWide, class T>
__device__ void copy_rows(const T* x, T* y, int64_t elements) {
  constexpr int kW = kWidth<T, kWide>;
  for (int64_t e = int64_t(threadIdx.x) * kW; e < elements; e += kBlock * kW)
    give<kWide>(y + e, take<kWide>(x + e));
}

// Calls f(the part's elements of a tile, row of the part, channel of the part) and puts back what it leaves.
template <bool kWide, class T, class F>
__device__ void each_in_tile(const Layout& at, int64_t rows, T* tile, F f) {
  constexpr int kW = kWidth<T, kWide>;
  for (int64_t e = int64_t(threadIdx.x) * kW; e < rows * at.k; e += kBlock * kW) {
    int64_t row = quotient(e, at.k), t = e - row * at.k, s = at.row_of_part(at.first() + row);
    if (s < 0) continue;
    T* of_row = tile + row * at.K;
    int32_t channel[kW];
    Held<T, kWide> held;
#pragma unroll
    for (int w = 0; w < kW; w += kWide ? 4 : 1) {
      auto some = take<kWide>(at.channels + t + w);
#pragma unroll
      for (int v = 0; v < (kWide ? 4 : 1); ++v) channel[w + v] = some.at[v];
    }
#pragma unroll
    for (int w = 0; w < kW; ++w) {
      if (uint64_t(channel[w]) >= uint64_t(at.K)) __trap();  // as PyTorch does with an index out of range
      held.at[w] = of_row[channel[w]];
    }
    f(held, s, t);
#pragma unroll
    for (int w = 0; w < kW; ++w) of_row[channel[w]] = held.at[w];
  }
}

// Runs f(tile) between a tile's way in and its way out.
template <bool kWide, class T, class F>
__device__ void through_tile(const Layout& at, const T* x, T* y, F f) {
  int64_t from = (at.example() * at.N + at.first()) * at.K;
  int64_t rows = at.N - at.first() < at.tile ? at.N - at.first() : at.tile;
  if constexpr (kWide) {
    alignas(16) __shared__ char bytes[kTileBytes];
    T* tile = reinterpret_cast<T*>(bytes);
    copy_rows<kWide>(x + from, tile, rows * at.K);
    __syncthreads();
    f(tile, rows);
    __syncthreads();
    copy_rows<kWide>(tile, y + from, rows * at.K);
  } else {
    copy_rows<kWide>(x + from, y + from, rows * at.K);
    __syncthreads();
    f(y + from, rows);
  }
}

__device__ void leave_sum(float sum, bool negative, float* sums) {
  __shared__ float warps[kBlock / 32];
  float total = cuda::row_sum(sum, warps);
  if (threadIdx.x == 0) sums[blockIdx.x] = negative ? -total : total;
}

// y2, the part that changed, only where the backward wants it apart.
template <class T, bool kWide>
__global__ void __launch_bounds__(kBlock)
    map_rows(const T* __restrict__ x, Strided<T> u, Strided<T> r, T* __restrict__ y, T* __restrict__ y2,
             float* __restrict__ sums, Layout at, Map map) {
  const int64_t b = at.example(), from = b * at.N * at.K;
  float sum = 0;
  each_in_registers<kWidth<T, kWide>>(at, [&](int64_t e, int64_t s, int64_t t) {
    auto held = take<kWide>(x + from + e);
    if (s >= 0) {
      sum += map(held, take<kWide>(u.at(b, s, t)), take<kWide>(r.at(b, s, t)));
      if (y2) give<kWide>(y2 + (b * at.n + s) * at.k + t, held);
    }
    give<kWide>(y + from + e, held);
  });
  leave_sum(sum, map.inverse, sums);
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kBlock)
    map_channels(const T* __restrict__ x, Strided<T> u, Strided<T> r, T* y, T* __restrict__ y2,
                 float* __restrict__ sums, Layout at, Map map) {
  const int64_t b = at.example();
  float sum = 0;
  through_tile<kWide>(at, x, y, [&](T* tile, int64_t rows) {
    each_in_tile<kWide>(at, rows, tile, [&](auto& held, int64_t s, int64_t t) {
      sum += map(held, take<kWide>(u.at(b, s, t)), take<kWide>(r.at(b, s, t)));
      if (y2) give<kWide>(y2 + (b * at.n + s) * at.k + t, held);
    });
  });
  leave_sum(sum, map.inverse, sums);
}

// y is the part that changed; dshift only where that is not dx itself.
template <class T, bool kWide>
__global__ void __launch_bounds__(kBlock)
    backward_rows(const T* __restrict__ grad, const float* __restrict__ dl, Strided<T> y, Strided<T> r,
                  T* __restrict__ dx, T* __restrict__ dshift, T* __restrict__ draw, Layout at, float most) {
  const int64_t b = at.example(), from = b * at.N * at.K;
  each_in_registers<kWidth<T, kWide>>(at, [&](int64_t e, int64_t s, int64_t t) {
    auto held = take<kWide>(grad + from + e);
    if (s >= 0) {
      const int64_t of_part = (b * at.n + s) * at.k + t;
      give<kWide>(draw + of_part,
                  gradients_of(held, take<kWide>(y.at(b, s, t)), take<kWide>(r.at(b, s, t)), dl[b], most));
      if (dshift) give<kWide>(dshift + of_part, held);
    }
    give<kWide>(dx + from + e, held);
  });
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kBlock)
    backward_channels(const T* __restrict__ grad, const float* __restrict__ dl, Strided<T> y, Strided<T> r,
                      T* dx, T* __restrict__ dshift, T* __restrict__ draw, Layout at, float most) {
  const int64_t b = at.example();
  through_tile<kWide>(at, grad, dx, [&](T* tile, int64_t rows) {
    each_in_tile<kWide>(at, rows, tile, [&](auto& held, int64_t s, int64_t t) {
      const int64_t of_part = (b * at.n + s) * at.k + t;
      give<kWide>(draw + of_part,
                  gradients_of(held, take<kWide>(y.at(b, s, t)), take<kWide>(r.at(b, s, t)), dl[b], most));
      give<kWide>(dshift + of_part, held);
    });
  });
}

// slots [N]: where each token stands among the n tokens, or -1. One block.
__global__ void __launch_bounds__(kBlock)
    place(const int32_t* __restrict__ tokens, int64_t n, int32_t* slots, int64_t N) {
  for (int64_t i = threadIdx.x; i < N; i += kBlock) slots[i] = -1;
  __syncthreads();
  for (int64_t s = threadIdx.x; s < n; s += kBlock) {
    if (uint64_t(tokens[s]) >= uint64_t(N)) __trap();
    slots[tokens[s]] = int32_t(s);
  }
}

// logdet [B] from sums [B, tiles], always in the same order. A warp an example.
__global__ void __launch_bounds__(kBlock)
    add_up(const float* __restrict__ sums, int64_t tiles, float* __restrict__ logdet, int64_t examples) {
  int64_t b = int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;
  float sum = 0;
  if (b < examples)
    for (int64_t i = threadIdx.x % 32; i < tiles; i += 32) sum += sums[b * tiles + i];
  sum = cuda::warp_sum(sum);
  if (b < examples && threadIdx.x % 32 == 0) logdet[b] = sum;
}

// What the launches of a call have in common.
struct Call : Shape {
  Tensor x;  // or its gradient
  Indices slots, channels;
  Stream stream;

  Call(const Tensor& x_, const Tensor& raw, const Indices& tokens, const Indices& channels_)
      : Shape(x_, raw, tokens, channels_), x(torch::stable::contiguous(x_)), stream(x) {
    stream.check_device(raw);
    if (channels_) {
      channels = torch::stable::contiguous(*channels_);
      stream.check_device(*channels);
    }
    if (tokens) {
      Tensor list = torch::stable::contiguous(*tokens);
      stream.check_device(list);
      slots = empty(x, {N}, ScalarType::Int);
      stream.launch(place, 1, kBlock, list.const_data_ptr<int32_t>(), n, slots->mutable_data_ptr<int32_t>(),
                    N);
    }
  }

  bool whole() const { return !slots && !channels; }

  // Calls f.operator()<kWide>(layout) as these tensors of the part's shape and outputs allow.
  template <class T, class F>
  void with_layout(const Side& one, const Side& two, std::initializer_list<void*> outputs, F&& f) const {
    Layout at{N,
              K,
              n,
              k,
              slots ? slots->const_data_ptr<int32_t>() : nullptr,
              channels ? channels->const_data_ptr<int32_t>() : nullptr,
              0,
              0};
    bool wide = cuda::aligned(x.const_data_ptr<T>()) && (!channels || cuda::aligned(at.channels));
    for (void* p : outputs) wide &= cuda::aligned(p);
    bool flat = whole();
    for (const Side* side : {&one, &two}) flat &= side->row == K && (side->example == N * K || B == 1);
    if (flat) at.K = at.k = N * K, at.N = at.n = 1;
    constexpr int64_t kW = Vector<T>::kSize, kRoom = kTileBytes / sizeof(T);
    wide &= at.K % kW == 0 && at.k % kW == 0 && (!channels || at.K <= kRoom);
    for (const Side* side : {&one, &two})
      wide &= cuda::aligned(side->owner.const_data_ptr<T>()) && side->example % kW == 0 &&
              (flat || side->row % kW == 0);
    if (channels)
      at.tile = std::max<int64_t>(1, (wide ? kRoom : kNarrowTile) / std::max<int64_t>(1, at.K));
    else
      at.tile = kBlock * kEach * (wide ? kW : 1);
    at.tiles = cuda::blocks(ceil_div(channels ? at.N : at.N * at.K, at.tile));
    wide ? f.template operator()<true>(at) : f.template operator()<false>(at);
  }
};

template <class T>
Strided<T> on_device(const Side& side) {
  return {side.owner.const_data_ptr<T>(), side.example, side.row};
}

struct Outputs {
  Tensor y, logdet, y2;
};

// Both ways; y2 only if `apart`.
Outputs map(const Tensor& x, const Tensor& shift, const Tensor& raw, const Indices& tokens,
            const Indices& channels, double max_scale, bool apart, bool inverse) {
  check_shift(shift, raw);
  Call call(x, raw, tokens, channels);
  call.stream.check_device(shift);
  VLKERN_CHECK(!apart || !call.whole(), "expected tokens or channels");
  const ScalarType dtype = x.scalar_type();
  Tensor y = empty(x, shape_of(x), dtype), logdet = empty(x, {call.B}, ScalarType::Float),
         y2 = apart ? empty(x, shape_of(raw), dtype) : y;
  const Side u(shift, call), r(raw, call);
  const Map to{float(max_scale), float(std::log(max_scale)), inverse};
  dispatch(dtype, [&]<class T>() {
    T *out = y.mutable_data_ptr<T>(), *part = apart ? y2.mutable_data_ptr<T>() : nullptr;
    call.with_layout<T>(u, r, {out, part}, [&]<bool kWide>(const Layout& at) {
      const unsigned grid = cuda::blocks(call.B * at.tiles);
      Tensor sums = empty(x, {int64_t(grid)}, ScalarType::Float);
      call.stream.launch(channels ? map_channels<T, kWide> : map_rows<T, kWide>, grid, kBlock,
                         call.x.const_data_ptr<T>(), on_device<T>(u), on_device<T>(r), out, part,
                         sums.mutable_data_ptr<float>(), at, to);
      call.stream.launch(add_up, cuda::blocks(ceil_div(call.B, kBlock / 32)), kBlock,
                         sums.const_data_ptr<float>(), at.tiles, logdet.mutable_data_ptr<float>(), call.B);
    });
  });
  return {y, logdet, y2};
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& shift, const Tensor& raw,
                                           Indices tokens, Indices channels, double max_scale) {
  Outputs to = map(x, shift, raw, tokens, channels, max_scale, false, false);
  return {to.y, to.logdet};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_part(const Tensor& x, const Tensor& shift,
                                                        const Tensor& raw, Indices tokens, Indices channels,
                                                        double max_scale) {
  Outputs to = map(x, shift, raw, tokens, channels, max_scale, true, false);
  return {to.y, to.logdet, to.y2};
}

std::tuple<Tensor, Tensor> affine_coupling_inverse(const Tensor& y, const Tensor& shift, const Tensor& raw,
                                                   Indices tokens, Indices channels, double max_scale) {
  Outputs to = map(y, shift, raw, tokens, channels, max_scale, false, true);
  return {to.y, to.logdet};
}

// dx, dshift (dx itself where all of x changes), draw
std::tuple<Tensor, Tensor, Tensor> affine_coupling_part_backward(const Tensor& grad,
                                                                 const Tensor& grad_logdet_, const Tensor& y2,
                                                                 const Tensor& raw, Indices tokens,
                                                                 Indices channels, double max_scale) {
  check_gradients(grad, grad_logdet_, y2, raw);
  Call call(grad, raw, tokens, channels);
  Tensor grad_logdet = torch::stable::contiguous(grad_logdet_);
  call.stream.check_device(y2);
  call.stream.check_device(grad_logdet);
  const ScalarType dtype = grad.scalar_type();
  Tensor dx = empty(grad, shape_of(grad), dtype), draw = empty(grad, shape_of(raw), dtype),
         dshift = call.whole() ? dx : empty(grad, shape_of(raw), dtype);
  const Side y(y2, call), r(raw, call);
  dispatch(dtype, [&]<class T>() {
    T *out = dx.mutable_data_ptr<T>(), *of_raw = draw.mutable_data_ptr<T>(),
      *of_shift = call.whole() ? nullptr : dshift.mutable_data_ptr<T>();
    call.with_layout<T>(y, r, {out, of_raw, of_shift}, [&]<bool kWide>(const Layout& at) {
      call.stream.launch(channels ? backward_channels<T, kWide> : backward_rows<T, kWide>,
                         cuda::blocks(call.B * at.tiles), kBlock, call.x.const_data_ptr<T>(),
                         grad_logdet.const_data_ptr<float>(), on_device<T>(y), on_device<T>(r), out, of_shift,
                         of_raw, at, float(max_scale));
    });
  });
  return {dx, dshift, draw};
}

std::tuple<Tensor, Tensor> affine_coupling_backward(const Tensor& grad, const Tensor& grad_logdet,
                                                    const Tensor& y, const Tensor& raw, double max_scale) {
  auto [dx, dshift, draw] =
      affine_coupling_part_backward(grad, grad_logdet, y, raw, std::nullopt, std::nullopt, max_scale);
  return {dx, draw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CUDA, m) {
  m.impl("affine_coupling.cuda", TORCH_BOX(&affine_coupling));
  m.impl("affine_coupling_inverse.cuda", TORCH_BOX(&affine_coupling_inverse));
  m.impl("affine_coupling_backward.cuda", TORCH_BOX(&affine_coupling_backward));
  m.impl("affine_coupling_part.cuda", TORCH_BOX(&affine_coupling_part));
  m.impl("affine_coupling_part_backward.cuda", TORCH_BOX(&affine_coupling_part_backward));
}

}  // namespace vlkern
