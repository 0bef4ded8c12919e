// RMS normalisation on NVIDIA GPUs. Memory-bound: a row lives in registers between its two passes, so every
// tensor crosses memory once, in 16-byte accesses. blockDim.x threads share a row and a block holds
// blockDim.y rows.
//
// Rows that are too long for registers or not aligned to 16 bytes take the "looped" kernels: any N >= 1, any
// address.
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "vlkern.h"

namespace vlkern {
namespace {

using cuda::load;
using cuda::row_sum;
using cuda::Stream;
using cuda::Vector;

constexpr int kBlock = 256;        // threads of a block, unless one row takes more
constexpr int kMaxForward = 1024;  // threads of a row at most
constexpr int kMaxBackward = 512;  // fewer, for 128 registers each
constexpr int kBackwardItems = 4;  // vectors of a row that a thread holds in the backward

// y = x * rstd * (offset + w), rstd = 1 / sqrt(mean(x^2) + eps)
template <class T, int kItems>
__global__ void __launch_bounds__(kMaxForward)
    forward_cached(const T* __restrict__ x, const float* __restrict__ w, T* __restrict__ y,
                   float* __restrict__ rstd, int64_t rows, int n, float eps, float offset) {
  constexpr int kWidth = Vector<T>::kSize;
  __shared__ float warps[kMaxForward / 32];
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  bool active = row < rows;
  Vector<T> held[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    int j = (threadIdx.x + i * blockDim.x) * kWidth;
    held[i] = active && j < n ? load(x + row * n + j) : Vector<T>{};
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i)
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum += float(held[i].at[k]) * float(held[i].at[k]);
  float r = 1.0f / sqrtf(row_sum(sum, warps) / float(n) + eps);
  if (active && threadIdx.x == 0) rstd[row] = r;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    int j = (threadIdx.x + i * blockDim.x) * kWidth;
    if (!active || j >= n) continue;
    float out[kWidth];
    cuda::load_floats(w + j, out);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out[k] = float(held[i].at[k]) * r * (offset + out[k]);
    cuda::store_as(y + row * n + j, out);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    forward_looped(const T* __restrict__ x, const float* __restrict__ w, T* __restrict__ y,
                   float* __restrict__ rstd, int64_t rows, int64_t n, float eps, float offset) {
  __shared__ float warps[kBlock / 32];
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  bool active = row < rows;
  int64_t end = active ? n : 0;
  float sum = 0;
  for (int64_t j = threadIdx.x; j < end; j += blockDim.x)
    sum += float(x[row * n + j]) * float(x[row * n + j]);
  float r = 1.0f / sqrtf(row_sum(sum, warps) / float(n) + eps);
  if (active && threadIdx.x == 0) rstd[row] = r;
  for (int64_t j = threadIdx.x; j < end; j += blockDim.x)
    y[row * n + j] = T(float(x[row * n + j]) * r * (offset + w[j]));
}

// With h = x * rstd and u = grad * (offset + w):  dx = rstd * (u - h * mean(u h)),  dw = sum over rows of
// grad * h. x meets rstd before anything else: where a row's squares leave float32 rstd is 0, and inf * 0
// would be NaN. A thread keeps its columns from row to row and their dw in registers; a block leaves one row
// of parts [gridDim.x, n].
template <class T>
__global__ void __launch_bounds__(kMaxBackward, 1)
    backward_cached(const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ w,
                    const float* __restrict__ rstd, T* __restrict__ dx, float* __restrict__ parts,
                    int64_t rows, int n, float offset) {
  constexpr int kWidth = Vector<T>::kSize, kItems = kBackwardItems;
  __shared__ float warps[2][kMaxBackward / 32];
  int parity = 0;
  float dw[kItems][kWidth] = {};
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < rows;
       first += int64_t(gridDim.x) * blockDim.y) {
    int64_t row = first + threadIdx.y;
    bool active = row < rows;
    float r = active ? rstd[row] : 0.0f, dot = 0;
    Vector<T> g[kItems], x_[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      int j = (threadIdx.x + i * blockDim.x) * kWidth;
      bool inside = active && j < n;
      g[i] = inside ? load(grad + row * n + j) : Vector<T>{};
      x_[i] = inside ? load(x + row * n + j) : Vector<T>{};
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      int j = (threadIdx.x + i * blockDim.x) * kWidth;
      if (j >= n) continue;
      float gain[kWidth];
      cuda::load_floats(w + j, gain);
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        dot += float(g[i].at[k]) * (offset + gain[k]) * (float(x_[i].at[k]) * r);
    }
    float mean = row_sum(dot, warps[parity]) / float(n);
    parity ^= 1;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      int j = (threadIdx.x + i * blockDim.x) * kWidth;
      if (!active || j >= n) continue;
      float out[kWidth];
      cuda::load_floats(w + j, out);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        float gk = float(g[i].at[k]), hk = float(x_[i].at[k]) * r;
        out[k] = r * (gk * (offset + out[k]) - hk * mean);
        dw[i][k] += gk * hk;
      }
      cuda::store_as(dx + row * n + j, out);
    }
  }
  // Several rows share a block only while a row takes at most half of it.
  alignas(16) __shared__ float columns[kBlock / 2 * kItems * kWidth];
  for (unsigned turn = 0; turn < blockDim.y; ++turn) {
    bool last = turn + 1 == blockDim.y;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      int j = (threadIdx.x + i * blockDim.x) * kWidth;
      if (threadIdx.y != turn || j >= n) continue;
      if (turn > 0) {
        float before[kWidth];
        cuda::load_floats(columns + j, before);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) dw[i][k] += before[k];
      }
      cuda::store_as(last ? parts + int64_t(blockIdx.x) * n + j : columns + j, dw[i]);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    backward_x_looped(const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ w,
                      const float* __restrict__ rstd, T* __restrict__ dx, int64_t rows, int64_t n,
                      float offset) {
  __shared__ float warps[kBlock / 32];
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  bool active = row < rows;
  int64_t end = active ? n : 0;
  float r = active ? rstd[row] : 0.0f, dot = 0;
  for (int64_t j = threadIdx.x; j < end; j += blockDim.x)
    dot += float(grad[row * n + j]) * (offset + w[j]) * (float(x[row * n + j]) * r);
  float mean = row_sum(dot, warps) / float(n);
  for (int64_t j = threadIdx.x; j < end; j += blockDim.x)
    dx[row * n + j] = T(r * (float(grad[row * n + j]) * (offset + w[j]) - float(x[row * n + j]) * r * mean));
}

// A thread sums one column over the rows of slab blockIdx.y.
template <class T>
__global__ void __launch_bounds__(kBlock)
    backward_w_looped(const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ rstd,
                      float* __restrict__ parts, int64_t rows, int64_t n, int64_t slab) {
  int64_t j = int64_t(blockIdx.x) * kBlock + threadIdx.x, first = blockIdx.y * slab;
  if (j >= n) return;
  float sum = 0;
  for (int64_t row = first; row < rows && row < first + slab; ++row)
    sum += float(grad[row * n + j]) * (float(x[row * n + j]) * rstd[row]);
  parts[blockIdx.y * n + j] = sum;
}

// out [n] = sum of parts [count, n] over its rows, always in the same order. A block takes 32 columns.
__global__ void __launch_bounds__(1024)
    sum_parts(const float* __restrict__ parts, float* __restrict__ out, int count, int64_t n) {
  __shared__ float sums[32][32];
  int64_t j = int64_t(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0;
  if (j < n)
    for (int row = threadIdx.y; row < count; row += 32) sum += parts[row * n + j];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || j >= n) return;
  for (int y = 1; y < 32; ++y) sum += sums[y][threadIdx.x];
  out[j] = sum;
}

// Whole warps for a row of n elements, `each` of them a thread; the rest of the block takes further rows.
dim3 block_shape(int64_t n, int64_t each) {
  auto threads = unsigned(round_up(ceil_div(n, each), 32));
  return dim3(threads, std::max(1u, kBlock / threads));
}

// The looped kernels give a short row one warp, a long one the block.
dim3 looped_shape(int64_t n) {
  return block_shape(std::min<int64_t>(n, kBlock * 8), n <= 1024 ? 32 : 8);
}

template <class T>
void forward(const Stream& stream, const T* x, const float* w, T* y, float* rstd, int64_t rows, int64_t n,
             float eps, float offset) {
  constexpr int kWidth = Vector<T>::kSize, kFew = 2, kMany = 4;
  bool whole = n % kWidth == 0 && cuda::aligned(x) && cuda::aligned(w) && cuda::aligned(y);
  bool cached = whole && n <= int64_t(kMaxForward) * kMany * kWidth, few = n <= 32 * kFew * kWidth;
  dim3 block = cached ? block_shape(n, (few ? kFew : kMany) * kWidth) : looped_shape(n);
  unsigned grid = cuda::blocks(ceil_div(rows, block.y));
  if (!cached)
    stream.launch(forward_looped<T>, grid, block, x, w, y, rstd, rows, n, eps, offset);
  else
    stream.launch(few ? forward_cached<T, kFew> : forward_cached<T, kMany>, grid, block, x, w, y, rstd, rows,
                  n, eps, offset);
}

template <class T>
void backward(const Stream& stream, const T* grad, const T* x, const float* w, const float* rstd, T* dx,
              float* dw, const Tensor& like, int64_t rows, int64_t n, float offset) {
  constexpr int kWidth = Vector<T>::kSize, kEach = kBackwardItems * kWidth;
  bool whole =
      n % kWidth == 0 && cuda::aligned(grad) && cuda::aligned(x) && cuda::aligned(w) && cuda::aligned(dx);
  int64_t count = 0;
  Tensor parts;
  if (whole && n <= int64_t(kMaxBackward) * kEach) {
    dim3 block = block_shape(n, kEach);
    count =
        std::min<int64_t>(2 * stream.multiprocessors(), ceil_div(rows, block.y));  // two blocks fit at a time
    parts = empty(like, {count, n}, ScalarType::Float);
    stream.launch(backward_cached<T>, unsigned(count), block, grad, x, w, rstd, dx,
                  parts.mutable_data_ptr<float>(), rows, n, offset);
  } else {
    dim3 block = looped_shape(n);
    stream.launch(backward_x_looped<T>, cuda::blocks(ceil_div(rows, block.y)), block, grad, x, w, rstd, dx,
                  rows, n, offset);
    int64_t slab = std::max<int64_t>(64, ceil_div(rows, 256));
    count = ceil_div(rows, slab);
    parts = empty(like, {count, n}, ScalarType::Float);
    stream.launch(backward_w_looped<T>, dim3(cuda::blocks(ceil_div(n, kBlock)), unsigned(count)), kBlock,
                  grad, x, rstd, parts.mutable_data_ptr<float>(), rows, n, slab);
  }
  stream.launch(sum_parts, cuda::blocks(ceil_div(n, 32)), dim3(32, 32), parts.const_data_ptr<float>(), dw,
                count, n);
}

int64_t channels(const Tensor& x, const Tensor& weight) {
  int64_t n = x.size(-1);
  VLKERN_CHECK(n > 0, "x must have at least one channel");
  VLKERN_CHECK(weight.scalar_type() == ScalarType::Float && weight.dim() == 1 && weight.size(0) == n,
               "weight must be float32 of shape [", n, "]");
  return n;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_, const Tensor& weight_, double eps, double offset) {
  int64_t n = channels(x_, weight_);
  Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  Stream stream(x);
  stream.check_device(weight);
  auto shape = shape_of(x);
  Tensor y = empty(x, shape, x.scalar_type());
  shape.pop_back();
  Tensor rstd = empty(x, shape, ScalarType::Float);
  dispatch(x.scalar_type(), [&]<class T>() {
    forward(stream, x.const_data_ptr<T>(), weight.const_data_ptr<float>(), y.mutable_data_ptr<T>(),
            rstd.mutable_data_ptr<float>(), x.numel() / n, n, float(eps), float(offset));
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                             const Tensor& rstd_, double offset) {
  int64_t n = channels(x_, weight_);
  Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  Tensor grad = torch::stable::contiguous(grad_), rstd = torch::stable::contiguous(rstd_);
  VLKERN_CHECK(grad.numel() == x.numel() && rstd.numel() == x.numel() / n, "grad and rstd must match x");
  Stream stream(x);
  for (const Tensor* t : {&weight, &grad, &rstd}) stream.check_device(*t);
  Tensor dx = empty(x, shape_of(x), x.scalar_type()), dw = empty(x, {n}, ScalarType::Float);
  dispatch(x.scalar_type(), [&]<class T>() {
    backward(stream, grad.const_data_ptr<T>(), x.const_data_ptr<T>(), weight.const_data_ptr<float>(),
             rstd.const_data_ptr<float>(), dx.mutable_data_ptr<T>(), dw.mutable_data_ptr<float>(), x,
             x.numel() / n, n, float(offset));
  });
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CUDA, m) {
  m.impl("rms_norm.cuda", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward.cuda", TORCH_BOX(&rms_norm_backward));
}

}  // namespace vlkern
