// The bf16 sweep on AMX tiles. Operands are packed once; G = dL/dlogits exists only as one chunk of rows, in bf16, in the
// two tile orders in which the gradient matmuls read it. Each 32 x 32 block of logits goes from the tile registers through
// the loss and back into tiles without leaving L1.
#pragma once

#include "amx.h"
#include "cpu.h"
#include "vlkern.h"

#ifdef VLKERN_AMX

namespace vlkern::sigmoid_loss {

class AmxSweep {
 public:
  AmxSweep(const Problem& problem, const Tensor& image, const Tensor& text)
      : p_(problem),
        n_(round_up(p_.n, 32)),
        d_(round_up(p_.d, 32)),
        x_{image.const_data_ptr<bf16>(), p_.m, p_.d, p_.d},
        y_{text.const_data_ptr<bf16>(), p_.n, p_.d, p_.d},
        yt_b_(buffer(image, n_ * d_ * 2)) {
    if (p_.grad) {
      y_b_ = buffer(image, n_ * d_ * 2);
      dyt_ = buffer(image, n_ * d_ * 4);
      x_t_a_ = buffer(image, kRows * d_ * 2);
      g_a_ = buffer(image, kRows * n_ * 2);
    }
    x_a_ = buffer(image, kRows * d_ * 2);
    pack_text();
  }

  // Adds loss, d_scale and d_bias over all pairs; fills d_image [m, d] and d_text [n, d] if gradients are wanted.
  Sums run(bf16* d_image, bf16* d_text) {
    int64_t tasks = ceil_div(n_, kColumns);
    std::vector<Sums> parts(tasks);
    for (int64_t first = 0; first < p_.m; first += kRows) {
      int64_t rows = std::min(kRows, p_.m - first);
      pack_images(first, rows);
      torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        Tensor scratch = buffer(text_like(), p_.grad ? kRows * kColumns * 2 : 0);
        for (int64_t t = begin; t < end; ++t) parts[t] += columns(first, rows, t * kColumns, data<bf16>(scratch));
      });
      if (p_.grad) image_gradient(first, rows, d_image);
    }
    if (p_.grad) text_gradient(d_text);
    Sums total;
    for (const Sums& part : parts) total += part;
    return total;
  }

 private:
  static constexpr int64_t kRows = 512;     // rows of a chunk: their tiles (0.8 MiB at d = 768) stay in L2
  static constexpr int64_t kColumns = 256;  // columns of a task: G's tiles (256 KiB) stay in L2 until they are used
  static constexpr int64_t kDepth = 1024;   // keys between two visits of a d_image accumulator

  const Problem& p_;
  int64_t n_, d_;  // padded to whole blocks
  amx::Source x_, y_;
  Tensor yt_b_, y_b_, dyt_, x_a_, x_t_a_, g_a_;

  const Tensor& text_like() const { return yt_b_; }
  static Tensor buffer(const Tensor& like, int64_t bytes) { return empty(like, {bytes}, ScalarType::Byte); }
  template <class T>
  static T* data(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
  }
  // Tile (panel, k) of a packed matrix whose panels hold `k_tiles` tiles.
  static bf16* tile(const Tensor& t, int64_t panel, int64_t k_tiles, int64_t k) {
    return data<bf16>(t) + (panel * k_tiles + k) * amx::kTile;
  }

  void pack_text() {
    torch::stable::parallel_for(0, n_ / 32, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) pack_text_rows(b);
    });
  }
  VLKERN_AMX_TARGET void pack_text_rows(int64_t b) {
    for (int64_t k = 0; k < d_ / 32; ++k)
      for (int64_t h = 0; h < 2; ++h) {
        amx::pack_b_transposed(y_, 32 * b + 16 * h, 32 * k, tile(yt_b_, 2 * b + h, d_ / 32, k));
        if (p_.grad) amx::pack_b(y_, 32 * b, 32 * k + 16 * h, tile(y_b_, 2 * k + h, n_ / 32, b));
      }
  }

  void pack_images(int64_t first, int64_t rows) {
    torch::stable::parallel_for(0, ceil_div(rows, 32), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) pack_image_rows(first, b);
    });
  }
  VLKERN_AMX_TARGET void pack_image_rows(int64_t first, int64_t b) {
    for (int64_t k = 0; k < d_ / 32; ++k)
      for (int64_t h = 0; h < 2; ++h) {
        amx::pack_a(x_, first + 32 * b + 16 * h, 32 * k, tile(x_a_, 2 * b + h, d_ / 32, k));
        if (p_.grad) amx::pack_a_transposed(x_, first + 32 * b, 32 * k + 16 * h, tile(x_t_a_, 2 * k + h, kRows / 32, b));
      }
  }

  // Logits, loss and G of rows x 256 columns, then dY^T [d, columns] += X^T G.
  VLKERN_AMX_TARGET Sums columns(int64_t first, int64_t rows, int64_t column, bf16* g_b) {
    amx::Tiles registers;
    alignas(64) float block[1024], sign[1024], keep[1024];
    Sums sums;
    int64_t k_tiles = d_ / 32, row_blocks = ceil_div(rows, 32), stop = std::min(column + kColumns, n_);
    auto g_b_tile = [&](int64_t j, int64_t k) { return g_b + ((j - column) / 16 * (kRows / 32) + k) * amx::kTile; };
    for (int64_t j = column; j < stop; j += 32) {
      for (int64_t b = 0; b < row_blocks; ++b) {
        amx::zero_block();
        amx::multiply_block(tile(x_a_, 2 * b, k_tiles, 0), k_tiles * amx::kTile, tile(yt_b_, j / 16, k_tiles, 0),
                            k_tiles * amx::kTile, k_tiles);
        amx::store_block(block, 32);
        sums += p_.labels(first + 32 * b, 32, j, 32, sign, keep)
                    ? all_pairs<true>(block, sign, keep, 1024, p_.scale, p_.bias)
                    : all_pairs<false>(block, nullptr, nullptr, 1024, p_.scale, p_.bias);
        if (p_.grad)
          amx::round_block(block, tile(g_a_, 2 * b, n_ / 32, j / 32), tile(g_a_, 2 * b + 1, n_ / 32, j / 32),
                           g_b_tile(j, b), g_b_tile(j + 16, b));
      }
      for (int64_t i = 0; p_.grad && i < d_; i += 32) {
        float* sum = data<float>(dyt_) + (j * d_ + 32 * i);  // 32 x 32 blocks, [n / 32][d / 32]
        first == 0 ? amx::zero_block() : amx::load_block(sum, 32);
        amx::multiply_block(tile(x_t_a_, i / 16, kRows / 32, 0), kRows / 32 * amx::kTile, g_b_tile(j, 0),
                            kRows / 32 * amx::kTile, row_blocks);
        amx::store_block(sum, 32);
      }
    }
    return sums;
  }

  // dX [rows, d] = G Y, in tasks of 256 rows x 256 channels.
  void image_gradient(int64_t first, int64_t rows, bf16* d_image) {
    int64_t across = ceil_div(d_, 256), down = ceil_div(rows, 256);
    torch::stable::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
      Tensor scratch = buffer(text_like(), 256 * 256 * 4);
      for (int64_t t = begin; t < end; ++t)
        image_gradient_block(first, rows, t / across * 256, t % across * 256, data<float>(scratch), d_image);
    });
  }
  VLKERN_AMX_TARGET void image_gradient_block(int64_t first, int64_t rows, int64_t row, int64_t channel, float* sum,
                                              bf16* d_image) {
    amx::Tiles registers;
    int64_t row_stop = std::min(row + 256, round_up(rows, 32)), channel_stop = std::min(channel + 256, d_), k_tiles = n_ / 32;
    for (int64_t k = 0; k < k_tiles; k += kDepth / 32)
      for (int64_t c = channel; c < channel_stop; c += 32)
        for (int64_t r = row; r < row_stop; r += 32) {
          float* s = sum + (r - row) * 256 + (c - channel);
          k == 0 ? amx::zero_block() : amx::load_block(s, 256);
          amx::multiply_block(tile(g_a_, r / 16, k_tiles, k), k_tiles * amx::kTile, tile(y_b_, c / 16, k_tiles, k),
                              k_tiles * amx::kTile, std::min(kDepth / 32, k_tiles - k));
          amx::store_block(s, 256);
        }
    float factor = p_.scale * p_.weight;
    for (int64_t r = row; r < std::min(row + 256, rows); ++r)
      for (int64_t c = channel; c < std::min(channel_stop, p_.d); ++c)
        d_image[(first + r) * p_.d + c] = from_float<bf16>(factor * sum[(r - row) * 256 + (c - channel)]);
  }

  // dY [n, d] from the accumulated 32 x 32 blocks of dY^T.
  void text_gradient(bf16* d_text) {
    torch::stable::parallel_for(0, n_ / 32, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) text_gradient_rows(b, d_text);
    });
  }
  VLKERN_AMX_TARGET void text_gradient_rows(int64_t b, bf16* d_text) {
    __m512 factor = _mm512_set1_ps(p_.scale * p_.weight);
    for (int64_t c = 0; c < p_.d; c += 16)
      for (int64_t h = 0; h < 2; ++h) {
        const float* block = data<float>(dyt_) + (b * d_ + c / 32 * 32) * 32 + c % 32 * 32 + 16 * h;
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(block + 32 * i);
        amx::transpose(r);
        int64_t rows = std::min<int64_t>(16, p_.n - (32 * b + 16 * h)), width = std::min<int64_t>(16, p_.d - c);
        for (int64_t i = 0; i < rows; ++i) {
          __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(factor, (__m512)r[i]));
          _mm256_mask_storeu_epi16(d_text + (32 * b + 16 * h + i) * p_.d + c, __mmask16((1u << width) - 1), rounded);
        }
      }
  }
};

}  // namespace vlkern::sigmoid_loss

#endif
