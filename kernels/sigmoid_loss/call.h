// The op as PyTorch calls it, for every native backend: its checks, and its two forms.
#pragma once

#include "vlkern.h"

namespace vlkern::sigmoid_loss {

struct Arguments {
  Tensor image, text;                             // [M, D], [N, D]; contiguous
  Tensor scale, bias, weight;                     // []
  std::optional<Tensor> image_valid, text_valid;  // [M], [N] bool; contiguous
  bool diagonal;                                  // pair (i, i) belongs together
};

// Gradients have no rows where they are not asked for.
struct Outputs {
  Tensor loss, d_image, d_text, d_scale, d_bias;
};

inline Arguments checked(const Tensor& image, const Tensor& text, const Tensor& scale, const Tensor& bias,
                         const Tensor& weight, const std::optional<Tensor>& image_valid,
                         const std::optional<Tensor>& text_valid, bool diagonal) {
  VLKERN_CHECK(image.dim() == 2 && text.dim() == 2 && image.size(1) == text.size(1),
               "image and text must be [., D]");
  VLKERN_CHECK(image.scalar_type() == text.scalar_type(), "image and text must have one dtype");
  for (const Tensor* t : {&scale, &bias, &weight})
    VLKERN_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == 1,
                 "scale, bias and weight must be float32 scalars");
  auto mask = [](const std::optional<Tensor>& valid, const Tensor& of) -> std::optional<Tensor> {
    if (!valid) return std::nullopt;
    VLKERN_CHECK(valid->scalar_type() == ScalarType::Bool && valid->numel() == of.size(0),
                 "a mask must be bool with one entry per row");
    return torch::stable::contiguous(*valid);
  };
  return {torch::stable::contiguous(image), torch::stable::contiguous(text), scale,   bias, weight,
          mask(image_valid, image),         mask(text_valid, text),          diagonal};
}

// The dtype in which a backend gives gradients: fp16 cannot hold small ones.
inline ScalarType gradient_type(ScalarType dtype) {
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

// kRun(arguments, with gradients?) -> Outputs
template <auto kRun>
Tensor loss(const Tensor& image, const Tensor& text, const Tensor& scale, const Tensor& bias,
            const Tensor& weight, const std::optional<Tensor>& image_valid,
            const std::optional<Tensor>& text_valid, bool diagonal) {
  return kRun(checked(image, text, scale, bias, weight, image_valid, text_valid, diagonal), false).loss;
}

template <auto kRun>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_and_gradients(
    const Tensor& image, const Tensor& text, const Tensor& scale, const Tensor& bias, const Tensor& weight,
    const std::optional<Tensor>& image_valid, const std::optional<Tensor>& text_valid, bool diagonal) {
  Outputs o = kRun(checked(image, text, scale, bias, weight, image_valid, text_valid, diagonal), true);
  return {o.loss, o.d_image, o.d_text, o.d_scale, o.d_bias};
}

}  // namespace vlkern::sigmoid_loss
