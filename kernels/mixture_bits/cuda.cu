// The bits of symbols under mixtures on NVIDIA GPUs: a thread a symbol, so that neighbouring threads read
// neighbouring channels, and every parameter crosses memory once. The maths is in README.md.
#include <cmath>

#include "checks.h"
#include "cuda/launch.cuh"
#include "vlkern.h"

namespace vlkern {
namespace {

using cuda::Stream;
using mixture_bits::Given;

constexpr int kBlock = 128;                                      // symbols
constexpr float kLowest = -2.20727491f, kHighest = 5.54517746f;  // log 0.11, log 256
constexpr float kMostBits = 29.8973529f;                         // of the least probability, 1e-9
constexpr float kBitsPerNat = 1.44269504f;
constexpr float kSteep = 128, kFarthest = 1e9f;  // bounds of distances, see reference.py
constexpr float kDensity = 0.398942280f;         // phi(0)
constexpr float kFirst = 3e38f;                  // above every exponent, and minus it below every logit

// Symbols of any dtype: one for all threads, so that asking which costs nothing beside the memory.
struct Symbols {
  void* data;
  ScalarType dtype;

  explicit Symbols(const Tensor& t) : data(t.data_ptr()), dtype(t.scalar_type()) {
    VLKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                 "symbols must be float32, bfloat16 or float16");
  }

  __device__ float load(int64_t i) const {
    if (dtype == ScalarType::Float) return static_cast<const float*>(data)[i];
    if (dtype == ScalarType::Half) return float(static_cast<const torch::headeronly::Half*>(data)[i]);
    return float(static_cast<const torch::headeronly::BFloat16*>(data)[i]);
  }

  __device__ void store(int64_t i, float value) const {
    if (dtype == ScalarType::Float)
      static_cast<float*>(data)[i] = value;
    else if (dtype == ScalarType::Half)
      static_cast<torch::headeronly::Half*>(data)[i] = torch::headeronly::Half(value);
    else
      static_cast<torch::headeronly::BFloat16*>(data)[i] = torch::headeronly::BFloat16(value);
  }
};

// Sizes of symbols [n, c], of `count` in all, and params [n, 3, k, c].
struct Sizes {
  int64_t count, k, c;

  explicit Sizes(const Given& p) : count(p.n * p.c), k(p.k), c(p.c) {}

  // Where the first logit of symbol i lies; its components are c apart, logits, means and scales k c.
  __device__ int64_t first(int64_t i) const {
    const int64_t row = (i | c) >> 32 ? i / c : int64_t(unsigned(i) / unsigned(c));
    return i + row * (3 * k - 1) * c;
  }
};

// R(x) = e^(x^2 / 2) Q(x) from t = 1 / (1 + 0.32 x), to 4e-7 of itself.
__device__ float tail_ratio(float t) {
  float p = -0.0210781749f * t + 0.0954072773f;
  p = p * t - 0.14670749f;
  p = p * t + 0.065328046f;
  p = p * t - 0.00937757920f;
  p = p * t + 0.0586539693f;
  p = p * t + 0.0878290981f;
  p = p * t + 0.114622362f;
  p = p * t + 0.127660945f;
  p = p * t + 0.127661526f;
  return p * t;
}

// Of one component: P = density e^-exponent, d log P / dy and d log P / d log s.
struct Interval {
  float density, exponent, of_symbol, of_scale;

  __device__ Interval(float away, float raw) {
    raw = raw < kLowest ? kLowest : raw;  // NaN stays NaN
    raw = raw > kHighest ? kHighest : raw;
    const float inverse = expf(-raw), h = 0.5f * inverse;
    const float distance = fabsf(away) * inverse;
    const float d = distance > kSteep ? kSteep : distance, far = distance > kFarthest ? kFarthest : distance;
    const float a = d - h, b = d + h, u = d * h, root = expf(-u), fall = root * root;
    const bool inside = a < 0;
    const float to_a = 1 + 0.32f * fabsf(a), to_b = 1 + 0.32f * b, both = 1 / (to_a * to_b);
    const float ratio = tail_ratio(both * to_b), tail = fall * tail_ratio(both * to_a);
    const float within = inside ? expf(-0.5f * a * a) : 1.0f;
    density = inside ? 1 - within * (ratio + tail) : ratio - tail;
    exponent = inside ? 0.0f : 0.5f * (far - h) * (far - h);
    float slope;
    if (h < 0.25f && u < 0.25f) {  // a short interval: series in w = (d h)^2 and v = h^2 / 2
      const float w = u * u, v = 0.5f * h * h;
      const float series = 1 + v * (2.0f / 3 + v * (4.0f / 15 + v * (8.0f / 105))) +
                           w * (1.0f / 6 + v * (1.0f / 15 + v * (2.0f / 105)) +
                                w * (1.0f / 120 + v * (1.0f / 420) + w * (1.0f / 5040)));
      const float by_w = 1.0f / 6 + v * (1.0f / 15 + v * (2.0f / 105)) +
                         w * (1.0f / 60 + v * (1.0f / 210) + w * (1.0f / 1680));
      const float by_v = 2.0f / 3 + v * (8.0f / 15 + v * (8.0f / 35)) +
                         w * (1.0f / 15 + v * (4.0f / 105) + w * (1.0f / 420));
      density = within * (2 * kDensity * h * root * series);
      slope = d * (4 * v * by_w / series - 1);
      of_scale = d * d - 1 + 2 * v - (4 * w * by_w + 2 * v * by_v) / series;
    } else {
      const float edge = kDensity * within / density;
      slope = (fall - 1) * edge;
      of_scale = (a - fall * b) * edge;
    }
    of_symbol = (away < 0 ? -slope : slope) * inverse;
  }
};

// The parameters of one symbol.
template <class T>
struct Mixture {
  const T* logits;
  int64_t k, c;

  __device__ float logit(int64_t i) const { return float(logits[i * c]); }
  __device__ float raw(int64_t i) const { return float(logits[(2 * k + i) * c]); }
  __device__ Interval interval(float y, int64_t i) const { return {y - float(logits[(k + i) * c]), raw(i)}; }
};

// Over components: the largest logit, the sum of e^(logit - it); the least exponent, the sum of densities
// beyond it. An exponent is here that of the weighted P.
struct Sums {
  float most = -kFirst, prior = 0, least = kFirst, mass = 0;

  template <class T>
  __device__ Sums(const Mixture<T>& m, float y) {
    for (int64_t i = 0; i < m.k; ++i) most = fmaxf(most, m.logit(i));
    for (int64_t i = 0; i < m.k; ++i) {
      const float below = m.logit(i) - most;
      const Interval at = m.interval(y, i);
      const float exponent = at.exponent - below, low = fminf(least, exponent);
      prior += expf(below);
      mass = mass * expf(low - least) + at.density * expf(low - exponent);
      least = low;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock)
    rate(Symbols symbols, const T* __restrict__ params, float* __restrict__ bits, Sizes size) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= size.count) return;
  const Sums sums(Mixture<T>{params + size.first(i), size.k, size.c}, symbols.load(i));
  const float found = kBitsPerNat * (sums.least + logf(sums.prior / sums.mass));
  bits[i] = found < 0 ? 0.0f : found > kMostBits ? kMostBits : found;  // NaN stays NaN
}

// The second look at the parameters is one at a cache.
template <class T>
__global__ void __launch_bounds__(kBlock)
    slopes(const float* __restrict__ grad, Symbols symbols, const T* __restrict__ params, Symbols d_symbols,
           T* __restrict__ d_params, Sizes size) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= size.count) return;
  const int64_t k = size.k, c = size.c;
  const Mixture<T> m{params + size.first(i), k, c};
  T* out = d_params + size.first(i);
  const float y = symbols.load(i), g = -kBitsPerNat * grad[i];
  const Sums sums(m, y);
  const float per_share = g / sums.mass, per_weight = g / sums.prior;
  float d_y = 0;
  for (int64_t j = 0; j < k; ++j) {
    const float below = m.logit(j) - sums.most, raw = m.raw(j);
    const Interval at = m.interval(y, j);
    const float share = per_share * at.density * expf(sums.least - (at.exponent - below));
    const float pull = share * at.of_symbol, scale = share * at.of_scale;
    const bool outward = (raw < kLowest && scale >= 0) || (raw > kHighest && scale <= 0);
    d_y += pull;
    out[j * c] = T(share - per_weight * expf(below));
    out[(k + j) * c] = T(-pull);
    out[(2 * k + j) * c] = T(outward ? 0.0f : scale);
  }
  d_symbols.store(i, d_y);
}

Tensor forward(const Tensor& symbols, const Tensor& params) {
  const Given p(symbols, params);
  Stream stream(p.params);
  stream.check_device(p.symbols);
  Tensor bits = empty(p.params, {p.n, p.c}, ScalarType::Float);
  dispatch(p.params.scalar_type(), [&]<class T>() {
    stream.launch(rate<T>, cuda::blocks(ceil_div(p.n * p.c, kBlock)), kBlock, Symbols(p.symbols),
                  p.params.const_data_ptr<T>(), bits.mutable_data_ptr<float>(), Sizes(p));
  });
  return bits;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_, const Tensor& symbols, const Tensor& params) {
  const Given p(symbols, params);
  const Tensor grad = p.checked(grad_);
  Stream stream(p.params);
  for (const Tensor* t : {&p.symbols, &grad}) stream.check_device(*t);
  Tensor d_symbols = empty(p.symbols, {p.n, p.c}, p.symbols.scalar_type());
  Tensor d_params = empty(p.params, {p.n, 3, p.k, p.c}, p.params.scalar_type());
  dispatch(p.params.scalar_type(), [&]<class T>() {
    stream.launch(slopes<T>, cuda::blocks(ceil_div(p.n * p.c, kBlock)), kBlock, grad.const_data_ptr<float>(),
                  Symbols(p.symbols), p.params.const_data_ptr<T>(), Symbols(d_symbols),
                  d_params.mutable_data_ptr<T>(), Sizes(p));
  });
  return {d_symbols, d_params};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CUDA, m) {
  m.impl("mixture_bits.cuda", TORCH_BOX(&forward));
  m.impl("mixture_bits_backward.cuda", TORCH_BOX(&backward));
}

}  // namespace vlkern
