// The tensors of one call as the kernels see them.
#pragma once

#include "cpu_plan.h"
#include "vlkern.h"

namespace vlkern::attention {

// [tokens, heads, width] with unit stride in the last dimension.
template <class T>
struct Heads {
  T* data;
  int64_t token, head, width;
  T* at(int64_t i, int64_t h) const { return data + i * token + h * head; }
};

template <class T>
struct Inputs {
  Heads<const T> q, k, v;
  const Bounds& bounds;
  int64_t query_heads, group;  // query heads, and how many of them share a key head
  float scale, cap;            // cap 0: no softcap
};

template <class T>
struct Forward : Inputs<T> {
  Heads<T> out;
  float* lse;  // [Nq, Hq]
};

template <class T>
struct Backward : Inputs<T> {
  Heads<const T> grad;
  const float *lse, *delta;  // [Nq, Hq]
  Heads<T> dq;
};

}  // namespace vlkern::attention
