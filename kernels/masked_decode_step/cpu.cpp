// A step of parallel decoding on the CPU: a token's logits stay in L1 from the first pass to the draw.
#include <cmath>
#include <limits>

#include "simd.h"
#include "vlkern.h"

namespace vlkern {
namespace {

constexpr int64_t kBlock = 64;  // classes whose probabilities are summed together before the draw

struct Drawn {
  int64_t token;
  float log_p;
};

template <class T>
VLKERN_INLINE float guided(const T* z, const T* plain, float guidance, int64_t v) {
  float x = to_float(z[v]);
  return plain ? x + guidance * (x - to_float(plain[v])) : x;
}

// z [V] -> wide [V] and its maximum; NaN may be lost here, and comes back with the sum.
template <class T>
VLKERN_INLINE float widen(const T* z, const T* plain, float guidance, float* wide, int64_t v) {
  if (plain) {
#pragma omp simd
    for (int64_t j = 0; j < v; ++j) {
      float x = to_float(z[j]);
      wide[j] = x + guidance * (x - to_float(plain[j]));
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < v; ++j) wide[j] = to_float(z[j]);
  }
  constexpr int kLanes = 32;
  float lanes[kLanes], top = -std::numeric_limits<float>::infinity();
  for (int l = 0; l < kLanes; ++l) lanes[l] = top;
  int64_t j = 0;
  for (; j + kLanes <= v; j += kLanes)
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes[l] = lanes[l] < wide[j + l] ? wide[j + l] : lanes[l];
  for (; j < v; ++j) top = top < wide[j] ? wide[j] : top;
  for (int l = 0; l < kLanes; ++l) top = top < lanes[l] ? lanes[l] : top;
  return top;
}

// wide [V] becomes exp(wide - top), sums [V / kBlock, rounded up] the sum of each block; their sum is
// returned.
VLKERN_INLINE double exponentials(float* wide, float top, double* sums, int64_t v) {
  double total = 0;
  for (int64_t begin = 0, block = 0; begin < v; begin += kBlock, ++block) {
    float* e = wide + begin;
    const int64_t n = std::min(kBlock, v - begin);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      float x = e[j] - top, y = exp_nonpositive(x);
      e[j] = x < -87.0f ? 0.0f : y;  // a logit of -inf is never drawn
    }
    sums[block] = double(sum_of(n, [&](int64_t j) VLKERN_INLINE_LAMBDA { return e[j]; }));
    total += sums[block];
  }
  return total;
}

// The first class at which the sum of e exceeds `reached`. Sums in another order may round to less than those
// of the blocks: then it is the last class up to the block's end that has a probability.
inline int64_t search(const float* e, const double* sums, double reached, int64_t v) {
  double before = 0;
  int64_t begin = 0, block = 0;
  for (; begin + kBlock < v && !(before + sums[block] > reached); begin += kBlock) before += sums[block++];
  const int64_t end = std::min(begin + kBlock, v);
  for (int64_t j = begin; j + 1 < end; ++j) {
    before += double(e[j]);
    if (before > reached) return j;
  }
  int64_t last = end - 1;
  while (last > 0 && !(e[last] > 0)) --last;
  return last;
}

template <class T>
VLKERN_INLINE Drawn draw_token(const T* z, const T* plain, float guidance, float u, float* wide, double* sums,
                               int64_t v) {
  const float top = widen(z, plain, guidance, wide, v);
  const double total = exponentials(wide, top, sums, v);
  const int64_t token = search(wide, sums, double(u) * total, v);
  return {token, (guided(z, plain, guidance, token) - top) - float(std::log(total))};
}

// target_clones needs plain functions, one per dtype.
#define VLKERN_DTYPE(T)                                                                                  \
  VLKERN_SIMD Drawn draw(const T* z, const T* plain, float guidance, float u, float* wide, double* sums, \
                         int64_t v) {                                                                    \
    return draw_token(z, plain, guidance, u, wide, sums, v);                                             \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

float gumbel(float g) {
  return -std::log(-std::log(std::max(g, 0x1p-32f)));
}

struct Candidate {
  float confidence;
  int64_t place;
};

// Masks the `count` least confident of the candidates, of equal ones those that come first.
void mask_again(std::vector<Candidate>& candidates, int64_t count, int64_t* ids, int64_t mask) {
  count = std::clamp<int64_t>(count, 0, candidates.size());
  auto before = [](const Candidate& a, const Candidate& b) {
    return a.confidence < b.confidence || (a.confidence == b.confidence && a.place < b.place);
  };
  std::nth_element(candidates.begin(), candidates.begin() + count, candidates.end(), before);
  for (int64_t i = 0; i < count; ++i) ids[candidates[i].place] = mask;
}

constexpr int64_t kGrain = int64_t(1) << 13;  // logits that a thread takes at a time, at least: 10 us

std::tuple<Tensor, Tensor, Tensor> masked_decode_step(const Tensor& logits_, const Tensor& ids_,
                                                      const Tensor& count_, const Tensor& noise_,
                                                      const std::optional<Tensor>& unconditional_,
                                                      double guidance, double temperature, int64_t mask) {
  VLKERN_CHECK(logits_.dim() == 3 && logits_.size(2) > 0, "logits must be [B, N, V] with at least one class");
  const int64_t rows = logits_.size(0), n = logits_.size(1), v = logits_.size(2);
  VLKERN_CHECK(ids_.scalar_type() == ScalarType::Long && ids_.numel() == rows * n &&
                   count_.scalar_type() == ScalarType::Long && count_.numel() == rows &&
                   noise_.scalar_type() == ScalarType::Float && noise_.numel() == 2 * rows * n,
               "ids must be int64 [B, N], count int64 [B], noise float32 [B, N, 2]");
  VLKERN_CHECK(!unconditional_ || (unconditional_->scalar_type() == logits_.scalar_type() &&
                                   unconditional_->numel() == logits_.numel()),
               "unconditional must have the shape and dtype of logits");
  Tensor logits = torch::stable::contiguous(logits_), ids = torch::stable::contiguous(ids_),
         count = torch::stable::contiguous(count_), noise = torch::stable::contiguous(noise_);
  std::optional<Tensor> unconditional;
  if (unconditional_) unconditional = torch::stable::contiguous(*unconditional_);
  Tensor next = empty(ids, {rows, n}, ScalarType::Long), filled = empty(ids, {rows, n}, ScalarType::Long),
         log_p = empty(logits, {rows, n}, ScalarType::Float);
  const int64_t* known = ids.const_data_ptr<int64_t>();
  const float* uniform = noise.const_data_ptr<float>();
  int64_t *to = next.mutable_data_ptr<int64_t>(), *all = filled.mutable_data_ptr<int64_t>();
  float* log = log_p.mutable_data_ptr<float>();
  dispatch(logits.scalar_type(), [&]<class T>() {
    const T *z = logits.const_data_ptr<T>(),
            *plain = unconditional ? unconditional->const_data_ptr<T>() : nullptr;
    torch::stable::parallel_for(
        0, rows * n, std::max<int64_t>(1, kGrain / v), [&](int64_t begin, int64_t end) {
          std::vector<float> wide(v);
          std::vector<double> sums(ceil_div(v, kBlock));
          for (int64_t i = begin; i < end; ++i) {
            Drawn drawn{known[i], 0};
            if (known[i] == mask)
              drawn = draw(z + i * v, plain ? plain + i * v : nullptr, float(guidance), uniform[2 * i],
                           wide.data(), sums.data(), v);
            to[i] = all[i] = drawn.token;
            log[i] = drawn.log_p;
          }
        });
  });
  const int64_t* counts = count.const_data_ptr<int64_t>();
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, 256 / std::max<int64_t>(n, 1)), [&](int64_t begin, int64_t end) {
        std::vector<Candidate> candidates;
        for (int64_t b = begin; b < end; ++b) {
          candidates.clear();
          for (int64_t i = b * n; i < (b + 1) * n; ++i) {
            if (known[i] != mask) continue;
            float c = log[i] + (temperature ? float(temperature) * gumbel(uniform[2 * i + 1]) : 0.0f);
            candidates.push_back({c == c ? c : -std::numeric_limits<float>::infinity(), i});
          }
          mask_again(candidates, counts[b], to, mask);
        }
      });
  return {next, filled, log_p};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("masked_decode_step.cpu", TORCH_BOX(&masked_decode_step));
}

}  // namespace vlkern
