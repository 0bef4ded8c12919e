// Draws from mixtures of Gaussians on the CPU: the logits of a token in one sweep, then one read of a
// component.
#include <cmath>
#include <vector>

#include "simd.h"
#include "vlkern.h"

namespace vlkern {
namespace {

constexpr float kReach = 10.0f, kNarrow = 1.0f;  // as in reference.py

// weights = exp((logits - max) temperature)
template <class T>
VLKERN_INLINE void weigh_all(const T* logits, float* weights, int64_t k, float temperature) {
  float most = -INFINITY;
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < k; ++j) {
    float l = to_float(logits[j]);
    most = l > most ? l : most;
  }
#pragma omp simd
  for (int64_t j = 0; j < k; ++j) {
    float x = (to_float(logits[j]) - most) * temperature, e = exp_nonpositive(x);
    weights[j] = x < -87.0f ? 0.0f : e;
  }
}

// max(squareplus(raw), least) temperature; beyond 2^13 the 4 is below rounding, and raw^2 may overflow
VLKERN_INLINE float scale_of(float raw, float least, float temperature) {
  float a = raw < 0 ? -raw : raw, h = a > 8192.0f ? a : std::sqrt(a * a + 4.0f);
  float large = 0.5f * a + 0.5f * h, plus = raw < 0 ? 1.0f / large : large;
  return (plus < least ? least : plus) * temperature;
}

struct Scaling {
  float temperature, mixture_temperature, min_scale;
};

template <class T>
VLKERN_INLINE void shift_all(const T* loc, const T* raw, const float* eps, float* z, int64_t d, Scaling by) {
#pragma omp simd
  for (int64_t j = 0; j < d; ++j)
    z[j] = to_float(loc[j]) + scale_of(to_float(raw[j]), by.min_scale, by.temperature) * eps[j];
}

// target_clones needs plain functions, one per dtype.
#define VLKERN_DTYPE(T)                                                                                   \
  VLKERN_SIMD void weigh(const T* logits, float* weights, int64_t k, float temperature) {                 \
    weigh_all(logits, weights, k, temperature);                                                           \
  }                                                                                                       \
  VLKERN_SIMD void shift(const T* loc, const T* raw, const float* eps, float* z, int64_t d, Scaling by) { \
    shift_all(loc, raw, eps, z, d, by);                                                                   \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

// The first component whose cumulated weight exceeds `uniform` of the total.
template <class T>
int64_t choose(const T* logits, std::vector<float>& weights, float uniform, float temperature) {
  int64_t k = int64_t(weights.size()), last = 0;
  weigh(logits, weights.data(), k, temperature);
  double total = 0;
  for (float w : weights) total += w;
  double bound = uniform * total, below = 0;
  for (int64_t j = 0; j < k; ++j) {
    below += weights[j];
    if (below > bound) return j;
    if (weights[j] > 0) last = j;
  }
  return last;
}

struct Gauss {
  float loc, scale;
};

// p~ = p_c^(1 + w) / p_u^w and its proposal, as in reference.py, in delta = x - loc_c.
struct Guided {
  float a, c, proposal, mean, spread;
  bool peaked, narrow;

  Guided(Gauss with, Gauss without, float w) {
    float precision = 1.0f / (without.scale * without.scale);
    a = (1.0f + w) / (with.scale * with.scale) - w * precision;
    c = w * (with.loc - without.loc) * precision;
    proposal = 2.0f * std::max(with.scale, without.scale);
    peaked = a > 0 && std::fabs(c) <= kReach * a;
    narrow = peaked && a * proposal * proposal > kNarrow * kNarrow;
    mean = peaked ? c / a : 0.0f;
    spread = narrow ? 1.0f / std::sqrt(a) : proposal;
  }

  float propose(float normal) const { return (narrow ? mean : 0.0f) + normal * spread; }

  bool accepts(float delta, float chance) const {
    float off = delta - mean, far = delta / proposal;
    float log_p = peaked ? -0.5f * a * off * off
                         : delta * (c - 0.5f * a * delta) - kReach * (std::fabs(c) - 0.5f * kReach * a);
    float log_ratio = log_p + 0.5f * far * far;
    return std::log(chance) < (narrow ? -log_ratio : log_ratio);
  }
};

// One token's row of parameters.
template <class T>
struct Row {
  const T* at;
  int64_t k, d;
  bool joint;

  const T* logits(int64_t channel) const { return joint ? at : at + channel * k; }
  const T* loc(int64_t component, int64_t channel) const {
    return joint ? at + k + 2 * component * d + channel : at + (d + channel) * k + component;
  }
  const T* raw(int64_t component, int64_t channel) const {
    return loc(component, channel) + (joint ? d : d * k);
  }
  Gauss gauss(int64_t component, int64_t channel, Scaling by) const {
    return {to_float(*loc(component, channel)),
            scale_of(to_float(*raw(component, channel)), by.min_scale, by.temperature)};
  }
};

struct Shape {
  int64_t n, d, k, width;

  Shape(const Tensor& params, const Tensor& uniform, const Tensor& eps, int64_t dims, bool joint)
      : n(params.size(0)),
        d(dims),
        k(params.size(1) / (joint ? 1 + 2 * dims : 3 * dims)),
        width(params.size(1)) {
    VLKERN_CHECK(k > 0 && width == k * (joint ? 1 + 2 * d : 3 * d),
                 "params must hold k components of d dimensions");
    VLKERN_CHECK(uniform.scalar_type() == ScalarType::Float && eps.scalar_type() == ScalarType::Float &&
                     uniform.numel() == (joint ? n : n * d) && eps.numel() == n * d,
                 "the noise must be float32, a number a choice and one a dimension");
  }
};

// f(token, weights) for every token on all threads.
template <class F>
void for_each_token(const Shape& s, F f) {
  int64_t grain = std::max<int64_t>(1, (1 << 12) / (s.k + 4 * s.d));
  torch::stable::parallel_for(0, s.n, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> weights(s.k);
    for (int64_t i = begin; i < end; ++i) f(i, weights);
  });
}

Tensor gmm_sample(const Tensor& params_, const Tensor& uniform_, const Tensor& eps_, int64_t dims, bool joint,
                  double temperature, double mixture_temperature, double min_scale) {
  Tensor params = torch::stable::contiguous(params_), uniform = torch::stable::contiguous(uniform_),
         eps = torch::stable::contiguous(eps_);
  Shape s(params, uniform, eps, dims, joint);
  Scaling by{float(temperature), float(mixture_temperature), float(min_scale)};
  Tensor z = empty(eps, {s.n, s.d}, ScalarType::Float);
  const float *u = uniform.const_data_ptr<float>(), *e = eps.const_data_ptr<float>();
  float* out = z.mutable_data_ptr<float>();
  dispatch(params.scalar_type(), [&]<class T>() {
    const T* p = params.const_data_ptr<T>();
    for_each_token(s, [&](int64_t i, std::vector<float>& weights) {
      Row<T> row{p + i * s.width, s.k, s.d, joint};
      if (joint) {
        int64_t m = choose(row.at, weights, u[i], by.mixture_temperature);
        shift(row.loc(m, 0), row.raw(m, 0), e + i * s.d, out + i * s.d, s.d, by);
        return;
      }
      for (int64_t j = 0, at = i * s.d; j < s.d; ++j, ++at) {
        int64_t m = choose(row.logits(j), weights, u[at], by.mixture_temperature);
        Gauss drawn = row.gauss(m, j, by);
        out[at] = drawn.loc + drawn.scale * e[at];
      }
    });
  });
  return z;
}

Tensor gmm_guided_sample(const Tensor& params_, const Tensor& unconditional_, const Tensor& uniform_,
                         const Tensor& eps_, const Tensor& tries_, const Tensor& chances_, int64_t dims,
                         bool joint, double guidance, double temperature, double mixture_temperature,
                         double min_scale) {
  Tensor params = torch::stable::contiguous(params_),
         unconditional = torch::stable::contiguous(unconditional_),
         uniform = torch::stable::contiguous(uniform_), eps = torch::stable::contiguous(eps_),
         tries = torch::stable::contiguous(tries_), chances = torch::stable::contiguous(chances_);
  Shape s(params, uniform, eps, dims, joint);
  VLKERN_CHECK(unconditional.numel() == params.numel() && unconditional.scalar_type() == params.scalar_type(),
               "unconditional must have the shape and dtype of params");
  VLKERN_CHECK(tries.numel() == chances.numel() && tries.scalar_type() == ScalarType::Float &&
                   chances.scalar_type() == ScalarType::Float && tries.numel() == tries.size(0) * s.n * s.d,
               "tries and chances must be float32 [R, N, d]");
  Scaling by{float(temperature), float(mixture_temperature), float(min_scale)};
  int64_t rounds = tries.size(0), round = s.n * s.d;
  Tensor z = empty(eps, {s.n, s.d}, ScalarType::Float);
  const float *u = uniform.const_data_ptr<float>(), *e = eps.const_data_ptr<float>(),
              *normal = tries.const_data_ptr<float>(), *chance = chances.const_data_ptr<float>();
  float* out = z.mutable_data_ptr<float>();
  dispatch(params.scalar_type(), [&]<class T>() {
    const T *p = params.const_data_ptr<T>(), *q = unconditional.const_data_ptr<T>();
    for_each_token(s, [&](int64_t i, std::vector<float>& weights) {
      Row<T> with{p + i * s.width, s.k, s.d, joint}, without{q + i * s.width, s.k, s.d, joint};
      int64_t m = 0;
      for (int64_t j = 0, at = i * s.d; j < s.d; ++j, ++at) {
        if (!joint || j == 0) m = choose(with.logits(j), weights, u[joint ? i : at], by.mixture_temperature);
        Gauss drawn = with.gauss(m, j, by);
        Guided law(drawn, without.gauss(m, j, by), float(guidance));
        float delta = drawn.scale * e[at];  // if every round fails
        for (int64_t r = 0, from = at; r < rounds; ++r, from += round) {
          float proposed = law.propose(normal[from]);
          if (law.accepts(proposed, chance[from])) {
            delta = proposed;
            break;
          }
        }
        out[at] = drawn.loc + delta;
      }
    });
  });
  return z;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("gmm_sample.cpu", TORCH_BOX(&gmm_sample));
  m.impl("gmm_guided_sample.cpu", TORCH_BOX(&gmm_guided_sample));
}

}  // namespace vlkern
