// The vocabulary's cross-entropy on the CPU, in fp32 through sgemm: chunks of tokens, within them blocks of
// classes.
//
//   Z_j = X_c W_j^T  ->  sums of each row     all blocks: lse     G_j = dL/dZ_j  ->  dW_j += G_j^T X_c,  dX_c
//   += G_j W_j
//
// bf16 and fp16 are widened block by block. bf16 runs on AMX tiles where the chip has them (cpu_amx.h).
#include "cpu.h"

#include <memory>

#include "arena.h"
#include "cpu_amx.h"
#include "sgemm.h"
#include "vlkern.h"

namespace vlkern {
namespace {

using linear_cross_entropy::Problem;
using linear_cross_entropy::Row;
using linear_cross_entropy::Sums;

// target_clones needs plain functions.
struct RowSums {
  float most, exps, total;
};
VLKERN_SIMD RowSums logits_row(float* z, const float* bias, int64_t n, float cap) {
  linear_cross_entropy::finish_logits(z, bias, n, cap);
  float most = linear_cross_entropy::largest(z, n);
  return {most, sum_of(n, [&](int64_t j) VLKERN_INLINE_LAMBDA { return exp_nonpositive(z[j] - most); }),
          sum_of(n, [&](int64_t j) VLKERN_INLINE_LAMBDA { return z[j]; })};
}
VLKERN_SIMD void capped_row(float* z, const float* bias, int64_t n, float cap) {
  linear_cross_entropy::finish_logits(z, bias, n, cap);
}
VLKERN_SIMD void slopes_row(float* z, int64_t n, const Row& row, float spread, float cap) {
  linear_cross_entropy::slopes(z, n, row, spread, cap);
}
VLKERN_SIMD void add_row(float* sum, const float* row, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sum[j] += row[j];
}
VLKERN_SIMD void scaled_row(const float* in, float* out, int64_t n, float factor) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = factor * in[j];
}

// The top 16 bits of an fp32 sum live in the bf16 result itself, the lower ones beside it: a sum over chunks
// needs two bytes of its own, not four, and loses nothing.
VLKERN_SIMD void join(const bf16* high, const uint16_t* low, float* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = std::bit_cast<float>(uint32_t(high[j].x) << 16 | low[j]);
}
VLKERN_SIMD void split(const float* in, bf16* high, uint16_t* low, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    uint32_t bits = std::bit_cast<uint32_t>(in[j]);
    high[j] = bf16(uint16_t(bits >> 16), bf16::from_bits());
    low[j] = uint16_t(bits);
  }
}

#define VLKERN_WIDEN(T)                                                           \
  VLKERN_SIMD void widen(const T* in, float* out, int64_t n) {                    \
    _Pragma("omp simd") for (int64_t j = 0; j < n; ++j) out[j] = to_float(in[j]); \
  }
VLKERN_WIDEN(float)
VLKERN_WIDEN(bf16)
VLKERN_WIDEN(fp16)

#define VLKERN_NARROW(T)                                                               \
  VLKERN_SIMD void narrow(const float* in, T* out, int64_t n) {                        \
    _Pragma("omp simd") for (int64_t j = 0; j < n; ++j) out[j] = from_float<T>(in[j]); \
  }
VLKERN_NARROW(float)
VLKERN_NARROW(bf16)

constexpr int64_t kRows = 512;  // tokens of a chunk, at most
constexpr int64_t kLogits = int64_t(1)
                            << 26;  // logits of a chunk, at most, that wait for their rows' lse: 256 MiB
constexpr int64_t kColumns = 512;   // classes of a block
constexpr int64_t kLanes = 16;      // that many threads find work; each lane has its own sum of dX

using Buffer = std::unique_ptr<float[]>;
Buffer buffer(int64_t n) {
  return std::make_unique_for_overwrite<float[]>(n);
}

template <class T>
class Sweep {
 public:
  // Gradients of fp16 leave its range before the caller's loss scale is applied.
  using Gradient = std::conditional_t<std::is_same_v<T, fp16>, float, T>;

  Sweep(const Problem& problem, const T* hidden, const T* weight, const int64_t* target, int64_t tokens)
      : p_(problem), d_(p_.channels), hidden_(hidden), weight_(weight), target_(target) {
    for (int64_t t = 0; t < tokens; ++t)
      if (target[t] >= 0) counted_.push_back(t);
    columns_ = std::clamp<int64_t>(round_up(ceil_div(p_.classes, 16), 32), 32, kColumns);
    blocks_ = ceil_div(p_.classes, columns_);
    lanes_ = std::min(blocks_, kLanes);
    rows_ = std::clamp<int64_t>(kLogits / p_.classes / 32 * 32, 32, kRows);
    int64_t count = int64_t(counted_.size());
    rows_ = ceil_div(count, std::max<int64_t>(1, ceil_div(count, rows_)));  // chunks of one size
  }

  // Asks for gradients; null pointers for those that are not wanted. share [tokens].
  void differentiate(const float* share, Gradient* d_hidden, Gradient* d_weight, float* d_bias) {
    share_ = share, d_hidden_ = d_hidden, d_weight_ = d_weight, d_bias_ = d_bias;
    gradient_ = true;
  }

  // Log sum exp, own logit and total of every token that counts are written (`known`: lse is given instead).
  void run(float* lse, float* own, float* total, const float* known) {
    if (counted_.empty()) return;
    x_ = buffer(rows_ * d_);
    bool waits = gradient_ && !known;  // for lse, with all the logits of a chunk
    std::optional<Arena> arena;
    float* logits = nullptr;
    if (waits)
      logits =
          arena.emplace(4 * rows_ * blocks_ * columns_ + 64).template take<float>(rows_ * blocks_ * columns_);
    if (d_hidden_) dx_ = buffer(lanes_ * rows_ * d_);
    if constexpr (std::is_same_v<T, bf16>)
      if (d_weight_ && int64_t(counted_.size()) > rows_)
        low_ = std::make_unique_for_overwrite<uint16_t[]>(p_.classes * d_);
    std::vector<Sums> sums(lanes_ * rows_);
    std::vector<Row> row;
    for (first_ = 0; first_ < int64_t(counted_.size()); first_ += rows_) {
      int64_t rows = std::min(rows_, int64_t(counted_.size()) - first_);
      for (int64_t r = 0; r < rows; ++r) widen(hidden_ + token(r) * d_, x_.get() + r * d_, d_);
      if (!known) {
        std::fill(sums.begin(), sums.end(), Sums());
        each_block([&](int64_t lane, int64_t b, float* scratch, float* w) {
          float* z = logits ? logits + b * rows_ * columns_ : scratch;
          multiply(z, rows, b, widened(b, w));
          take_sums(z, rows, b, sums.data() + lane * rows_);
        });
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t lane = 1; lane < lanes_; ++lane) sums[r] += sums[lane * rows_ + r];
          lse[token(r)] = sums[r].lse(), own[token(r)] = float(sums[r].own),
          total[token(r)] = float(sums[r].total);
        }
      }
      if (!gradient_) continue;
      row.clear();
      for (int64_t r = 0; r < rows; ++r)
        row.emplace_back(p_, (known ? known : lse)[token(r)], share_[token(r)]);
      each_block([&](int64_t lane, int64_t b, float* scratch, float* w) {
        float* z = logits ? logits + b * rows_ * columns_ : scratch;
        const float* w_b = d_hidden_ || !logits ? widened(b, w) : nullptr;
        if (!logits) {
          multiply(z, rows, b, w_b);
          for (int64_t r = 0; r < rows; ++r)
            capped_row(z + r * width(b), p_.bias ? p_.bias + b * columns_ : nullptr, width(b), p_.cap);
        }
        take_slopes(z, rows, b, row.data());
        gradients(z, rows, b, lane, w_b, w);
      });
      if (d_hidden_) finish_hidden(rows);
    }
  }

 private:
  const Problem& p_;
  int64_t d_;
  const T *hidden_, *weight_;
  const int64_t* target_;
  std::vector<int64_t> counted_;  // tokens that count: the others cost nothing
  int64_t rows_, columns_, blocks_, lanes_, first_ = 0;
  bool gradient_ = false;
  const float* share_ = nullptr;
  Gradient *d_hidden_ = nullptr, *d_weight_ = nullptr;
  float* d_bias_ = nullptr;
  Buffer x_;                         // of the chunk: X [rows, channels]
  Buffer dx_;                        // of each lane: dX [rows, channels]
  std::unique_ptr<uint16_t[]> low_;  // of dW in bf16: the lower halves of its sums

  int64_t token(int64_t r) const { return counted_[first_ + r]; }
  int64_t width(int64_t b) const { return std::min(columns_, p_.classes - b * columns_); }

  // f(lane, block, room for logits [rows, columns], room for weights [columns, channels]). A lane's blocks
  // follow one another on one thread, so no sum depends on the number of threads.
  template <class F>
  void each_block(F&& f) {
    torch::stable::parallel_for(0, lanes_, 1, [&](int64_t begin, int64_t end) {
      Buffer z = buffer(rows_ * columns_), w = buffer(columns_ * d_);
      for (int64_t lane = begin; lane < end; ++lane)
        for (int64_t b = lane * blocks_ / lanes_; b < (lane + 1) * blocks_ / lanes_; ++b)
          f(lane, b, z.get(), w.get());
    });
  }

  const float* widened(int64_t b, float* room) const {
    const T* w = weight_ + b * columns_ * d_;
    if constexpr (std::is_same_v<T, float>) return w;
    widen(w, room, width(b) * d_);
    return room;
  }

  void multiply(float* z, int64_t rows, int64_t b, const float* w) const {
    sgemm(rows, width(b), d_, p_.scale, {x_.get(), d_}, {w, d_, true}, 0.0f, z, width(b));
  }

  // Where the target's class lies in the block, or -1.
  int64_t place(int64_t r, int64_t b) const {
    int64_t j = target_[token(r)] - b * columns_;
    return j >= 0 && j < width(b) ? j : -1;
  }

  void take_sums(float* z, int64_t rows, int64_t b, Sums* sums) const {
    for (int64_t r = 0; r < rows; ++r, z += width(b)) {
      RowSums of_block = logits_row(z, p_.bias ? p_.bias + b * columns_ : nullptr, width(b), p_.cap);
      sums[r].add(of_block.most, of_block.exps);
      sums[r].total += of_block.total;
      if (int64_t j = place(r, b); j >= 0) sums[r].own = z[j];
    }
  }

  void take_slopes(float* z, int64_t rows, int64_t b, const Row* row) const {
    for (int64_t r = 0; r < rows; ++r, z += width(b)) {
      int64_t j = place(r, b);
      float t = p_.cap != 0 && j >= 0 ? z[j] / p_.cap : 0.0f;
      slopes_row(z, width(b), row[r], p_.spread, p_.cap);
      if (j >= 0) z[j] -= row[r].share * p_.hit * (1.0f - t * t);
    }
  }

  void gradients(const float* g, int64_t rows, int64_t b, int64_t lane, const float* w_b, float* room) {
    int64_t n = width(b), start = b * columns_;
    if (d_hidden_) {
      bool fresh = b == lane * blocks_ / lanes_;
      sgemm(rows, d_, n, p_.scale, {g, n}, {w_b, d_}, fresh ? 0.0f : 1.0f, dx_.get() + lane * rows_ * d_, d_);
    }
    if (d_weight_)
      weight_gradient(g, rows, n, d_weight_ + start * d_, low_ ? low_.get() + start * d_ : nullptr, room);
    if (d_bias_)
      for (int64_t r = 0; r < rows; ++r) add_row(d_bias_ + start, g + r * n, n);
  }

  void weight_gradient(const float* g, int64_t rows, int64_t n, Gradient* out, uint16_t* low,
                       float* room) const {
    bool fresh = first_ == 0, last = first_ + rows == int64_t(counted_.size());
    float* sum = room;
    if constexpr (std::is_same_v<Gradient, float>) sum = out;
    if constexpr (std::is_same_v<Gradient, bf16>)
      if (!fresh) join(out, low, sum, n * d_);
    sgemm(n, d_, rows, p_.scale, {g, n, true}, {x_.get(), d_}, fresh ? 0.0f : 1.0f, sum, d_);
    if constexpr (std::is_same_v<Gradient, bf16>)
      last ? narrow(sum, out, n * d_) : split(sum, out, low, n * d_);
  }

  // The lanes' sums, in their order.
  void finish_hidden(int64_t rows) {
    torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* sum = dx_.get() + r * d_;
        for (int64_t lane = 1; lane < lanes_; ++lane) add_row(sum, dx_.get() + (lane * rows_ + r) * d_, d_);
        narrow(sum, d_hidden_ + token(r) * d_, d_);
      }
    });
  }
};

struct Inputs {
  Tensor hidden, weight, target;
  std::vector<float> bias;
  Problem problem;
  int64_t tokens;
};

Inputs check(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
             const Tensor& target, std::optional<double> softcap, double scale) {
  VLKERN_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
               "hidden must be [T, D], weight [V, D]");
  VLKERN_CHECK(hidden.scalar_type() == weight.scalar_type(), "weight must have the dtype of hidden");
  VLKERN_CHECK(
      target.dim() == 1 && target.size(0) == hidden.size(0) && target.scalar_type() == ScalarType::Long,
      "target must be [T] int64");
  VLKERN_CHECK(weight.size(0) > 0 && weight.size(1) > 0, "weight must hold a class and a channel");
  Inputs in{torch::stable::contiguous(hidden),
            torch::stable::contiguous(weight),
            torch::stable::contiguous(target),
            {},
            {weight.size(0), weight.size(1), nullptr, float(scale), float(softcap.value_or(0)), 1, 0, 0},
            hidden.size(0)};
  if (bias) {
    VLKERN_CHECK(bias->numel() == weight.size(0) && bias->scalar_type() == ScalarType::Float,
                 "bias must be [V] float32");
    in.bias.resize(weight.size(0));
    Tensor b = torch::stable::contiguous(*bias);
    scaled_row(b.const_data_ptr<float>(), in.bias.data(), b.numel(), float(scale));
    in.problem.bias = in.bias.data();
  }
  return in;
}

// Sums and gradients of one sweep; those that are not asked for are empty.
struct Outputs {
  Tensor lse, own, total, d_hidden, d_weight, d_bias;
};

struct Terms {
  double smoothing;
  std::optional<int64_t> classes;  // by which smoothing is divided; without it, V
  double z_loss;
  bool of_hidden, of_weight;
};

Outputs run(Inputs& in, const Tensor* share_, const Terms& terms, const Tensor* known_) {
  Problem& p = in.problem;
  p.hit = float(1 - terms.smoothing), p.z_loss = float(terms.z_loss);
  p.spread = float(terms.smoothing / double(terms.classes.value_or(p.classes)));
  ScalarType dtype = in.hidden.scalar_type(),
             gradient = dtype == ScalarType::Half ? ScalarType::Float : dtype;
  const int64_t rows = known_ ? 0 : in.tokens;
  Outputs out;
  for (Tensor* t : {&out.lse, &out.own, &out.total}) *t = zeros(in.hidden, {rows}, ScalarType::Float);
  Tensor share, known;
  if (share_) {
    VLKERN_CHECK(share_->numel() == in.tokens && share_->scalar_type() == ScalarType::Float,
                 "share must be [T] float32");
    share = torch::stable::contiguous(*share_);
    bool counts = false;
    for (int64_t t = 0; t < in.tokens; ++t) counts |= in.target.const_data_ptr<int64_t>()[t] >= 0;
    out.d_hidden = zeros(in.hidden, {terms.of_hidden ? in.tokens : 0, p.channels}, gradient);
    // Every block of dW is written by the first chunk, if there is one.
    out.d_weight =
        (counts ? empty : zeros)(in.hidden, {terms.of_weight ? p.classes : 0, p.channels}, gradient);
    out.d_bias = zeros(in.hidden, {p.bias ? p.classes : 0}, ScalarType::Float);
  }
  if (known_) {
    VLKERN_CHECK(known_->numel() == in.tokens && known_->scalar_type() == ScalarType::Float,
                 "lse must be [T] float32");
    known = torch::stable::contiguous(*known_);
  }
  dispatch(dtype, [&]<class T>() {
    using Gradient = typename Sweep<T>::Gradient;
    auto go = [&](auto&& sweep) {
      if (share_)
        sweep.differentiate(share.const_data_ptr<float>(),
                            terms.of_hidden ? out.d_hidden.mutable_data_ptr<Gradient>() : nullptr,
                            terms.of_weight ? out.d_weight.mutable_data_ptr<Gradient>() : nullptr,
                            p.bias ? out.d_bias.mutable_data_ptr<float>() : nullptr);
      sweep.run(out.lse.mutable_data_ptr<float>(), out.own.mutable_data_ptr<float>(),
                out.total.mutable_data_ptr<float>(), known_ ? known.const_data_ptr<float>() : nullptr);
    };
    const T *hidden = in.hidden.const_data_ptr<T>(), *weight = in.weight.const_data_ptr<T>();
    const int64_t* target = in.target.const_data_ptr<int64_t>();
#if defined(VLKERN_AMX) && !defined(VLKERN_PORTABLE)
    if constexpr (std::is_same_v<T, bf16>)
      if (!p.bias && amx::available())
        return go(linear_cross_entropy::TileSweep(p, hidden, weight, target, in.tokens));
#endif
    go(Sweep<T>(p, hidden, weight, target, in.tokens));
  });
  if (share_ && p.bias)
    scaled_row(out.d_bias.const_data_ptr<float>(), out.d_bias.mutable_data_ptr<float>(), p.classes, p.scale);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sums(const Tensor& hidden, const Tensor& weight,
                                        const std::optional<Tensor>& bias, const Tensor& target,
                                        std::optional<double> softcap, double scale) {
  Inputs in = check(hidden, weight, bias, target, softcap, scale);
  Outputs o = run(in, nullptr, {0, {}, 0, false, false}, nullptr);
  return {o.lse, o.own, o.total};
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& hidden, const Tensor& weight,
                                             const std::optional<Tensor>& bias, const Tensor& target,
                                             const Tensor& share, const Tensor& lse,
                                             std::optional<double> softcap, double scale, double smoothing,
                                             std::optional<int64_t> classes, double z_loss, bool of_hidden,
                                             bool of_weight) {
  Inputs in = check(hidden, weight, bias, target, softcap, scale);
  Outputs o = run(in, &share, {smoothing, classes, z_loss, of_hidden, of_weight}, &lse);
  return {o.d_hidden, o.d_weight, o.d_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sweep(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
    const Tensor& share, std::optional<double> softcap, double scale, double smoothing,
    std::optional<int64_t> classes, double z_loss, bool of_hidden, bool of_weight) {
  Inputs in = check(hidden, weight, bias, target, softcap, scale);
  Outputs o = run(in, &share, {smoothing, classes, z_loss, of_hidden, of_weight}, nullptr);
  return {o.lse, o.own, o.total, o.d_hidden, o.d_weight, o.d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("linear_cross_entropy.cpu", TORCH_BOX(&sums));
  m.impl("linear_cross_entropy_grad.cpu", TORCH_BOX(&gradients));
  m.impl("linear_cross_entropy_sweep.cpu", TORCH_BOX(&sweep));
}

}  // namespace vlkern
