// Finite scalar quantization on NVIDIA GPUs. Memory-bound: a thread takes as many rows as fill whole 16-byte
// vectors, keeps them in registers, and reads the thresholds, the same ones as all its neighbours, from L1.
//
// Fewer or more channels than usual, rows that are left over, and memory that is not aligned to 16 bytes take
// the "looped" kernels, one thread a row.
#include <cmath>
#include <initializer_list>
#include <numeric>

#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace vlkern {
namespace {

using cuda::load;
using cuda::Stream;
using cuda::Vector;

constexpr int kBlock = 256;                           // threads
constexpr int kLeastUnrolled = 3, kMostUnrolled = 6;  // channels: what tokenizers have
constexpr int64_t kMostCounted = 63;  // more thresholds than this are searched, fewer are counted

struct Levels {
  int at[fsq::kMostChannels];
};

// Rows that a thread takes: the fewest whose elements fill whole vectors.
template <class T, int D>
constexpr int kRows = 16 / std::gcd(16, D* int(sizeof(T)));

__device__ float code_of(int digit, int levels, bool symmetric) {
  int divisor = symmetric ? levels - 1 : levels / 2;
  return float((symmetric ? 2 * digit : digit) - divisor) / float(divisor);
}

// How many of `count` thresholds each x reaches.
template <int R>
__device__ void digits_of(const float (&x)[R], const float* __restrict__ t, int count, int (&digit)[R]) {
  if (count <= kMostCounted) {
    for (int k = 0; k < count; ++k) {
      float threshold = t[k];
#pragma unroll
      for (int r = 0; r < R; ++r) digit[r] += x[r] >= threshold;
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    int low = 0, high = count;
    while (low < high) {
      int middle = (low + high) / 2;
      if (x[r] >= t[middle])
        low = middle + 1;
      else
        high = middle;
    }
    digit[r] = low;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kBlock)
    forward_vectors(const T* __restrict__ z, const float* __restrict__ t, Levels levels, bool symmetric,
                    T* __restrict__ codes, int64_t* __restrict__ index, int64_t groups) {
  constexpr int R = kRows<T, D>, kAll = R * D, kWidth = Vector<T>::kSize;
  int64_t group = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (group >= groups) return;
  Vector<T> held[kAll / kWidth];
#pragma unroll
  for (int v = 0; v < kAll / kWidth; ++v) held[v] = load(z + group * kAll + v * kWidth);
  float out[kAll];
  int64_t sum[R] = {}, stride = 1;
  bool lost[R] = {};
#pragma unroll
  for (int c = 0; c < D; ++c) {
    float x[R];
    int digit[R] = {}, n = levels.at[c];
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] = float(held[(r * D + c) / kWidth].at[(r * D + c) % kWidth]);
    digits_of(x, t, n - 1, digit);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      bool nan = x[r] != x[r];
      out[r * D + c] = nan ? x[r] : code_of(digit[r], n, symmetric);
      sum[r] += stride * digit[r];
      lost[r] |= nan;
    }
    t += n - 1;
    stride *= n;
  }
  cuda::store_as(codes + group * kAll, out);
#pragma unroll
  for (int r = 0; r < R; ++r) sum[r] = lost[r] ? -1 : sum[r];
  if constexpr (R % 2 == 0) {
#pragma unroll
    for (int r = 0; r < R; r += 2) cuda::store(index + group * R + r, Vector<int64_t>{sum[r], sum[r + 1]});
  } else {
    index[group] = sum[0];
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    forward_looped(const T* __restrict__ z, const float* __restrict__ t, Levels levels, int d, bool symmetric,
                   T* __restrict__ codes, int64_t* __restrict__ index, int64_t rows) {
  int64_t row = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= rows) return;
  int64_t sum = 0, stride = 1;
  bool lost = false;
  for (int c = 0; c < d; ++c) {
    float x[1] = {float(z[row * d + c])};
    int digit[1] = {}, n = levels.at[c];
    digits_of(x, t, n - 1, digit);
    bool nan = x[0] != x[0];
    codes[row * d + c] = T(nan ? x[0] : code_of(digit[0], n, symmetric));
    sum += stride * digit[0];
    lost |= nan;
    t += n - 1;
    stride *= n;
  }
  index[row] = lost ? -1 : sum;
}

// grad gain (1 - tanh^2(z + shift)); 1 - tanh^2 would cancel
__device__ float slope(float grad, float z, float shift, float gain) {
  float e = expf(-2.0f * fabsf(z + shift)), root = 1.0f + e;
  return grad * (4.0f * gain * e / (root * root));
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    backward_vectors(const T* __restrict__ grad, const T* __restrict__ z, const float* __restrict__ slopes,
                     int d, T* __restrict__ dz, int64_t vectors) {
  constexpr int kWidth = Vector<T>::kSize;
  int64_t v = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (v >= vectors) return;
  Vector<T> g = load(grad + v * kWidth), x = load(z + v * kWidth);
  float out[kWidth];
  int c = int(v * kWidth % d);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    out[k] = slope(float(g.at[k]), float(x.at[k]), slopes[c], slopes[d + c]);
    c = c + 1 == d ? 0 : c + 1;
  }
  cuda::store_as(dz + v * kWidth, out);
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    backward_looped(const T* __restrict__ grad, const T* __restrict__ z, const float* __restrict__ slopes,
                    int d, T* __restrict__ dz, int64_t begin, int64_t end) {
  int64_t i = begin + int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= end) return;
  int c = int(i % d);
  dz[i] = T(slope(float(grad[i]), float(z[i]), slopes[c], slopes[d + c]));
}

// One thread a row. A negative index is too large as well, once its sign counts as a digit.
template <class T>
__global__ void __launch_bounds__(kBlock)
    decode(const T* __restrict__ table, const int64_t* __restrict__ index, Levels levels, int d,
           T* __restrict__ out, int64_t rows) {
  int64_t row = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= rows) return;
  uint64_t rest = uint64_t(index[row]);
  for (int c = 0; c < d; ++c) {
    auto n = unsigned(levels.at[c]);
    uint64_t quotient = rest >> 32 ? rest / n : unsigned(rest) / n;
    out[row * d + c] = table[rest - quotient * n];
    table += n;
    rest = quotient;
  }
  if (rest == 0) return;
  for (int c = 0; c < d; ++c) out[row * d + c] = T(NAN);
}

// Calls f.operator()<D>() for kLeastUnrolled to kMostUnrolled channels.
template <int D = kLeastUnrolled, class F>
void with_channels(int64_t d, F&& f) {
  if (d == D) return f.template operator()<D>();
  if constexpr (D < kMostUnrolled) with_channels<D + 1>(d, f);
}

bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return cuda::aligned(p); });
}

unsigned grid_of(int64_t count) {
  return cuda::blocks(ceil_div(count, kBlock));
}

Levels narrow(const std::vector<int64_t>& levels) {
  Levels out{};
  std::copy(levels.begin(), levels.end(), out.at);
  return out;
}

std::tuple<Tensor, Tensor> fsq_quantize(const Tensor& z_, const Tensor& thresholds_,
                                        std::vector<int64_t> levels, bool symmetric) {
  fsq::check_quantize(z_, thresholds_, levels);
  const Levels shape = narrow(levels);
  const int64_t d = z_.size(-1);
  Tensor z = torch::stable::contiguous(z_), thresholds = torch::stable::contiguous(thresholds_);
  Stream stream(z);
  stream.check_device(thresholds);
  auto sizes = shape_of(z);
  Tensor codes = empty(z, sizes, z.scalar_type());
  sizes.pop_back();
  Tensor index = empty(z, sizes, ScalarType::Long);
  dispatch(z.scalar_type(), [&]<class T>() {
    const T* in = z.const_data_ptr<T>();
    const float* t = thresholds.const_data_ptr<float>();
    T* out = codes.mutable_data_ptr<T>();
    auto* to = index.mutable_data_ptr<int64_t>();
    const int64_t rows = index.numel();
    int64_t done = 0;
    with_channels(d, [&]<int D>() {
      const int64_t groups = aligned({in, out, to}) ? rows / kRows<T, D> : 0;
      stream.launch(forward_vectors<T, D>, grid_of(groups), kBlock, in, t, shape, symmetric, out, to, groups);
      done = groups * kRows<T, D>;
    });
    stream.launch(forward_looped<T>, grid_of(rows - done), kBlock, in + done * d, t, shape, int(d), symmetric,
                  out + done * d, to + done, rows - done);
  });
  return {codes, index};
}

Tensor fsq_quantize_backward(const Tensor& grad_, const Tensor& z_, const Tensor& slopes_) {
  fsq::check_backward(grad_, z_, slopes_);
  const int64_t d = z_.size(-1);
  Tensor grad = torch::stable::contiguous(grad_), z = torch::stable::contiguous(z_),
         slopes = torch::stable::contiguous(slopes_);
  Stream stream(z);
  for (const Tensor* t : {&grad, &slopes}) stream.check_device(*t);
  Tensor dz = empty(z, shape_of(z), z.scalar_type());
  dispatch(z.scalar_type(), [&]<class T>() {
    const T *g = grad.const_data_ptr<T>(), *in = z.const_data_ptr<T>();
    const float* s = slopes.const_data_ptr<float>();
    T* out = dz.mutable_data_ptr<T>();
    const int64_t count = z.numel();
    const int64_t vectors = aligned({g, in, out}) ? count / Vector<T>::kSize : 0,
                  done = vectors * Vector<T>::kSize;
    stream.launch(backward_vectors<T>, grid_of(vectors), kBlock, g, in, s, int(d), out, vectors);
    stream.launch(backward_looped<T>, grid_of(count - done), kBlock, g, in, s, int(d), out, done, count);
  });
  return dz;
}

Tensor fsq_dequantize(const Tensor& codes_, const Tensor& indices_, std::vector<int64_t> levels) {
  fsq::check_dequantize(codes_, indices_, levels);
  const Levels shape = narrow(levels);
  const auto d = int64_t(levels.size());
  Tensor codes = torch::stable::contiguous(codes_), indices = torch::stable::contiguous(indices_);
  Stream stream(indices);
  stream.check_device(codes);
  auto sizes = shape_of(indices);
  sizes.push_back(d);
  Tensor out = empty(codes, sizes, codes.scalar_type());
  dispatch(codes.scalar_type(), [&]<class T>() {
    stream.launch(decode<T>, grid_of(indices.numel()), kBlock, codes.const_data_ptr<T>(),
                  indices.const_data_ptr<int64_t>(), shape, int(d), out.mutable_data_ptr<T>(),
                  indices.numel());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CUDA, m) {
  m.impl("fsq_quantize.cuda", TORCH_BOX(&fsq_quantize));
  m.impl("fsq_quantize_backward.cuda", TORCH_BOX(&fsq_quantize_backward));
  m.impl("fsq_dequantize.cuda", TORCH_BOX(&fsq_dequantize));
}

}  // namespace vlkern
