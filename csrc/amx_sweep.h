// Products of all pairs on AMX tiles: S = X Y^T in 32 x 32 blocks, an epilogue that turns each block into G,
// and the gradients dX = G Y, dY = G^T X. Operands are packed once; G exists only as one chunk of X's rows,
// in bf16, in the two tile orders in which the gradient matmuls read it. A block goes from the tile registers
// through the epilogue and back into tiles without leaving L1.
#pragma once

#include <atomic>

#include "amx.h"
#include "arena.h"
#include "vlkern.h"

#ifdef VLKERN_AMX

namespace vlkern::amx {

// What a sweep computes besides calling its epilogue.
struct Gradients {
  bool of_x, of_y;
  float factor;  // dX = factor G Y, dY = factor G^T X
};

// An epilogue has a type Sums (with += ; added up over all blocks) and
//   Sums operator()(float* block, int64_t i, int64_t j)
// for rows i.. of X and rows j.. of Y: products in, G out, 32 x 32, which must be 0 for rows beyond the
// edges. Blocks with the same j are visited by one thread at a time, in the order of i.
template <class Epilogue>
class Sweep {
 public:
  using Sums = typename Epilogue::Sums;

  Sweep(Epilogue& epilogue, Source x, Source y, Gradients gradients)
      : epilogue_(epilogue),
        gradients_(gradients),
        x_(x),
        y_(y),
        n_(round_up(y.rows, 32)),
        d_(round_up(x.columns, 32)),
        n_k_(round_up(n_, 32 * kDepth)),
        d_k_(round_up(d_, 32 * kDepth)),
        rows_(std::min(kRows, round_up(x.rows, 32 * kDepth))),
        columns_(std::clamp<int64_t>(round_up(ceil_div(n_, 16), 32), 32, kColumns)),
        strip_(std::clamp<int64_t>(round_up(ceil_div(std::min(x.rows, rows_), 4), 32), 32, kStrip)),
        arena_(bytes()) {
    x_a_ = arena_.take<bf16>(rows_ * d_k_);
    yt_b_ = arena_.take<bf16>(n_ * d_k_);
    if (gradients_.of_x) y_b_ = arena_.take<bf16>(n_k_ * d_), g_a_ = arena_.take<bf16>(rows_ * n_k_);
    if (gradients_.of_y) x_t_a_ = arena_.take<bf16>(rows_ * d_), dyt_ = arena_.take<float>(n_ * d_);
    scratch_ = arena_.take<char>(torch::stable::get_num_threads() * scratch_bytes());
    for_each(n_ / 32, [&](int64_t b, char*) { pack_y(b); });
  }

  // The epilogue's sums over all blocks; fills those of dx [rows of X, d] and dy [rows of Y, d] that are
  // wanted.
  Sums run(bf16* dx, bf16* dy) {
    int64_t tasks = ceil_div(n_, columns_);
    std::vector<Sums> parts(tasks);
    for (int64_t first = 0; first < x_.rows; first += rows_) {
      int64_t rows = std::min(rows_, x_.rows - first);
      for_each(ceil_div(rows, 32), [&](int64_t b, char*) { pack_x(first, b); });
      for_each(tasks, [&](int64_t t, char* scratch) {
        parts[t] += columns(first, rows, t * columns_, reinterpret_cast<bf16*>(scratch));
      });
      if (gradients_.of_x) {
        int64_t across = ceil_div(d_, kChannels), down = ceil_div(rows, strip_);
        for_each(across * down, [&](int64_t t, char* scratch) {
          gradient_of_x(first, rows, t / across * strip_, t % across * kChannels,
                        reinterpret_cast<float*>(scratch), dx);
        });
      }
    }
    if (gradients_.of_y) for_each(n_ / 32, [&](int64_t b, char*) { gradient_of_y(b, dy); });
    Sums total;
    for (const Sums& part : parts) total += part;
    return total;
  }

 private:
  // Sizes for 2 MiB of L2 and 48 KiB of L1 per core. Bytes from L3 per FLOP are 1 / kColumns + 2.5 / kRows in
  // columns() and (1 / kStrip + 1 / kChannels) in gradient_of_x(): 10 GB/s a core at 2.2 TFLOP/s.
  static constexpr int64_t kRows = 1024;    // rows of a chunk; its G is [1024, n] bf16
  static constexpr int64_t kColumns = 512;  // columns of a task, at most: small batches are cut into 16 tasks
  static constexpr int64_t kStrip =
      512;  // rows whose X tiles stay in L2, at most: a chunk is cut into 4 tasks
  static constexpr int64_t kChannels = 384;  // channels whose tiles or accumulators stay in L2
  static constexpr int64_t kDepth =
      8;  // k tiles per visit of an accumulator: 16 KiB of each operand, B stays in L1

  Epilogue& epilogue_;
  const Gradients gradients_;
  Source x_, y_;
  int64_t n_, d_;      // padded to whole 32 x 32 blocks
  int64_t n_k_, d_k_;  // as the inner dimension of a product: padded to whole passes
  int64_t rows_, columns_, strip_;
  Arena arena_;
  bf16 *x_a_, *x_t_a_,
      *g_a_;           // of the chunk: X [rows, d] and X^T [d, rows] as A tiles, G [rows, n] as A tiles
  bf16 *yt_b_, *y_b_;  // Y^T [d, n] and Y [n, d] as B tiles
  float* dyt_;         // dY^T: 32 x 32 blocks, [n / 32][d / 32]
  char* scratch_;      // of each thread: G of a task as B tiles, or the accumulators of dX

  int64_t bytes() const {
    int64_t forward = 2 * d_k_ * (rows_ + n_), of_x = 2 * n_k_ * (d_ + rows_),
            of_y = d_ * (2 * rows_ + 4 * n_);
    return forward + gradients_.of_x * of_x + gradients_.of_y * of_y +
           torch::stable::get_num_threads() * scratch_bytes();
  }
  int64_t scratch_bytes() const {
    return std::max(gradients_.of_y * 2 * rows_ * columns_, gradients_.of_x * 4 * strip_ * kChannels);
  }
  // Packed order is [k / kDepth][panel][kDepth tiles]: what one pass over k reads is contiguous. With whole
  // panels one after the other, panels lie a power of two apart for common batch sizes and evict one another
  // from L2.
  static bf16* tile(bf16* packed, int64_t panels, int64_t panel, int64_t k) {
    return packed + ((k / kDepth * panels + panel) * kDepth + k % kDepth) * kTile;
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

  VLKERN_AMX_TARGET void pack_y(int64_t b) {
    for (int64_t k = 0; k < d_ / 32; ++k)
      for (int64_t h = 0; h < 2; ++h) {
        pack_b_transposed(y_, 32 * b + 16 * h, 32 * k, tile(yt_b_, n_ / 16, 2 * b + h, k));
        if (gradients_.of_x) pack_b(y_, 32 * b, 32 * k + 16 * h, tile(y_b_, d_ / 16, 2 * k + h, b));
      }
  }
  VLKERN_AMX_TARGET void pack_x(int64_t first, int64_t b) {
    for (int64_t k = 0; k < d_ / 32; ++k)
      for (int64_t h = 0; h < 2; ++h) {
        pack_a(x_, first + 32 * b + 16 * h, 32 * k, tile(x_a_, rows_ / 16, 2 * b + h, k));
        if (gradients_.of_y)
          pack_a_transposed(x_, first + 32 * b, 32 * k + 16 * h, tile(x_t_a_, d_ / 16, 2 * k + h, b));
      }
  }

  // A 32 x 32 block of C: C = A B over k tiles [k, min(k + kDepth, k_stop)), plus the old C unless it is
  // fresh. a and b are the first of two neighbouring tile panels.
  VLKERN_AMX_TARGET static void step(float* c, const bf16* a, const bf16* b, int64_t k, int64_t k_stop,
                                     bool fresh) {
    constexpr int64_t kPanel = kDepth * kTile;
    fresh ? zero_block() : load_block(c, 32);
    multiply_block(a, kPanel, b, kPanel, std::min(kDepth, k_stop - k));
    store_block(c, 32);
  }

  // Products, epilogue and G of rows x columns_ columns, then dY^T [d, columns] += X^T G.
  VLKERN_AMX_TARGET Sums columns(int64_t first, int64_t rows, int64_t column, bf16* g_b) {
    Tiles registers;
    int64_t row_blocks = ceil_div(rows, 32), stop = std::min(column + columns_, n_);
    Sums sums;
    for (int64_t b = 0; b < row_blocks; b += kStrip / 32)
      for (int64_t j = column; j < stop; j += 32)
        sums += strip(first, b, std::min(b + kStrip / 32, row_blocks), j, g_b + (j - column) * rows_);
    if (!gradients_.of_y) return sums;
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

  // Row blocks [begin, end) x 32 columns: products in L1-sized steps, epilogue, and G rounded into those tile
  // orders that are read.
  VLKERN_AMX_TARGET Sums strip(int64_t first, int64_t begin, int64_t end, int64_t j, bf16* g_b) {
    alignas(64) float blocks[kStrip * 32];
    Sums sums;
    int64_t k_tiles = d_ / 32;
    for (int64_t k = 0; k < k_tiles; k += kDepth)
      for (int64_t b = begin; b < end; ++b) {
        float* block = blocks + 1024 * (b - begin);
        step(block, tile(x_a_, rows_ / 16, 2 * b, k), tile(yt_b_, n_ / 16, j / 16, k), k, k_tiles, k == 0);
        if (k + kDepth < k_tiles) continue;
        sums += epilogue_(block, first + 32 * b, j);
        bf16 *a0 = nullptr, *a1 = nullptr, *b0 = nullptr, *b1 = nullptr;
        if (gradients_.of_x)
          a0 = tile(g_a_, rows_ / 16, 2 * b, j / 32), a1 = tile(g_a_, rows_ / 16, 2 * b + 1, j / 32);
        if (gradients_.of_y) b0 = tile(g_b, 2, 0, b), b1 = tile(g_b, 2, 1, b);
        if (a0 && b0)
          round_block(block, a0, a1, b0, b1);
        else if (a0)
          round_block_a(block, a0, a1);
        else if (b0)
          round_block_b(block, b0, b1);
      }
    return sums;
  }

  // dX = G Y for strip_ rows x kChannels channels; sum: 32 x 32 blocks, [channels / 32][rows / 32].
  VLKERN_AMX_TARGET void gradient_of_x(int64_t first, int64_t rows, int64_t row, int64_t channel, float* sum,
                                       bf16* dx) {
    Tiles registers;
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
    for (int64_t r = row; r < row_stop; ++r)
      for (int64_t c = channel; c < std::min(channel_stop, x_.columns); c += 32) {
        const float* source = block(r, c) + (r - row) % 32 * 32;
        bf16* target = dx + (first + r) * x_.columns + c;
        for (int64_t i = 0; i < std::min<int64_t>(32, x_.columns - c); ++i)
          target[i] = from_float<bf16>(gradients_.factor * source[i]);
      }
  }

  // dY [n, d], 32 rows, from the blocks of dY^T.
  VLKERN_AMX_TARGET void gradient_of_y(int64_t b, bf16* dy) {
    __m512 factor = _mm512_set1_ps(gradients_.factor);
    for (int64_t c = 0; c < y_.columns; c += 16)
      for (int64_t h = 0; h < 2; ++h) {
        const float* block = dyt_ + (b * d_ + c / 32 * 32) * 32 + c % 32 * 32 + 16 * h;
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(block + 32 * i);
        transpose(r);
        int64_t rows = std::min<int64_t>(16, y_.rows - (32 * b + 16 * h)),
                width = std::min<int64_t>(16, y_.columns - c);
        for (int64_t i = 0; i < rows; ++i) {
          __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(factor, (__m512)r[i]));
          _mm256_mask_storeu_epi16(dy + (32 * b + 16 * h + i) * y_.columns + c, __mmask16((1u << width) - 1),
                                   rounded);
        }
      }
  }
};

}  // namespace vlkern::amx

#endif
