// bf16 on AMX tiles (csrc/amx_sweep.h): X are the classes, Y the tokens that count. Two sweeps, one for each
// token's lse and one for the gradients given lse: logits twice, four matmuls, but never in memory, and each
// row of dW finished at once. At 2 TFLOP/s a core computing a logit again (1280 FLOPs at D = 640) costs less
// than writing and reading it.
#pragma once

#include <vector>

#include "amx_sweep.h"
#include "cpu.h"

#ifdef VLKERN_AMX

namespace vlkern::linear_cross_entropy {

struct Nothing {
  void operator+=(const Nothing&) {}
};

// Products to logits, 32 tokens to a row.
VLKERN_INLINE void scaled_logits(float* block, int64_t rows, const Problem& p) {
#pragma omp simd
  for (int64_t k = 0; k < 32 * rows; ++k) block[k] *= p.scale;
  finish_logits(block, nullptr, 32 * rows, p.cap);
}

// What is known of each token, in arrays that are padded to whole blocks.
struct Tokens {
  std::vector<int64_t> target;
  std::vector<float> most, own, lse, at, even;
  std::vector<double> exps, total;

  explicit Tokens(int64_t n)
      : target(n, -1),
        most(n, -std::numeric_limits<float>::max()),
        own(n),
        lse(n),
        at(n),
        even(n),
        exps(n),
        total(n) {}
};

struct BlockSums {
  using Sums = Nothing;
  const Problem& p;
  Tokens& tokens;

  VLKERN_INLINE Nothing operator()(float* z, int64_t i, int64_t j) const {
    int64_t rows = std::min<int64_t>(32, p.classes - i);
    scaled_logits(z, rows, p);
    float top[32], exps[32] = {}, total[32] = {}, *most = tokens.most.data() + j;
    for (int c = 0; c < 32; ++c) top[c] = most[c];
    for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
      for (int c = 0; c < 32; ++c) top[c] = z[32 * r + c] > top[c] ? z[32 * r + c] : top[c];
    for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
      for (int c = 0; c < 32; ++c) {
        exps[c] += exp_nonpositive(z[32 * r + c] - top[c]);
        total[c] += z[32 * r + c];
      }
    for (int c = 0; c < 32; ++c) {
      double& sum = tokens.exps[j + c];
      sum = sum * exp_nonpositive(most[c] - top[c]) + exps[c];
      most[c] = top[c];
      tokens.total[j + c] += total[c];
      int64_t r = tokens.target[j + c] - i;
      if (r >= 0 && r < rows) tokens.own[j + c] = z[32 * r + c];
    }
    return {};
  }
};

struct BlockSlopes {
  using Sums = Nothing;
  const Problem& p;
  const Tokens& tokens;
  const float* share;  // padded, too

  VLKERN_INLINE Nothing operator()(float* z, int64_t i, int64_t j) const {
    int64_t rows = std::min<int64_t>(32, p.classes - i);
    scaled_logits(z, rows, p);
    float inverse = p.cap != 0 ? 1.0f / p.cap : 0.0f;
    float hits[32];
    for (int c = 0; c < 32; ++c) {
      int64_t r = tokens.target[j + c] - i;
      float t = r >= 0 && r < rows ? z[32 * r + c] * inverse : 0.0f;
      hits[c] = share[j + c] * p.hit * (1.0f - t * t);
    }
    const float *lse = tokens.lse.data() + j, *at = tokens.at.data() + j, *even = tokens.even.data() + j;
    for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
      for (int c = 0; c < 32; ++c) {
        float x = z[32 * r + c] - lse[c], e = exp_nonpositive(x), t = z[32 * r + c] * inverse;
        z[32 * r + c] = (at[c] * (x < -87.0f ? 0.0f : e) - even[c]) * (1.0f - t * t);
      }
    for (int64_t k = 32 * rows; k < 1024; ++k) z[k] = 0;
    for (int c = 0; c < 32; ++c) {
      int64_t r = tokens.target[j + c] - i;
      if (r >= 0 && r < rows) z[32 * r + c] -= hits[c];
    }
    return {};
  }
};

// The same interface as Sweep<T> in cpu.cpp. Without a bias, whose gradient is a sum across the columns of a
// block.
class TileSweep {
 public:
  TileSweep(const Problem& problem, const bf16* hidden, const bf16* weight, const int64_t* target,
            int64_t tokens)
      : p_(problem), weight_{weight, p_.classes, p_.channels, p_.channels} {
    for (int64_t t = 0; t < tokens; ++t)
      if (target[t] >= 0) counted_.push_back(t);
    x_.resize(counted_.size() * p_.channels);
    for (size_t t = 0; t < counted_.size(); ++t)
      std::copy_n(hidden + counted_[t] * p_.channels, p_.channels, x_.data() + t * p_.channels);
    target_ = target;
  }

  void differentiate(const float* share, bf16* d_hidden, bf16* d_weight, float*) {
    share_ = share, d_hidden_ = d_hidden, d_weight_ = d_weight;
  }

  void run(float* lse, float* own, float* total, const float* known) {
    const int64_t n = int64_t(counted_.size()), d = p_.channels;
    if (n == 0) return;
    Tokens tokens(round_up(n, 32));
    for (int64_t t = 0; t < n; ++t) tokens.target[t] = target_[counted_[t]];
    const amx::Source hidden{x_.data(), n, d, d};
    if (!known) {
      BlockSums epilogue{p_, tokens};
      amx::Sweep(epilogue, weight_, hidden, {false, false, 1.0f}).run(nullptr, nullptr);
      for (int64_t t = 0; t < n; ++t) {
        lse[counted_[t]] = float(tokens.most[t] + std::log(tokens.exps[t]));
        own[counted_[t]] = tokens.own[t], total[counted_[t]] = float(tokens.total[t]);
      }
    }
    if (!share_) return;
    std::vector<float> share(tokens.target.size());
    for (int64_t t = 0; t < n; ++t) {
      Row row(p_, (known ? known : lse)[counted_[t]], share_[counted_[t]]);
      tokens.lse[t] = row.lse, tokens.at[t] = row.at, tokens.even[t] = row.share * p_.spread,
      share[t] = row.share;
    }
    std::vector<bf16> dx(d_hidden_ ? n * d : 0);
    BlockSlopes epilogue{p_, tokens, share.data()};
    amx::Sweep(epilogue, weight_, hidden, {d_weight_ != nullptr, d_hidden_ != nullptr, p_.scale})
        .run(d_weight_, dx.data());
    if (d_hidden_)
      for (int64_t t = 0; t < n; ++t) std::copy_n(dx.data() + t * d, d, d_hidden_ + counted_[t] * d);
  }

 private:
  const Problem& p_;
  amx::Source weight_;
  const int64_t* target_;
  std::vector<int64_t> counted_;
  std::vector<bf16> x_;
  const float* share_ = nullptr;
  bf16 *d_hidden_ = nullptr, *d_weight_ = nullptr;
};

}  // namespace vlkern::linear_cross_entropy

#endif
