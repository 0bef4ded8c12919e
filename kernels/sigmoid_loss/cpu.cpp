// The sigmoid loss on the CPU: one sweep over chunks of image rows.
//
//   S = X_c Y^T   ->   loss and G = dL/dS in place   ->   dY += G^T X_c,  dX_c = G Y
//
// bf16 runs on AMX tiles where the chip has them (cpu_amx.h). Everything else runs in fp32 through sgemm,
// below.
#include "cpu.h"

#include "call.h"
#include "cpu_amx.h"
#include "sgemm.h"
#include "vlkern.h"

namespace vlkern {
namespace {

using sigmoid_loss::Arguments;
using sigmoid_loss::Outputs;
using sigmoid_loss::Problem;
using sigmoid_loss::Sums;

// target_clones needs plain functions.
VLKERN_SIMD Sums negative_pairs(float* pairs, int64_t n, float scale, float bias) {
  return sigmoid_loss::all_pairs<false>(pairs, nullptr, nullptr, n, scale, bias);
}
VLKERN_SIMD Sums labelled_pairs(float* pairs, const float* sign, const float* keep, int64_t n, float scale,
                                float bias) {
  return sigmoid_loss::all_pairs<true>(pairs, sign, keep, n, scale, bias);
}

constexpr int64_t kRows = 512;  // rows of a chunk; its G is [512, n] fp32
constexpr int64_t kColumns =
    512;  // columns of a task, at most: 1 MiB of G stays in L2 between the two matmuls

Sums sweep_fp32(const Problem& p, const float* x, const float* y, Tensor& chunk, float* dx, float* dy) {
  float factor = p.scale * p.weight;
  int64_t width = std::clamp<int64_t>(round_up(ceil_div(p.n, 16), 32), 32, kColumns),
          tasks = ceil_div(p.n, width);
  std::vector<Sums> parts(tasks);
  float* g = chunk.mutable_data_ptr<float>();
  for (int64_t first = 0; first < p.m; first += kRows) {
    int64_t rows = std::min(kRows, p.m - first);
    const float* x_c = x + first * p.d;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sign(width), keep(width);
      for (int64_t t = begin; t < end; ++t) {
        int64_t j = t * width, columns = std::min(width, p.n - j);
        float* g_j = g + j;
        sgemm(rows, columns, p.d, 1.0f, {x_c, p.d}, {y + j * p.d, p.d, true}, 0.0f, g_j, p.n);
        for (int64_t r = 0; r < rows; ++r)
          parts[t] += p.labels(first + r, 1, j, columns, sign.data(), keep.data())
                          ? labelled_pairs(g_j + r * p.n, sign.data(), keep.data(), columns, p.scale, p.bias)
                          : negative_pairs(g_j + r * p.n, columns, p.scale, p.bias);
        if (p.grad)
          sgemm(columns, p.d, rows, factor, {g_j, p.n, true}, {x_c, p.d}, first == 0 ? 0.0f : 1.0f,
                dy + j * p.d, p.d);
      }
    });
    if (!p.grad) continue;
    constexpr int64_t kBlock = 128;  // rows of dX a task computes
    torch::stable::parallel_for(0, ceil_div(rows, kBlock), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin * kBlock; b < std::min(end * kBlock, rows); b += kBlock)
        sgemm(std::min(kBlock, rows - b), p.d, p.n, factor, {g + b * p.n, p.n}, {y, p.d}, 0.0f,
              dx + (first + b) * p.d, p.d);
    });
  }
  Sums total;
  for (const Sums& part : parts) total += part;
  return total;
}

Outputs run(const Arguments& a, bool grad) {
  const Tensor &image = a.image, &text = a.text;
  auto scalar = [](const Tensor& t) { return *t.const_data_ptr<float>(); };
  auto mask = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<bool>() : nullptr; };
  Problem p{image.size(0),    text.size(0),        image.size(1),      scalar(a.scale), scalar(a.bias),
            scalar(a.weight), mask(a.image_valid), mask(a.text_valid), a.diagonal,      grad};
  ScalarType dtype = image.scalar_type(), grad_dtype = sigmoid_loss::gradient_type(dtype);
  auto gradient = [&](int64_t rows, ScalarType type) { return empty(image, {grad ? rows : 0, p.d}, type); };

  Sums sums;
  Outputs out;
#if defined(VLKERN_AMX) && !defined(VLKERN_PORTABLE)
  bool on_tiles = dtype == ScalarType::BFloat16 && amx::available();
  if (on_tiles) {
    out.d_image = gradient(p.m, dtype), out.d_text = gradient(p.n, dtype);
    const sigmoid_loss::BlockLoss loss_of_block{p};
    amx::Sweep sweep(loss_of_block, {image.const_data_ptr<bf16>(), p.m, p.d, p.d},
                     {text.const_data_ptr<bf16>(), p.n, p.d, p.d}, {grad, grad, p.scale * p.weight});
    sums = sweep.run(out.d_image.mutable_data_ptr<bf16>(), out.d_text.mutable_data_ptr<bf16>());
  }
#else
  constexpr bool on_tiles = false;
#endif
  if (!on_tiles) {
    Tensor x = torch::stable::to(image, ScalarType::Float), y = torch::stable::to(text, ScalarType::Float);
    Tensor dx = gradient(p.m, ScalarType::Float), dy = gradient(p.n, ScalarType::Float);
    Tensor chunk = empty(image, {std::min(kRows, p.m), p.n}, ScalarType::Float);
    sums = sweep_fp32(p, x.const_data_ptr<float>(), y.const_data_ptr<float>(), chunk,
                      dx.mutable_data_ptr<float>(), dy.mutable_data_ptr<float>());
    out.d_image = torch::stable::to(dx, grad_dtype), out.d_text = torch::stable::to(dy, grad_dtype);
  }
  auto scalar_tensor = [&](double value) {
    Tensor t = empty(image, {}, ScalarType::Float);
    *t.mutable_data_ptr<float>() = float(value);
    return t;
  };
  out.loss = scalar_tensor(p.weight * sums.loss);
  out.d_scale = scalar_tensor(p.weight * sums.scale);
  out.d_bias = scalar_tensor(p.weight * sums.bias);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("sigmoid_loss.cpu", TORCH_BOX(&sigmoid_loss::loss<run>));
  m.impl("sigmoid_loss_grad.cpu", TORCH_BOX(&sigmoid_loss::loss_and_gradients<run>));
}

}  // namespace vlkern
