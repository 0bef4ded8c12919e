// The sigmoid loss on NVIDIA GPUs: one sweep over square tiles of the logits.
//
//   S = X_i Y_j^T (cuBLAS, fp32)  ->  loss and G = dL/dS (one pass over S)  ->  dX_i += G Y_j,  dY_j += G^T
//   X_i
//
// Square tiles keep the fp32 accumulators dX and dY out of the way: each is read and written once per row of
// tiles.
#include "call.h"
#include "cuda/blas.cuh"
#include "cuda/launch.cuh"
#include "cuda/pairs.cuh"
#include "cuda/vector.cuh"
#include "vlkern.h"

namespace vlkern {
namespace {

using cuda::Blas;
using cuda::kPairs;
using cuda::PairSums;
using cuda::Stream;
using sigmoid_loss::Arguments;
using sigmoid_loss::Outputs;
using torch::headeronly::Half;

constexpr int64_t kSide = 5760;          // of a tile: 5760^2 logits are 127 MiB
constexpr int kThreads = 256;            // of a block; a thread keeps its kPairs columns from row to row
constexpr int kRows = 16;                // of a block
constexpr int kNoDiagonal = -(1 << 30);  // no tile is that wide

// What G is multiplied by while it is stored: |g| <= 1 is often far below fp16's smallest normal number,
// 2^-14.
template <class T>
constexpr float kUnit = std::is_same_v<T, Half> ? 0x1p15f : 1.0f;

struct Tile {
  int rows, columns;
  int64_t stride;            // elements between rows of S and G, a multiple of kPairs
  int diagonal;              // z = +1 where column == row + diagonal
  const bool* row_valid;     // [rows] or null: all
  const bool* column_valid;  // [columns] or null: all
};

// Bit k says whether column j + k counts.
__device__ unsigned kept_columns(const Tile& tile, int j) {
  unsigned keep = 0;
#pragma unroll
  for (int k = 0; k < kPairs; ++k)
    if (j + k < tile.columns && (!tile.column_valid || tile.column_valid[j + k])) keep |= 1u << k;
  return keep;
}

// Reads the dot products S once and writes G once; in fp32 they share their memory. Rows are padded to whole
// vectors, whose surplus elements hold anything and are written but never read. Adds to this block's slot of
// sums [3, slots].
template <class T, bool kGrad>
__global__ void __launch_bounds__(kThreads) epilogue(const float* s, T* g, Tile tile, const float* scale_,
                                                     const float* bias_, double* sums, int slots) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float parts[3][kWarps];
  PairSums total;
  int j = (blockIdx.x * kThreads + threadIdx.x) * kPairs;
  if (j < tile.columns) {
    float scale = *scale_, bias = *bias_;
    unsigned columns = kept_columns(tile, j);
    int first = blockIdx.y * kRows, end = std::min(first + kRows, tile.rows);
    for (int i = first; i < end; ++i) {
      unsigned keep = !tile.row_valid || tile.row_valid[i] ? columns : 0;
      unsigned diagonal = unsigned(i + tile.diagonal - j), positive = diagonal < kPairs ? 1u << diagonal : 0;
      float pairs[kPairs];
      cuda::load_floats(s + i * tile.stride + j, pairs);
      if (keep == (1u << kPairs) - 1 && positive == 0)
        cuda::sigmoid_pairs<kGrad, false>(pairs, scale, bias, keep, positive, total);
      else
        cuda::sigmoid_pairs<kGrad, true>(pairs, scale, bias, keep, positive, total);
      if constexpr (kGrad) {
        if constexpr (kUnit<T> != 1.0f)
#pragma unroll
          for (int k = 0; k < kPairs; ++k) pairs[k] *= kUnit<T>;
        cuda::store_as(g + i * tile.stride + j, pairs);
      }
    }
  }
  float mine[3] = {cuda::warp_sum(total.loss), cuda::warp_sum(total.scale), cuda::warp_sum(total.bias)};
  if (threadIdx.x % 32 == 0)
    for (int q = 0; q < 3; ++q) parts[q][threadIdx.x / 32] = mine[q];
  __syncthreads();
  if (threadIdx.x >= 3) return;
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[threadIdx.x][warp];
  sums[threadIdx.x * slots + blockIdx.y * gridDim.x + blockIdx.x] += sum;
}

// out[q] = weight * sum of sums [3, slots] over the slots; block q takes quantity q.
__global__ void __launch_bounds__(kThreads)
    add_slots(const double* __restrict__ sums, int slots, const float* __restrict__ weight,
              float* __restrict__ loss, float* __restrict__ d_scale, float* __restrict__ d_bias) {
  __shared__ double warps[kThreads / 32];
  double sum = 0;
  for (int slot = threadIdx.x; slot < slots; slot += kThreads) sum += sums[blockIdx.x * slots + slot];
  sum = cuda::warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) sum += warps[warp];
  float* out = blockIdx.x == 0 ? loss : blockIdx.x == 1 ? d_scale : d_bias;
  *out = float(sum * *weight);
}

// out = in * scale * weight / unit; in and out may be the same memory.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scaled(const float* in, T* out, int64_t count, const float* scale, const float* weight, float unit) {
  float factor = *scale * *weight / unit;
  int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i + 8 <= count) {
    float v[8];
    cuda::load_floats(in + i, v);
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] *= factor;
    cuda::store_as(out + i, v);
  } else {
    for (; i < count; ++i) out[i] = T(in[i] * factor);
  }
}

const bool* mask(const std::optional<Tensor>& valid, int64_t first) {
  return valid ? valid->const_data_ptr<bool>() + first : nullptr;
}

// Tiles of almost one size instead of full ones and a rest.
int64_t tile_side(int64_t size) {
  return round_up(ceil_div(size, ceil_div(size, kSide)), 128);
}

template <class T, bool kGrad>
void sweep(const Stream& stream, const Arguments& a, Outputs& out) {
  using G =
      std::conditional_t<std::is_same_v<T, torch::headeronly::BFloat16>, T, float>;  // dtype of the gradients
  int64_t m = a.image.size(0), n = a.text.size(0), d = a.image.size(1);
  int64_t side_m = std::min(tile_side(m), m), side_n = std::min(tile_side(n), n),
          stride = round_up(side_n, kPairs);
  auto grid = [](int64_t rows, int64_t columns) {
    return dim3(ceil_div(columns, kThreads * kPairs), ceil_div(rows, kRows));
  };
  dim3 largest = grid(side_m, side_n);
  int64_t slots = largest.x * largest.y;
  Tensor sums = zeros(a.image, {3, slots}, ScalarType::Double);
  Tensor s = empty(a.image, {side_m, stride}, ScalarType::Float), g = s, dx = out.d_image, dy = out.d_text;
  if (kGrad && !std::is_same_v<T, float>) g = empty(a.image, {side_m, stride}, a.image.scalar_type());
  if (kGrad && !std::is_same_v<G, float>) {
    dx = empty(a.image, {m, d}, ScalarType::Float);
    dy = empty(a.image, {n, d}, ScalarType::Float);
  }
  const float *scale = a.scale.const_data_ptr<float>(), *bias = a.bias.const_data_ptr<float>();
  const float* weight = a.weight.const_data_ptr<float>();
  float* s_ = s.mutable_data_ptr<float>();
  Blas blas;
  for (int64_t i = 0; i < m; i += side_m)
    for (int64_t j = 0; j < n; j += side_n) {
      int64_t rows = std::min(side_m, m - i), columns = std::min(side_n, n - j);
      const T *x_i = a.image.const_data_ptr<T>() + i * d, *y_j = a.text.const_data_ptr<T>() + j * d;
      blas.matmul<T>(rows, columns, d, {x_i, d}, {y_j, d, true}, 0.0f, s_, stride);
      int diagonal = a.diagonal ? int(std::clamp<int64_t>(i - j, kNoDiagonal, -kNoDiagonal)) : kNoDiagonal;
      Tile tile{int(rows), int(columns), stride, diagonal, mask(a.image_valid, i), mask(a.text_valid, j)};
      T* g_ = kGrad ? g.mutable_data_ptr<T>() : nullptr;
      stream.launch(epilogue<T, kGrad>, grid(rows, columns), kThreads, s_, g_, tile, scale, bias,
                    sums.mutable_data_ptr<double>(), slots);
      if constexpr (kGrad) {
        blas.matmul<T>(rows, d, columns, {g_, stride}, {y_j, d}, j > 0, dx.mutable_data_ptr<float>() + i * d,
                       d);
        blas.matmul<T>(columns, d, rows, {g_, stride, true}, {x_i, d}, i > 0,
                       dy.mutable_data_ptr<float>() + j * d, d);
      }
    }
  stream.launch(add_slots, kGrad ? 3 : 1, kThreads, sums.const_data_ptr<double>(), slots, weight,
                out.loss.mutable_data_ptr<float>(), out.d_scale.mutable_data_ptr<float>(),
                out.d_bias.mutable_data_ptr<float>());
  if constexpr (kGrad) {
    auto finish = [&](const Tensor& from, Tensor& to) {
      stream.launch(scaled<G>, cuda::blocks(ceil_div(to.numel(), kThreads * 8)), kThreads,
                    from.const_data_ptr<float>(), to.mutable_data_ptr<G>(), to.numel(), scale, weight,
                    kUnit<T>);
    };
    finish(dx, out.d_image);
    finish(dy, out.d_text);
  }
}

Outputs run(const Arguments& a, bool grad) {
  const Tensor &image = a.image, &text = a.text;
  VLKERN_CHECK(image.numel() > 0 && text.numel() > 0, "image and text must not be empty");
  Stream stream(image);
  for (const Tensor* t : {&text, &a.scale, &a.bias, &a.weight}) stream.check_device(*t);
  for (const auto* valid : {&a.image_valid, &a.text_valid})
    if (*valid) stream.check_device(**valid);
  ScalarType dtype = image.scalar_type(), grad_dtype = sigmoid_loss::gradient_type(dtype);
  auto scalar = [&] { return empty(image, {}, ScalarType::Float); };
  auto gradient = [&](const Tensor& of) {
    return empty(image, {grad ? of.size(0) : 0, of.size(1)}, grad_dtype);
  };
  Outputs out{scalar(), gradient(image), gradient(text), scalar(), scalar()};
  dispatch(dtype,
           [&]<class T>() { grad ? sweep<T, true>(stream, a, out) : sweep<T, false>(stream, a, out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CUDA, m) {
  m.impl("sigmoid_loss.cuda", TORCH_BOX(&sigmoid_loss::loss<run>));
  m.impl("sigmoid_loss_grad.cuda", TORCH_BOX(&sigmoid_loss::loss_and_gradients<run>));
}

}  // namespace vlkern
