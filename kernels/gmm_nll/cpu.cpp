// The likelihood of mixtures on the CPU: tasks of tokens, or of some components of one token where mixtures
// are large. The arithmetic is in csrc/gmm.h.
#include "gmm.h"

#include <memory>

#include "share.h"
#include "simd.h"
#include "vlkern.h"

namespace vlkern {
namespace {

constexpr int64_t kTask = 1 << 14;  // parameters of a task: 10 us, and they lie in the first two caches

using Buffer = std::unique_ptr<float[]>;
Buffer buffer(int64_t n) {
  return std::make_unique_for_overwrite<float[]>(n);
}

// Tokens n, components k and dimensions d of a call; `parameters` P of a token.
struct Problem {
  int64_t n, k, d, parameters;
  float min_scale;
  Tensor target;

  // Joint mixtures: components of a block, blocks of a token, tokens of a task.
  int64_t block, blocks, tokens;

  Problem(const Tensor& params, const Tensor& target_, bool joint, double min_scale)
      : n(params.size(0)),
        d(target_.size(1)),
        parameters(params.size(1)),
        min_scale(float(min_scale)),
        target(torch::stable::contiguous(target_)) {
    k = parameters / (joint ? 1 + 2 * d : 3 * d);
    block = std::min(k, std::max<int64_t>(8, round_up(kTask / (2 * d), 8)));
    blocks = ceil_div(k, block);
    tokens = std::max<int64_t>(1, kTask / parameters);
  }

  // The target of a token as floats, with zeros up to a multiple of the widest vector.
  int64_t room() const { return round_up(d, gmm::kWidest); }
  void load_target(int64_t token, float* z) const {
    std::fill(z + d, z + room(), 0.0f);
    dispatch(target.scalar_type(), [&]<class T>() {
      const T* row = target.const_data_ptr<T>() + token * d;
      for (int64_t j = 0; j < d; ++j) z[j] = to_float(row[j]);
    });
  }
  void store_target(int64_t token, const float* z, Tensor& out) const {
    dispatch(target.scalar_type(), [&]<class T>() {
      T* row = out.mutable_data_ptr<T>() + token * d;
      for (int64_t j = 0; j < d; ++j) row[j] = from_float<T>(z[j]);
    });
  }

  // work(token) with a worker of each thread's own, in tasks of several tokens
  template <class Make>
  void each_token(Make make) const {
    share(ceil_div(n, tokens), [&] {
      return [&, work = make()](int64_t task) mutable {
        for (int64_t t = task * tokens; t < std::min(n, (task + 1) * tokens); ++t) work(t);
      };
    });
  }
  // work(token, block, components of the block)
  template <class Make>
  void each_block(Make make) const {
    share(ceil_div(n, tokens) * blocks, [&] {
      return [&, work = make()](int64_t task) mutable {
        const int64_t first = task / blocks * tokens, b = task % blocks;
        for (int64_t t = first; t < std::min(n, first + tokens); ++t)
          work(t, b, std::min(block, k - b * block));
      };
    });
  }
};

Problem check(const Tensor& params, const Tensor& target, bool joint, double min_scale) {
  VLKERN_CHECK(
      params.dim() == 2 && target.dim() == 2 && target.size(0) == params.size(0) && target.size(1) > 0,
      "params must be [N, P] and target [N, d]");
  const int64_t each = joint ? 1 + 2 * target.size(1) : 3 * target.size(1);
  VLKERN_CHECK(params.size(1) > 0 && params.size(1) % each == 0, "params must hold k components");
  return Problem(params, target, joint, min_scale);
}

template <class T>
void widen(const T* in, float* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = to_float(in[j]);
}

template <class T>
void joint_nll(const Problem& p, const T* params, float* log_weights, float* nll) {
  auto total = [&](int64_t t, float* logits) {
    widen(params + t * p.parameters, logits, p.k);
    const gmm::Sum all = gmm::sum_of_exps(log_weights + t * p.k, p.k), prior = gmm::sum_of_exps(logits, p.k);
    nll[t] = (prior.most - all.most) + (prior.log - all.log);
  };
  p.each_block([&] {
    return [&, z = buffer(p.room()), wide = buffer(p.blocks == 1 ? p.k : 0)](int64_t t, int64_t b,
                                                                             int64_t count) {
      const T *row = params + t * p.parameters, *logits = row + b * p.block;
      float* out = log_weights + t * p.k + b * p.block;
      p.load_target(t, z.get());
      gmm::log_densities(row + p.k + 2 * p.d * b * p.block, count, p.d, z.get(), p.min_scale, out);
      for (int64_t i = 0; i < count; ++i) out[i] += to_float(logits[i]);
      if (p.blocks == 1) total(t, wide.get());  // while the logits are in cache
    };
  });
  if (p.blocks == 1) return;
  p.each_token([&] { return [&total, wide = buffer(p.k)](int64_t t) { total(t, wide.get()); }; });
}

template <class T>
void joint_gradients(const Problem& p, const float* grad, const T* params, const float* log_weights,
                     T* d_params, Tensor& d_target) {
  std::vector<gmm::Sum> sums(p.n);
  p.each_token([&] {
    return [&, prior = buffer(p.k), share = buffer(p.k)](int64_t t) {
      const float* w = log_weights + t * p.k;
      T* out = d_params + t * p.parameters;
      widen(params + t * p.parameters, prior.get(), p.k);
      sums[t] = gmm::sum_of_exps(w, p.k);
      gmm::softmax(prior.get(), p.k, gmm::sum_of_exps(prior.get(), p.k), grad[t], prior.get());
      gmm::softmax(w, p.k, sums[t], grad[t], share.get());
      for (int64_t i = 0; i < p.k; ++i) out[i] = from_float<T>(prior[i] - share[i]);
    };
  });
  // Of a token in several blocks, each has a sum of its own.
  const int64_t room = p.room();
  Buffer parts = buffer(p.blocks > 1 ? p.n * p.blocks * room : 0);
  p.each_block([&] {
    return [&, z = buffer(room), share = buffer(p.block), own = buffer(room)](int64_t t, int64_t b,
                                                                              int64_t count) {
      const int64_t at = t * p.parameters + p.k + 2 * p.d * b * p.block;
      float* sum = p.blocks > 1 ? parts.get() + (t * p.blocks + b) * room : own.get();
      std::fill(sum, sum + room, 0.0f);
      p.load_target(t, z.get());
      gmm::softmax(log_weights + t * p.k + b * p.block, count, sums[t], grad[t], share.get());
      gmm::gradients(params + at, count, p.d, z.get(), share.get(), p.min_scale, d_params + at, sum);
      if (p.blocks == 1) p.store_target(t, sum, d_target);
    };
  });
  if (p.blocks == 1) return;
  for (int64_t t = 0; t < p.n; ++t) {
    float* sum = parts.get() + t * p.blocks * room;
    for (int64_t b = 1; b < p.blocks; ++b)
      for (int64_t j = 0; j < p.d; ++j) sum[j] += sum[b * room + j];
    p.store_target(t, sum, d_target);
  }
}

std::tuple<Tensor, Tensor> gmm_nll(const Tensor& params_, const Tensor& target, bool joint,
                                   double min_scale) {
  const Problem p = check(params_, target, joint, min_scale);
  Tensor params = torch::stable::contiguous(params_);
  Tensor nll = joint ? empty(params, {p.n}, ScalarType::Float) : empty(params, {p.n, p.d}, ScalarType::Float);
  Tensor log_weights = empty(params, {p.n, joint ? p.k : 0}, ScalarType::Float);
  dispatch(params.scalar_type(), [&]<class T>() {
    const T* rows = params.const_data_ptr<T>();
    float* out = nll.mutable_data_ptr<float>();
    if (joint) return joint_nll(p, rows, log_weights.mutable_data_ptr<float>(), out);
    p.each_token([&] {
      return [&, z = buffer(p.room()), room = buffer(gmm::channel_room(p.k))](int64_t t) {
        const T* row = rows + t * p.parameters;
        p.load_target(t, z.get());
        gmm::channels_nll(row, row + p.d * p.k, row + 2 * p.d * p.k, p.d, p.k, z.get(), p.min_scale,
                          room.get(), out + t * p.d);
      };
    });
  });
  return {nll, log_weights};
}

std::tuple<Tensor, Tensor> gmm_nll_backward(const Tensor& grad_, const Tensor& params_, const Tensor& target,
                                            const Tensor& log_weights_, bool joint, double min_scale) {
  const Problem p = check(params_, target, joint, min_scale);
  Tensor grad = torch::stable::contiguous(grad_), params = torch::stable::contiguous(params_),
         log_weights = torch::stable::contiguous(log_weights_);
  VLKERN_CHECK(grad.numel() == p.n * (joint ? 1 : p.d) && grad.scalar_type() == ScalarType::Float,
               "grad must be float32, one number for each of nll");
  VLKERN_CHECK(
      log_weights.numel() == (joint ? p.n * p.k : 0) && log_weights.scalar_type() == ScalarType::Float,
      "log_weights must be float32 [N, k] of a joint mixture");
  Tensor d_params = empty(params, shape_of(params), params.scalar_type());
  Tensor d_target = empty(p.target, shape_of(p.target), p.target.scalar_type());
  dispatch(params.scalar_type(), [&]<class T>() {
    const T* rows = params.const_data_ptr<T>();
    T* out = d_params.mutable_data_ptr<T>();
    const float* g = grad.const_data_ptr<float>();
    if (joint) return joint_gradients(p, g, rows, log_weights.const_data_ptr<float>(), out, d_target);
    const int64_t part = p.d * p.k;
    p.each_token([&] {
      return [&, z = buffer(p.room()), sum = buffer(p.room()),
              room = buffer(gmm::channel_room(p.k))](int64_t t) {
        const T* row = rows + t * p.parameters;
        T* slopes = out + t * p.parameters;
        p.load_target(t, z.get());
        gmm::channels_gradients(row, row + part, row + 2 * part, p.d, p.k, z.get(), g + t * p.d, p.min_scale,
                                room.get(), slopes, slopes + part, slopes + 2 * part, sum.get());
        p.store_target(t, sum.get(), d_target);
      };
    });
  });
  return {d_params, d_target};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("gmm_nll.cpu", TORCH_BOX(&gmm_nll));
  m.impl("gmm_nll_backward.cpu", TORCH_BOX(&gmm_nll_backward));
}

}  // namespace vlkern
