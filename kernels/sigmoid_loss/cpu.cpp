// The sigmoid loss on the CPU: one sweep over chunks of image rows.
//
//   S = X_c Y^T   ->   loss and G = dL/dS in place   ->   dY += G^T X_c,  dX_c = G Y
//
// bf16 runs on AMX tiles where the chip has them (cpu_amx.h). Everything else runs in fp32 through sgemm,
// below.
#include "cpu.h"

#include "cpu_amx.h"
#include "sgemm.h"
#include "vlkern.h"

namespace vlkern {
namespace {

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

float scalar(const Tensor& t) {
  VLKERN_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == 1,
               "scale, bias and weight must be float32 scalars");
  return *t.const_data_ptr<float>();
}

struct Outputs {
  Tensor loss, d_image, d_text, d_scale, d_bias;
};

Outputs run(const Tensor& image_, const Tensor& text_, const Tensor& scale, const Tensor& bias,
            const Tensor& weight, const std::optional<Tensor>& image_valid,
            const std::optional<Tensor>& text_valid, bool diagonal, bool grad) {
  VLKERN_CHECK(image_.dim() == 2 && text_.dim() == 2 && image_.size(1) == text_.size(1),
               "image and text must be [., D]");
  VLKERN_CHECK(image_.scalar_type() == text_.scalar_type(), "image and text must have one dtype");
  Tensor image = torch::stable::contiguous(image_), text = torch::stable::contiguous(text_);
  std::optional<Tensor> masks[2];
  const std::optional<Tensor>* given[2] = {&image_valid, &text_valid};
  for (int s = 0; s < 2; ++s)
    if (*given[s]) {
      VLKERN_CHECK((*given[s])->numel() == (s ? text : image).size(0), "a mask must have one entry per row");
      masks[s] = torch::stable::contiguous(**given[s]);
    }
  Problem p{image.size(0),
            text.size(0),
            image.size(1),
            scalar(scale),
            scalar(bias),
            scalar(weight),
            masks[0] ? masks[0]->const_data_ptr<bool>() : nullptr,
            masks[1] ? masks[1]->const_data_ptr<bool>() : nullptr,
            diagonal,
            grad};
  ScalarType dtype = image.scalar_type(), grad_dtype = dtype == ScalarType::Half ? ScalarType::Float : dtype;
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

Tensor loss(const Tensor& image, const Tensor& text, const Tensor& scale, const Tensor& bias,
            const Tensor& weight, const std::optional<Tensor>& image_valid,
            const std::optional<Tensor>& text_valid, bool diagonal) {
  return run(image, text, scale, bias, weight, image_valid, text_valid, diagonal, false).loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_and_gradients(
    const Tensor& image, const Tensor& text, const Tensor& scale, const Tensor& bias, const Tensor& weight,
    const std::optional<Tensor>& image_valid, const std::optional<Tensor>& text_valid, bool diagonal) {
  Outputs o = run(image, text, scale, bias, weight, image_valid, text_valid, diagonal, true);
  return {o.loss, o.d_image, o.d_text, o.d_scale, o.d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("sigmoid_loss.cpu", TORCH_BOX(&loss));
  m.impl("sigmoid_loss_grad.cpu", TORCH_BOX(&loss_and_gradients));
}

}  // namespace vlkern
