// The bf16 sweep on AMX tiles. Operands are packed once; G = dL/dlogits exists only as one chunk of rows, in
// bf16, in the two tile orders in which the gradient matmuls read it. Each 32 x 32 block of logits goes from
// the tile registers through the loss and back into tiles without leaving L1.
#pragma once

#include <atomic>

#include "amx.h"
#include "arena.h"
#include "cpu.h"
#include "vlkern.h"

#ifdef VLKERN_AMX

namespace vlkern::sigmoid_loss {

class AmxSweep {
 public:
  AmxSweep(const Problem& problem, const bf16* image, const bf16* text)
      : p_(problem),
        n_(round_up(p_.n, 32)),
        d_(round_up(p_.d, 32)),
        n_k_(round_up(n_, 32 * kDepth)),
        d_k_(round_up(d_, 32 * kDepth)),
        rows_(std::min(kRows, round_up(p_.m, 32 * kDepth))),
        columns_(std::clamp<int64_t>(round_up(ceil_div(n_, 16), 32), 32, kColumns)),
        strip_(std::clamp<int64_t>(round_up(ceil_div(std::min(p_.m, rows_), 4), 32), 32, kStrip)),
        x_{image, p_.m, p_.d, p_.d},
        y_{text, p_.n, p_.d, p_.d},
        arena_(bytes()) {
    x_a_ = arena_.take<bf16>(rows_ * d_k_);
    yt_b_ = arena_.take<bf16>(n_ * d_k_);
    if (p_.grad) {
      x_t_a_ = arena_.take<bf16>(rows_ * d_);
      y_b_ = arena_.take<bf16>(n_k_ * d_);
      g_a_ = arena_.take<bf16>(rows_ * n_k_);
      dyt_ = arena_.take<float>(n_ * d_);
    }
    scratch_ = arena_.take<char>(torch::stable::get_num_threads() * scratch_bytes());
    for_each(n_ / 32, [&](int64_t b, char*) { pack_text_rows(b); });
  }

  // Adds loss, d_scale and d_bias over all pairs; fills d_image [m, d] and d_text [n, d] if gradients are
  // wanted.
  Sums run(bf16* d_image, bf16* d_text) {
    int64_t tasks = ceil_div(n_, columns_);
    std::vector<Sums> parts(tasks);
    for (int64_t first = 0; first < p_.m; first += rows_) {
      int64_t rows = std::min(rows_, p_.m - first);
      for_each(ceil_div(rows, 32), [&](int64_t b, char*) { pack_image_rows(first, b); });
      for_each(tasks, [&](int64_t t, char* scratch) {
        parts[t] += columns(first, rows, t * columns_, reinterpret_cast<bf16*>(scratch));
      });
      if (p_.grad) {
        int64_t across = ceil_div(d_, kChannels), down = ceil_div(rows, strip_);
        for_each(across * down, [&](int64_t t, char* scratch) {
          image_gradient(first, rows, t / across * strip_, t % across * kChannels,
                         reinterpret_cast<float*>(scratch), d_image);
        });
      }
    }
    if (p_.grad) for_each(n_ / 32, [&](int64_t b, char*) { text_gradient_rows(b, d_text); });
    Sums total;
    for (const Sums& part : parts) total += part;
    return total;
  }

 private:
  // Sizes for 2 MiB of L2 and 48 KiB of L1 per core. Bytes from L3 per FLOP are 1 / kColumns + 2.5 / kRows in
  // columns() and (1 / kStrip + 1 / kChannels) in image_gradient(): 10 GB/s a core at 2.2 TFLOP/s.
  static constexpr int64_t kRows = 1024;    // rows of a chunk; its G is [1024, n] bf16
  static constexpr int64_t kColumns = 512;  // columns of a task, at most: small batches are cut into 16 tasks
  static constexpr int64_t kStrip =
      512;  // rows whose X tiles stay in L2, at most: a chunk is cut into 4 tasks
  static constexpr int64_t kChannels = 384;  // channels whose tiles or accumulators stay in L2
  static constexpr int64_t kDepth =
      8;  // k tiles per visit of an accumulator: 16 KiB of each operand, B stays in L1

  const Problem& p_;
  int64_t n_, d_;      // padded to whole 32 x 32 blocks
  int64_t n_k_, d_k_;  // as the inner dimension of a product: padded to whole passes
  int64_t rows_, columns_, strip_;
  amx::Source x_, y_;
  Arena arena_;
  bf16 *x_a_, *x_t_a_,
      *g_a_;           // of the chunk: X [rows, d] and X^T [d, rows] as A tiles, G [rows, n] as A tiles
  bf16 *yt_b_, *y_b_;  // Y^T [d, n] and Y [n, d] as B tiles
  float* dyt_;         // dY^T: 32 x 32 blocks, [n / 32][d / 32]
  char* scratch_;      // of each thread: G of a task as B tiles, or the accumulators of dX

  int64_t bytes() const {
    int64_t forward = 2 * d_k_ * (rows_ + n_),
            backward = 2 * d_ * (rows_ + n_k_) + 2 * rows_ * n_k_ + 4 * n_ * d_;
    return forward + (p_.grad ? backward : 0) + torch::stable::get_num_threads() * scratch_bytes();
  }
  int64_t scratch_bytes() const {
    return p_.grad ? std::max(2 * rows_ * columns_, 4 * strip_ * kChannels) : 0;
  }
  // Packed order is [k / kDepth][panel][kDepth tiles]: what one pass over k reads is contiguous. With whole
  // panels one after the other, panels lie a power of two apart for common batch sizes and evict one another
  // from L2.
  static bf16* tile(bf16* packed, int64_t panels, int64_t panel, int64_t k) {
    return packed + ((k / kDepth * panels + panel) * kDepth + k % kDepth) * amx::kTile;
  }
  // f(task, scratch of the thread) for every task.
  template <class F>
  void for_each(int64_t tasks, F&& f) {
    std::atomic<int64_t> slots = 0;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      char* scratch = scratch_ + slots++ * scratch_bytes();
      for (int64_t t = begin; t < end; ++t) f(t, scratch);
    });
  }

  VLKERN_AMX_TARGET void pack_text_rows(int64_t b) {
    for (int64_t k = 0; k < d_ / 32; ++k)
      for (int64_t h = 0; h < 2; ++h) {
        amx::pack_b_transposed(y_, 32 * b + 16 * h, 32 * k, tile(yt_b_, n_ / 16, 2 * b + h, k));
        if (p_.grad) amx::pack_b(y_, 32 * b, 32 * k + 16 * h, tile(y_b_, d_ / 16, 2 * k + h, b));
      }
  }
  VLKERN_AMX_TARGET void pack_image_rows(int64_t first, int64_t b) {
    for (int64_t k = 0; k < d_ / 32; ++k)
      for (int64_t h = 0; h < 2; ++h) {
        amx::pack_a(x_, first + 32 * b + 16 * h, 32 * k, tile(x_a_, rows_ / 16, 2 * b + h, k));
        if (p_.grad)
          amx::pack_a_transposed(x_, first + 32 * b, 32 * k + 16 * h, tile(x_t_a_, d_ / 16, 2 * k + h, b));
      }
  }

  // A 32 x 32 block of C: C = A B over k tiles [k, min(k + kDepth, k_stop)), plus the old C unless it is
  // fresh. a and b are the first of two neighbouring tile panels.
  VLKERN_AMX_TARGET static void step(float* c, const bf16* a, const bf16* b, int64_t k, int64_t k_stop,
                                     bool fresh) {
    constexpr int64_t kPanel = kDepth * amx::kTile;
    fresh ? amx::zero_block() : amx::load_block(c, 32);
    amx::multiply_block(a, kPanel, b, kPanel, std::min(kDepth, k_stop - k));
    amx::store_block(c, 32);
  }

  // Logits, loss and G of rows x columns_ columns, then dY^T [d, columns] += X^T G.
  VLKERN_AMX_TARGET Sums columns(int64_t first, int64_t rows, int64_t column, bf16* g_b) {
    amx::Tiles registers;
    int64_t row_blocks = ceil_div(rows, 32), stop = std::min(column + columns_, n_);
    Sums sums;
    for (int64_t b = 0; b < row_blocks; b += kStrip / 32)
      for (int64_t j = column; j < stop; j += 32)
        sums += strip(first, b, std::min(b + kStrip / 32, row_blocks), j, g_b + (j - column) * rows_);
    if (!p_.grad) return sums;
    for (int64_t i = 0; i < d_; i += kChannels)
      for (int64_t j = column; j < stop; j += 32)
        for (int64_t k = 0; k < row_blocks; k += kDepth)
          for (int64_t c = i; c < std::min(i + kChannels, d_); c += 32) {
            float* sum = dyt_ + j * d_ + 32 * c;
            for (int64_t line = 0; line < 1024; line += 16) _mm_prefetch(sum + 1024 + line, _MM_HINT_T0);
            step(sum, tile(x_t_a_, d_ / 16, c / 16, k), tile(g_b + (j - column) * rows_, 2, 0, k), k,
                 row_blocks, first == 0 && k == 0);
          }
    return sums;
  }

  // Row blocks [begin, end) x 32 columns: logits in L1-sized steps, loss, and G rounded into its two tile
  // orders.
  VLKERN_AMX_TARGET Sums strip(int64_t first, int64_t begin, int64_t end, int64_t j, bf16* g_b) {
    alignas(64) float blocks[kStrip * 32], sign[1024], keep[1024];
    Sums sums;
    int64_t k_tiles = d_ / 32;
    for (int64_t k = 0; k < k_tiles; k += kDepth)
      for (int64_t b = begin; b < end; ++b) {
        float* block = blocks + 1024 * (b - begin);
        step(block, tile(x_a_, rows_ / 16, 2 * b, k), tile(yt_b_, n_ / 16, j / 16, k), k, k_tiles, k == 0);
        if (k + kDepth < k_tiles) continue;
        sums += p_.labels(first + 32 * b, 32, j, 32, sign, keep)
                    ? all_pairs<true>(block, sign, keep, 1024, p_.scale, p_.bias)
                    : all_pairs<false>(block, nullptr, nullptr, 1024, p_.scale, p_.bias);
        if (p_.grad)
          amx::round_block(block, tile(g_a_, rows_ / 16, 2 * b, j / 32),
                           tile(g_a_, rows_ / 16, 2 * b + 1, j / 32), tile(g_b, 2, 0, b), tile(g_b, 2, 1, b));
      }
    return sums;
  }

  // dX = G Y for strip_ rows x kChannels channels; sum: 32 x 32 blocks, [channels / 32][rows / 32].
  VLKERN_AMX_TARGET void image_gradient(int64_t first, int64_t rows, int64_t row, int64_t channel, float* sum,
                                        bf16* d_image) {
    amx::Tiles registers;
    auto block = [&](int64_t r, int64_t c) {
      return sum + ((c - channel) / 32 * (strip_ / 32) + (r - row) / 32) * 1024;
    };
    int64_t row_stop = std::min(row + strip_, rows), channel_stop = std::min(channel + kChannels, d_),
            k_tiles = n_ / 32;
    for (int64_t k = 0; k < k_tiles; k += kDepth)
      for (int64_t c = channel; c < channel_stop; c += 32)
        for (int64_t r = row; r < row_stop; r += 32)
          step(block(r, c), tile(g_a_, rows_ / 16, r / 16, k), tile(y_b_, d_ / 16, c / 16, k), k, k_tiles,
               k == 0);
    float factor = p_.scale * p_.weight;
    for (int64_t r = row; r < row_stop; ++r)
      for (int64_t c = channel; c < std::min(channel_stop, p_.d); c += 32) {
        const float* source = block(r, c) + (r - row) % 32 * 32;
        bf16* target = d_image + (first + r) * p_.d + c;
        for (int64_t i = 0; i < std::min<int64_t>(32, p_.d - c); ++i)
          target[i] = from_float<bf16>(factor * source[i]);
      }
  }

  // dY [n, d], 32 rows, from the blocks of dY^T.
  VLKERN_AMX_TARGET void text_gradient_rows(int64_t b, bf16* d_text) {
    __m512 factor = _mm512_set1_ps(p_.scale * p_.weight);
    for (int64_t c = 0; c < p_.d; c += 16)
      for (int64_t h = 0; h < 2; ++h) {
        const float* block = dyt_ + (b * d_ + c / 32 * 32) * 32 + c % 32 * 32 + 16 * h;
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(block + 32 * i);
        amx::transpose(r);
        int64_t rows = std::min<int64_t>(16, p_.n - (32 * b + 16 * h)),
                width = std::min<int64_t>(16, p_.d - c);
        for (int64_t i = 0; i < rows; ++i) {
          __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(factor, (__m512)r[i]));
          _mm256_mask_storeu_epi16(d_text + (32 * b + 16 * h + i) * p_.d + c, __mmask16((1u << width) - 1),
                                   rounded);
        }
      }
  }
};

}  // namespace vlkern::sigmoid_loss

#endif
