// Interval attention on the CPU: checks, cuts, threads. The arithmetic is in cpu_kernel.inc, compiled for
// each instruction set, and for bf16 on AMX tiles in cpu_amx.h.
#include <bit>
#include <cmath>

#include "amx.h"
#include "arena.h"
#include "cpu_problem.h"
#include "simd.h"

#define VLKERN_ROOM attention
#define VLKERN_ARITHMETIC "../kernels/interval_attention/cpu_kernel.inc"
// after the two names
#include "levels.inc"

#if defined(VLKERN_LEVELS) && defined(VLKERN_AMX)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")
#include "cpu_amx.h"
#pragma GCC pop_options
#endif

namespace vlkern {
namespace {

using namespace attention;

// Calls f.operator()<Kernels>() with those of the best instruction set that this CPU has for tensors of T.
template <class T, class F>
void with_kernels_for(F&& f) {
#if defined(VLKERN_LEVELS) && defined(VLKERN_AMX)
  if constexpr (std::is_same_v<T, bf16>)
    if (amx::available()) return f.template operator()<tiles::Kernels>();
#endif
  with_kernels(f);
}

// The kernels stride over tokens and heads, so that parts of a fused projection are read in place.
Tensor unit_columns(const Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

template <class T>
Heads<const T> heads(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.size(2)};
}
template <class T>
Heads<T> mutable_heads(Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.size(2)};
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start, const Tensor& stop) {
  VLKERN_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k and v must be [tokens, heads, head dim]");
  VLKERN_CHECK(q.size(2) == k.size(2) && q.size(2) % 8 == 0 && v.size(2) % 8 == 0,
               "head dims must be multiples of 8, those of q and k equal");
  VLKERN_CHECK(
      k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
      "k and v must have as many tokens and heads, q a multiple of the heads");
  VLKERN_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
               "q, k and v must have one dtype");
  for (const Tensor* t : {&start, &stop})
    VLKERN_CHECK(t->dim() == 1 && t->size(0) == q.size(0) && t->scalar_type() == ScalarType::Int,
                 "start and stop must be int32 [Nq]");
}

Bounds bounds_of(const Tensor& q, const Tensor& k, const Tensor& start, const Tensor& stop) {
  Tensor from = torch::stable::contiguous(start), to = torch::stable::contiguous(stop);
  return {from.const_data_ptr<int32_t>(), to.const_data_ptr<int32_t>(), q.size(0), k.size(0)};
}

template <class T>
Inputs<T> inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Bounds& b, double scale,
                 std::optional<double> softcap) {
  return {heads<T>(q), heads<T>(k),           heads<T>(v),  b,
          q.size(1),   q.size(1) / k.size(1), float(scale), float(softcap.value_or(0))};
}

template <class Kernels, class T>
void run_forward(const Forward<T>& c) {
  std::vector<Segment> parts = blocks(segments(c.bounds), Kernels::kRows);
  const int64_t count = parts.size();
  share(count * c.query_heads, [&] {  // neighbours in a head share keys
    return [&, worker = typename Kernels::template Forward<T>(c)](int64_t task) mutable {
      worker.block(parts[task % count], task / count);
    };
  });
}

std::tuple<Tensor, Tensor> interval_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                              const Tensor& start, const Tensor& stop, double scale,
                                              std::optional<double> softcap) {
  check(q_, k_, v_, start, stop);
  Tensor q = unit_columns(q_), k = unit_columns(k_), v = unit_columns(v_);
  const Bounds bounds = bounds_of(q, k, start, stop);
  const int64_t rows = q.size(0), query_heads = q.size(1);
  Tensor out = empty(q, {rows, query_heads, v.size(2)}, q.scalar_type()),
         lse = empty(q, {rows, query_heads}, ScalarType::Float);
  dispatch(q.scalar_type(), [&]<class T>() {
    Forward<T> c{inputs<T>(q, k, v, bounds, scale, softcap), mutable_heads<T>(out),
                 lse.mutable_data_ptr<float>()};
    for (int64_t i = 0; i < rows; ++i) {
      if (!bounds.empty(i)) continue;
      std::fill_n(c.out.at(i, 0), query_heads * v.size(2), T(0.0f));
      std::fill_n(c.lse + i * query_heads, query_heads, -INFINITY);
    }
    with_kernels_for<T>([&]<class Kernels>() { run_forward<Kernels>(c); });
  });
  return {out, lse};
}

// delta = grad . out - grad_lse, the mean slope that the softmax subtracts.
template <class T>
std::vector<float> mean_slopes(const Tensor& grad, const Tensor& out, const std::optional<Tensor>& grad_lse) {
  const int64_t rows = grad.size(0), n = grad.size(1);
  std::vector<float> delta(rows * n);
  Heads<const T> g = heads<T>(grad), o = heads<T>(out);
  std::optional<Tensor> dense = grad_lse ? std::optional(torch::stable::contiguous(*grad_lse)) : std::nullopt;
  const float* l = dense ? dense->template const_data_ptr<float>() : nullptr;
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t h = 0; h < n; ++h) {
        const T *a = g.at(i, h), *b = o.at(i, h);
        float sum = sum_of(g.width, [&](int64_t j) { return to_float(a[j]) * to_float(b[j]); });
        delta[i * n + h] = l ? sum - l[i * n + h] : sum;
      }
  });
  return delta;
}

// out = part[0] + part[1] + ..., `stride` apart: the gradients of the query heads that share a key head.
template <class T>
VLKERN_SIMD void add_and_round(float* part, int64_t parts, int64_t stride, T* out, int64_t n) {
  for (int64_t p = 1; p < parts; ++p)
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) part[j] += part[p * stride + j];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = from_float<T>(part[j]);
}

// Rows without keys, and keys that no family has, get zero gradients.
template <class T>
void fill_gaps(const Bounds& bounds, const std::vector<Family>& by_key, Tensor& dq, Tensor& dk, Tensor& dv) {
  auto clear = [](Heads<T> x, int64_t heads, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::fill_n(x.at(i, 0), heads * x.width, T(0.0f));
  };
  for (int64_t i = 0; i < dq.size(0); ++i)
    if (bounds.empty(i)) clear(mutable_heads<T>(dq), dq.size(1), i, i + 1);
  int64_t end = 0;
  for (size_t f = 0; f <= by_key.size(); ++f) {
    int64_t begin = end, next = f < by_key.size() ? by_key[f].lo : dk.size(0);
    clear(mutable_heads<T>(dk), dk.size(1), begin, next);
    clear(mutable_heads<T>(dv), dv.size(1), begin, next);
    end = f < by_key.size() ? by_key[f].hi : next;
  }
}

// A task is a family of documents and one query head. It owns its dq; dk and dv are summed up in float: in
// scratch memory where no other head shares the keys, else in a tensor, to be added up when all heads of the
// group are done.
template <class Kernels, class T>
void run_backward(const Backward<T>& c, std::vector<Family> found, Tensor& dk_, Tensor& dv_) {
  const int64_t d = c.q.width, dv = c.v.width, keys = dk_.size(0), count = c.query_heads;
  std::stable_sort(found.begin(), found.end(),
                   [](const Family& a, const Family& b) { return a.work() > b.work(); });
  Heads<T> dk_out = mutable_heads<T>(dk_), dv_out = mutable_heads<T>(dv_);
  const int64_t key_heads = count / c.group, stride = keys * (d + dv);
  const bool shared = c.group > 1;
  Tensor sums = empty(dk_, {shared ? count : 0, stride}, ScalarType::Float);
  float* base = sums.mutable_data_ptr<float>();
  auto finish = [&](const Family& f, int64_t head, float* dk, float* dvs) {
    for (int64_t j = 0; j < f.hi - f.lo; ++j) {
      add_and_round(dk + j * d, c.group, stride, dk_out.at(f.lo + j, head), d);
      add_and_round(dvs + j * dv, c.group, stride, dv_out.at(f.lo + j, head), dv);
    }
  };
  auto in_tensor = [&](const Family& f, int64_t head) {
    return std::pair(base + head * stride + f.lo * d, base + head * stride + keys * d + f.lo * dv);
  };
  share(int64_t(found.size()) * count, [&] {
    return [&, worker = typename Kernels::template Backward<T>(c),
            scratch = std::vector<float>()](int64_t task) mutable {
      const Family& f = found[task / count];
      const int64_t head = task % count, length = f.hi - f.lo;
      if (!shared) scratch.resize(std::max<size_t>(scratch.size(), length * (d + dv)));
      auto [dk, dvs] = shared ? in_tensor(f, head) : std::pair(scratch.data(), scratch.data() + length * d);
      std::fill_n(dk, length * d, 0.0f);
      std::fill_n(dvs, length * dv, 0.0f);
      worker.family(f, head, dk, dvs);
      if (!shared) finish(f, head, dk, dvs);
    };
  });
  if (!shared) return;
  share(int64_t(found.size()) * key_heads, [&] {
    return [&](int64_t task) {
      const Family& f = found[task / key_heads];
      auto [dk, dvs] = in_tensor(f, task % key_heads * c.group);
      finish(f, task % key_heads, dk, dvs);
    };
  });
}

std::tuple<Tensor, Tensor, Tensor> interval_attention_backward(
    const Tensor& grad_, const std::optional<Tensor>& grad_lse, const Tensor& q_, const Tensor& k_,
    const Tensor& v_, const Tensor& out_, const Tensor& lse_, const Tensor& start, const Tensor& stop,
    double scale, std::optional<double> softcap) {
  check(q_, k_, v_, start, stop);
  Tensor q = unit_columns(q_), k = unit_columns(k_), v = unit_columns(v_), grad = unit_columns(grad_),
         out = unit_columns(out_), lse = torch::stable::contiguous(lse_);
  const Bounds bounds = bounds_of(q, k, start, stop);
  std::vector<Family> found = families(segments(bounds));
  Tensor dq = empty(q, shape_of(q), q.scalar_type()), dk = empty(k, shape_of(k), k.scalar_type()),
         dv = empty(v, shape_of(v), v.scalar_type());
  dispatch(q.scalar_type(), [&]<class T>() {
    fill_gaps<T>(bounds, found, dq, dk, dv);
    std::vector<float> delta = mean_slopes<T>(grad, out, grad_lse);
    Backward<T> c{inputs<T>(q, k, v, bounds, scale, softcap), heads<T>(grad), lse.const_data_ptr<float>(),
                  delta.data(), mutable_heads<T>(dq)};
    with_kernels_for<T>([&]<class Kernels>() { run_backward<Kernels>(c, found, dk, dv); });
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("interval_attention.cpu", TORCH_BOX(&interval_attention));
  m.impl("interval_attention_backward.cpu", TORCH_BOX(&interval_attention_backward));
}

}  // namespace vlkern
