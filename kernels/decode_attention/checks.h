// The native kernels' second line of defence: Python has checked already, with more words.
#pragma once

#include "vlkern.h"

namespace vlkern::decode {

inline void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& length,
                  const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  VLKERN_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have four dimensions");
  VLKERN_CHECK(q.size(0) == k.size(0) && q.size(3) == k.size(3) && k.size(1) > 0 && k.size(2) > 0 &&
                   q.size(1) > 0 && q.size(2) % k.size(2) == 0,
               "k must be [B, S, K, C], q [B, L, H, C] with H a multiple of K");
  VLKERN_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
               "v must be [B, S, K, Cv]");
  VLKERN_CHECK(k.size(3) % 8 == 0 && v.size(3) % 8 == 0, "head dims must be multiples of 8");
  VLKERN_CHECK(k.scalar_type() == v.scalar_type() &&
                   (k.scalar_type() == q.scalar_type() || k.scalar_type() == ScalarType::Char),
               "k and v must have the dtype of q or be int8");
  VLKERN_CHECK(length.dim() == 1 && length.size(0) == q.size(0) && length.scalar_type() == ScalarType::Int,
               "length must be int32 [B]");
  for (const std::optional<Tensor>* s : {&k_scale, &v_scale}) {
    VLKERN_CHECK(s->has_value() == (k.scalar_type() == ScalarType::Char),
                 "int8 has scales, other dtypes none");
    if (!s->has_value()) continue;
    VLKERN_CHECK((*s)->scalar_type() == ScalarType::Float && (*s)->dim() == 3 && (*s)->size(0) == k.size(0) &&
                     (*s)->size(1) == k.size(1) && (*s)->size(2) == k.size(2),
                 "scales must be float32 [B, S, K]");
  }
}

// A head's row must lie in one piece.
inline Tensor unit_columns(const Tensor& x) {
  return x.size(3) == 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

}  // namespace vlkern::decode
