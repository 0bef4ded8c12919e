// What a call is given, checked, for every backend, and where its tensors have their parts.
#pragma once

#include "vlkern.h"

namespace vlkern::coupling {

using Indices = std::optional<Tensor>;

// x [B, N, K] and its part [B, n, k]. Without index vectors x of any shape but three counts as [B, N, 1].
struct Shape {
  int64_t B, N, K, n, k;

  Shape(const Tensor& x, const Tensor& raw, const Indices& tokens, const Indices& channels) {
    VLKERN_CHECK(x.dim() >= 2 && x.scalar_type() == raw.scalar_type(),
                 "raw_scale must have the dtype of x [B, ...]");
    const bool three = x.dim() == 3;
    VLKERN_CHECK(three || !(tokens || channels), "x must be [B, N, K] beside tokens or channels");
    for (const Indices& list : {tokens, channels})
      VLKERN_CHECK(!list || (list->dim() == 1 && list->scalar_type() == ScalarType::Int),
                   "tokens and channels must be int32 of one dimension");
    B = x.size(0);
    K = three ? x.size(2) : 1;
    N = three ? x.size(1) : B ? x.numel() / B : 0;
    n = tokens ? tokens->numel() : N;
    k = channels ? channels->numel() : K;
    VLKERN_CHECK(raw.numel() == B * n * k, "raw_scale must have the shape of the part that changes");
  }
};

inline void check_shift(const Tensor& shift, const Tensor& raw) {
  VLKERN_CHECK(shift.numel() == raw.numel() && shift.scalar_type() == raw.scalar_type(),
               "shift must have the shape and dtype of raw_scale");
}

inline void check_gradients(const Tensor& grad, const Tensor& grad_logdet, const Tensor& y,
                            const Tensor& raw) {
  VLKERN_CHECK(grad.scalar_type() == y.scalar_type() && y.scalar_type() == raw.scalar_type() &&
                   y.numel() == raw.numel(),
               "y must have the shape of raw_scale, and both the dtype of grad");
  VLKERN_CHECK(
      grad_logdet.scalar_type() == ScalarType::Float && grad.dim() > 0 && grad_logdet.numel() == grad.size(0),
      "grad_logdet must be float32 of shape [B]");
}

// A tensor of the part's shape, [B, n, k] with elements of a row side by side: contiguous, or half of one.
struct Side {
  Tensor owner;
  int64_t example, row;  // strides

  Side(const Tensor& t, const Shape& p) : owner(t) {
    bool in_place = t.dim() == 3 && (p.k == 1 || t.stride(2) == 1) && t.size(1) == p.n && t.size(2) == p.k;
    if (!in_place) owner = torch::stable::contiguous(t);
    example = in_place ? owner.stride(0) : p.n * p.k;
    row = in_place ? owner.stride(1) : p.k;
  }
};

}  // namespace vlkern::coupling
