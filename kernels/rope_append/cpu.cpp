// Norm and RoPE of new queries and keys, new keys and values into their slots, on the CPU: one pass.
#include "rope.h"

namespace vlkern {
namespace {

constexpr float kSmallest = 1e-30f;  // heads below count as zeros: their scale would leave float32's range

// codes = round(x 127 / max |x|), and the scale by which they become x again. NaN and inf make it NaN.
VLKERN_INLINE float quantise_head(const float* x, int8_t* codes, int64_t n) {
  float top = 0, poison = 0;
#pragma omp simd reduction(max : top) reduction(+ : poison)
  for (int64_t j = 0; j < n; ++j) {
    float size = x[j] < 0 ? -x[j] : x[j];
    top = top > size ? top : size;
    poison += x[j] * 0.0f;
  }
  float steps = top > kSmallest ? 127.0f / top : 0.0f;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    // Adding 1.5 * 2^23 rounds to the nearest integer, and leaves it in the lowest bits.
    uint32_t bits = std::bit_cast<uint32_t>(x[j] * steps + 12582912.0f);
    codes[j] = int8_t(bits);
  }
  return (top > kSmallest ? top / 127.0f : 0.0f) + poison;
}

template <class T>
VLKERN_INLINE void widen(const T* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = to_float(x[j]);
}

template <class T>
VLKERN_INLINE void narrow(const float* x, T* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = from_float<T>(x[j]);
}

// Slots of a cache [B, S, K, C], and the scales [B, S, K] if the elements are int8.
struct Slots {
  void* data;
  float* scale;
  int64_t heads, width;
};

// Where tokens belong: slot < 0 is nowhere.
struct Places {
  std::vector<int64_t> slot;
  Places(const Tensor& rows_, const Tensor& positions_, int64_t tokens, int64_t batch, int64_t slots)
      : slot(tokens) {
    for (const Tensor* t : {&rows_, &positions_})
      VLKERN_CHECK(t->scalar_type() == ScalarType::Int && t->dim() == 1 && t->size(0) == tokens,
                   "rows and positions must be int32 [", tokens, "]");
    Tensor rows = torch::stable::contiguous(rows_), positions = torch::stable::contiguous(positions_);
    const int32_t *r = rows.const_data_ptr<int32_t>(), *p = positions.const_data_ptr<int32_t>();
    for (int64_t t = 0; t < tokens; ++t) {
      VLKERN_CHECK(r[t] >= 0 && r[t] < batch, "rows must be within 0 to ", batch - 1, ", got ", r[t]);
      slot[t] = p[t] < 0 ? -1 : r[t] * slots + p[t] % slots;
    }
  }
};

template <class T>
struct Call {
  StridedHeads<T> q, k, v;
  const Angles& angles;
  const float *q_weight, *k_weight;
  float eps;
  const Places& places;
  Slots keys, values;
  T* out;
  int64_t tasks() const { return q.heads + k.heads + v.heads; }  // of one token
};

// Task i is a head of token i / tasks(): its query heads come first, then the keys, then the values. A head
// is turned in a buffer that stays in L1, so that there is one loop for each thing to do: nine copies of each
// are compiled.
template <class T>
VLKERN_INLINE void run_tasks(const Call<T>& c, int64_t begin, int64_t end) {
  const int64_t half = c.angles.half, channels = 2 * half;
  std::vector<float> wide(std::max(channels, c.values.width));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = i / c.tasks(), task = i % c.tasks(), slot = c.places.slot[t];
    const bool query = task < c.q.heads, value = task >= c.q.heads + c.k.heads;
    const int64_t query_head = t * c.q.heads + task, head = query ? 0 : (task - c.q.heads) % c.k.heads;
    if (slot < 0) {
      if (query) std::fill_n(c.out + query_head * channels, channels, T(0.0f));
      continue;
    }
    const Slots& to = value ? c.values : c.keys;
    const T* x = query ? c.q.at(query_head) : (value ? c.v : c.k).at(t * c.k.heads + head);
    if (!value)
      turn_head(x, query ? c.q_weight : c.k_weight, c.angles.c + t * half, c.angles.s + t * half, wide.data(),
                half, c.eps);
    else if (to.scale)
      widen(x, wide.data(), to.width);
    const int64_t place = slot * to.heads + head;
    T* plain = query ? c.out + query_head * channels : static_cast<T*>(to.data) + place * to.width;
    if (!query && to.scale)
      to.scale[place] =
          quantise_head(wide.data(), static_cast<int8_t*>(to.data) + place * to.width, to.width);
    else if (value)
      std::copy_n(x, to.width, plain);
    else
      narrow(wide.data(), plain, channels);
  }
}

// target_clones needs plain functions, one per dtype.
#define VLKERN_DTYPE(T)                                                \
  VLKERN_SIMD void run(const Call<T>& c, int64_t begin, int64_t end) { \
    run_tasks(c, begin, end);                                          \
  }
VLKERN_DTYPE(float)
VLKERN_DTYPE(bf16)
VLKERN_DTYPE(fp16)

Slots slots_of(Tensor& cache, std::optional<Tensor>& scale, const Tensor& x) {
  VLKERN_CHECK(cache.dim() == 4 && cache.is_contiguous() && cache.size(1) > 0 && cache.size(2) == x.size(1) &&
                   cache.size(3) == x.size(2),
               "a cache must be contiguous, [B, S, ", x.size(1), ", ", x.size(2), "]");
  const bool coded = cache.scalar_type() == ScalarType::Char;
  VLKERN_CHECK(coded || cache.scalar_type() == x.scalar_type(),
               "a cache must have the dtype of q or be int8");
  VLKERN_CHECK(coded == scale.has_value(), "int8 caches, and no others, have scales");
  if (coded)
    VLKERN_CHECK(scale->scalar_type() == ScalarType::Float && scale->is_contiguous() &&
                     scale->numel() * cache.size(3) == cache.numel(),
                 "scales must be contiguous float32 [B, S, K]");
  return {cache.mutable_data_ptr(), coded ? scale->mutable_data_ptr<float>() : nullptr, x.size(1), x.size(2)};
}

constexpr int64_t kGrain = 64;  // heads that a thread takes at a time, at least

Tensor rope_append(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& cos, const Tensor& sin,
                   const Tensor& rows, const Tensor& positions, Tensor k_cache, Tensor v_cache,
                   const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                   std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, double eps, double offset) {
  check_angles(q_, cos, sin);
  check_angles(k_, cos, sin);
  VLKERN_CHECK(v_.dim() == 3 && v_.size(0) == q_.size(0) && v_.size(1) == k_.size(1), "v must match k");
  VLKERN_CHECK(q_.scalar_type() == k_.scalar_type() && q_.scalar_type() == v_.scalar_type(),
               "q, k and v must have one dtype");
  Tensor q = unit_channels(q_), k = unit_channels(k_), v = unit_channels(v_);
  const Slots keys = slots_of(k_cache, k_scale, k), values = slots_of(v_cache, v_scale, v);
  VLKERN_CHECK(k_cache.size(0) == v_cache.size(0) && k_cache.size(1) == v_cache.size(1),
               "the caches must have the same rows and slots");
  const Places places(rows, positions, q.size(0), k_cache.size(0), k_cache.size(1));
  const Angles angles(cos, sin);
  const std::vector<float> q_w = shifted(q_weight, q.size(2), offset),
                           k_w = shifted(k_weight, k.size(2), offset);
  Tensor out = empty(q, shape_of(q), q.scalar_type());
  dispatch(q.scalar_type(), [&]<class T>() {
    const Call<T> c{StridedHeads<T>(q),
                    StridedHeads<T>(k),
                    StridedHeads<T>(v),
                    angles,
                    q_weight ? q_w.data() : nullptr,
                    k_weight ? k_w.data() : nullptr,
                    float(eps),
                    places,
                    keys,
                    values,
                    out.mutable_data_ptr<T>()};
    torch::stable::parallel_for(0, q.size(0) * c.tasks(), kGrain,
                                [&](int64_t begin, int64_t end) { run(c, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("rope_append.cpu", TORCH_BOX(&rope_append));
}

}  // namespace vlkern
