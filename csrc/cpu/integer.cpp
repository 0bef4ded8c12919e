// The steps of the codec's whole-number transformer (python/vlkern/codec/integer): the same numbers as
// arithmetic.py, which defines them and says why nothing overflows; docs/codec-exactness.md has the formulas.
#include <algorithm>
#include <bit>
#include <cmath>

#include "share.h"
#include "simd.h"
#include "vlkern.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vlkern::integer {

constexpr int kColumns = 16;                                  // of a panel
using Pair = int32_t __attribute__((may_alias, aligned(2)));  // two neighbouring int16

VLKERN_INLINE int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}

// floor(sqrt(x)), 0 <= x < 2^62
inline int64_t root(int64_t x) {
  int64_t r = int64_t(std::sqrt(double(x)));
  while (r * r > x) --r;
  while ((r + 1) * (r + 1) <= x) ++r;
  return r;
}

// 2^(15 - u / 1024), floor of the table's 2^15 2^-f
VLKERN_INLINE int32_t power_of_two(int32_t u, const int32_t* exp2) {
  const int32_t whole = u >> 10;
  return exp2[u & 1023] >> (whole < 31 ? whole : 31);
}

}  // namespace vlkern::integer

#define VLKERN_ROOM integer
#define VLKERN_ARITHMETIC "cpu/integer_kernel.inc"
// after the two names
#include "levels.inc"

namespace vlkern {
namespace {

using namespace integer;

// The best instruction set; for tests 1 means none, 2 at most AVX2.
template <class F>
void at_level(int64_t level, F&& f) {
#ifdef VLKERN_LEVELS
  if (level == 1) return f.template operator()<portable::Kernels>();
  if (level == 2 && __builtin_cpu_supports("x86-64-v3")) return f.template operator()<avx2::Kernels>();
#endif
  with_kernels(f);
}

constexpr int64_t kBlock = 96;  // rows of a task

const int16_t* shorts(const Tensor& t) {
  return t.const_data_ptr<int16_t>();
}

// Rows of n numbers with a stride in pairs; copied when n is odd.
struct Rows {
  const Pair* data;
  int64_t stride;
  std::vector<int16_t> room;

  Rows(const int16_t* x, int64_t rows, int64_t n) : stride((n + 1) / 2) {
    if (n % 2) {
      room.resize(rows * (n + 1));
      for (int64_t i = 0; i < rows; ++i) std::copy_n(x + i * n, n, &room[i * (n + 1)]);
      x = room.data();
    }
    data = reinterpret_cast<const Pair*>(x);
  }
};

template <class T>
void linear(const Tensor& x, const Tensor& panels, const Tensor& bias, const Tensor& multiplier, int shift,
            int32_t limit, const int16_t* table, Tensor& out, int64_t level) {
  const int64_t k = x.size(-1), m = k ? x.numel() / k : 0, n = bias.numel(), words = (k + 1) / 2;
  const Rows rows(shorts(x), m, k);
  const auto* weight = reinterpret_cast<const int32_t*>(shorts(panels));
  const int32_t *add = bias.const_data_ptr<int32_t>(), *times = multiplier.const_data_ptr<int32_t>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t blocks = ceil_div(m, kBlock);
  at_level(level, [&]<class Kernels>() {
    share(blocks * ceil_div(n, kColumns), [&] {
      return [&](int64_t task) {
        const int64_t panel = task / blocks, first = task % blocks * kBlock,
                      count = std::min(kBlock, m - first);
        const int64_t column = panel * kColumns, width = std::min<int64_t>(kColumns, n - column);
        int32_t sums[kBlock * kColumns];
        Kernels::multiply(count, words, rows.data + first * rows.stride, rows.stride,
                          weight + panel * words * kColumns, sums, kColumns);
        for (int64_t i = 0; i < count; ++i) {
          T* row = to + (first + i) * n + column;
          Kernels::requantize(sums + i * kColumns, add + column, times + column, shift, limit, row, width);
          if (table)
            for (int64_t j = 0; j < width; ++j) row[j] = T(table[row[j] + limit]);
        }
      };
    });
  });
}

Tensor integer_linear(const Tensor& x_, const Tensor& panels, const Tensor& bias, const Tensor& multiplier,
                      int64_t shift, int64_t limit, const std::optional<Tensor>& table, int64_t level) {
  VLKERN_CHECK(x_.scalar_type() == ScalarType::Short && panels.scalar_type() == ScalarType::Short &&
                   bias.scalar_type() == ScalarType::Int && multiplier.scalar_type() == ScalarType::Int,
               "x and panels must be int16, bias and multiplier int32");
  Tensor x = torch::stable::contiguous(x_);
  auto shape = shape_of(x);
  VLKERN_CHECK(!shape.empty() && bias.numel() == multiplier.numel() &&
                   panels.numel() == ceil_div(bias.numel(), kColumns) * kColumns * round_up(shape.back(), 2),
               "panels, bias and multiplier must fit x");
  VLKERN_CHECK(shift >= 1 && shift <= 62 && limit >= 0 && limit < int64_t(1) << 31,
               "shift or limit out of range");
  VLKERN_CHECK(!table || (limit <= 32767 && table->scalar_type() == ScalarType::Short &&
                          table->numel() == 2 * limit + 1),
               "table must be int16 with one value for each of -limit ... limit");
  shape.back() = bias.numel();
  const bool narrow = limit <= 32767;
  Tensor out = empty(x, shape, narrow ? ScalarType::Short : ScalarType::Int);
  if (narrow)
    linear<int16_t>(x, panels, bias, multiplier, int(shift), int32_t(limit), table ? shorts(*table) : nullptr,
                    out, level);
  else
    linear<int32_t>(x, panels, bias, multiplier, int(shift), int32_t(limit), nullptr, out, level);
  return out;
}

Tensor integer_norm(const Tensor& x_, const Tensor& gain, const Tensor& bias, int64_t shift, int64_t limit,
                    int64_t epsilon, int64_t level) {
  VLKERN_CHECK(x_.scalar_type() == ScalarType::Int && gain.scalar_type() == ScalarType::Int &&
                   bias.scalar_type() == ScalarType::Long,
               "x and gain must be int32, bias int64");
  Tensor x = torch::stable::contiguous(x_);
  auto shape = shape_of(x);
  VLKERN_CHECK(
      !shape.empty() && shape.back() > 0 && gain.numel() == shape.back() && bias.numel() == shape.back(),
      "gain and bias must have one number for each channel");
  VLKERN_CHECK(shift >= 1 && shift <= 60 && limit >= 0 && limit <= 32767 && epsilon >= 1,
               "shift, limit or epsilon out of range");
  Tensor out = empty(x, shape, ScalarType::Short);
  const int64_t n = shape.back(), rows = x.numel() / n;
  const int32_t *from = x.const_data_ptr<int32_t>(), *times = gain.const_data_ptr<int32_t>();
  const int64_t* add = bias.const_data_ptr<int64_t>();
  auto* to = out.mutable_data_ptr<int16_t>();
  at_level(level, [&]<class Kernels>() {
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        Kernels::normalize(from + i * n, n, times, add, int(shift), int32_t(limit), epsilon, to + i * n);
    });
  });
  return out;
}

struct Attention {
  int64_t tokens, width, heads, start, stop;  // of a tile; D; slots start ... stop - 1 ask
  int shift, out_shift;
  int32_t multiplier, limit;
  const int32_t* exp2;
  int64_t channels = width / heads, pairs = (channels + 1) / 2, keys = round_up(stop, kColumns),
          columns = round_up(channels, kColumns), asking = stop - start;
};

// One head of one tile; a thread has one of these.
template <class Kernels>
struct Head {
  const Attention& a;
  std::vector<int32_t> queries, key_panels, value_panels, scores, exponentials;
  std::vector<int16_t> weights;

  explicit Head(const Attention& a_)
      : a(a_),
        queries(a.asking * a.pairs),
        key_panels(a.keys * a.pairs),
        value_panels(a.keys / 2 * a.columns),
        scores(a.asking * std::max(a.keys, a.columns)),
        exponentials(a.stop),
        weights(a.asking * a.keys) {}

  int16_t number(const int16_t* row, int64_t c) const { return c < a.channels ? row[c] : int16_t(0); }
  static int32_t pair(int16_t low, int16_t high) {
    return int32_t(uint32_t(uint16_t(low)) | uint32_t(uint16_t(high)) << 16);
  }

  // qkv [N, 3, heads, channels] from the first channel of this head's queries; out [asking, width] likewise
  void run(const int16_t* qkv, int16_t* out) {
    const int64_t row = 3 * a.width;
    for (int64_t i = 0; i < a.asking; ++i)
      for (int64_t p = 0; p < a.pairs; ++p) {
        const int16_t* q = qkv + (a.start + i) * row;
        queries[i * a.pairs + p] = pair(q[2 * p], number(q, 2 * p + 1));
      }
    for (int64_t j = 0; j < a.stop; ++j) {
      const int16_t *key = qkv + j * row + a.width, *value = key + a.width;
      int32_t* panel = &key_panels[j / kColumns * kColumns * a.pairs + j % kColumns];
      for (int64_t p = 0; p < a.pairs; ++p) panel[p * kColumns] = pair(key[2 * p], number(key, 2 * p + 1));
      if (j % 2 == 0) {
        const bool last = j + 1 == a.stop;
        for (int64_t c = 0; c < a.channels; ++c)
          value_panels[c / kColumns * kColumns * (a.keys / 2) + j / 2 * kColumns + c % kColumns] =
              pair(value[c], last ? int16_t(0) : value[c + row]);
      }
    }
    const auto* asked = reinterpret_cast<const Pair*>(queries.data());
    for (int64_t j = 0; j < a.keys; j += kColumns)
      Kernels::multiply(a.asking, a.pairs, asked, a.pairs, &key_panels[j * a.pairs], &scores[j], a.keys);
    for (int64_t i = 0; i < a.asking; ++i)
      Kernels::softmax(&scores[i * a.keys], a.stop, a.shift, a.exp2, exponentials.data(),
                       &weights[i * a.keys]);
    const auto* shares = reinterpret_cast<const Pair*>(weights.data());
    for (int64_t c = 0; c < a.columns; c += kColumns)
      Kernels::multiply(a.asking, a.keys / 2, shares, a.keys / 2, &value_panels[c * (a.keys / 2)], &scores[c],
                        a.columns);
    for (int64_t i = 0; i < a.asking; ++i)
      Kernels::requantize(&scores[i * a.columns], a.multiplier, a.out_shift, a.limit, out + i * a.width,
                          a.channels);
  }
};

Tensor integer_attention(const Tensor& qkv, int64_t start, int64_t stop, int64_t heads, int64_t shift,
                         const Tensor& exp2, int64_t multiplier, int64_t out_shift, int64_t limit,
                         int64_t level) {
  VLKERN_CHECK(qkv.dim() == 3 && qkv.scalar_type() == ScalarType::Short && qkv.is_contiguous(),
               "qkv must be int16 [T, N, 3 D], contiguous");
  VLKERN_CHECK(heads >= 1 && qkv.size(2) % (3 * heads) == 0 && qkv.size(2) > 0,
               "heads must divide the width");
  VLKERN_CHECK(0 <= start && start <= stop && stop <= qkv.size(1), "start and stop must be slots of qkv");
  VLKERN_CHECK(exp2.scalar_type() == ScalarType::Int && exp2.numel() == 1024, "exp2 must be int32 [1024]");
  VLKERN_CHECK(shift >= 0 && shift <= 30 && out_shift >= 1 && out_shift <= 62 && limit >= 0 &&
                   limit <= 32767 && multiplier >= 0 && multiplier < int64_t(1) << 31,
               "shift, multiplier or limit out of range");
  const int64_t tiles = qkv.size(0), width = qkv.size(2) / 3;
  const Attention a{qkv.size(1),    width,
                    heads,          start,
                    stop,           int(shift),
                    int(out_shift), int32_t(multiplier),
                    int32_t(limit), exp2.const_data_ptr<int32_t>()};
  Tensor out = empty(qkv, {tiles, a.asking, width}, ScalarType::Short);
  if (a.asking == 0) return out;
  const int16_t* from = shorts(qkv);
  auto* to = out.mutable_data_ptr<int16_t>();
  at_level(level, [&]<class Kernels>() {
    share(tiles * heads, [&] {
      return [&, head = Head<Kernels>(a)](int64_t task) mutable {
        const int64_t tile = task / heads, first = task % heads * a.channels;
        head.run(from + tile * a.tokens * 3 * width + first, to + tile * a.asking * width + first);
      };
    });
  });
  return out;
}

// The K weights of a symbol from its logits: shares of 2^12, the rest to the largest remainders.
void shares(const int32_t* logits, int64_t components, int64_t stride, const int32_t* exp2, int64_t* room,
            int16_t* weights) {
  int32_t top = logits[0];
  int64_t sum = 0, left = 4096;
  for (int64_t k = 1; k < components; ++k) top = std::max(top, logits[k * stride]);
  for (int64_t k = 0; k < components; ++k) sum += room[k] = power_of_two(top - logits[k * stride], exp2);
  for (int64_t k = 0; k < components; ++k) {
    const int64_t share = 4096 * room[k] / sum;
    weights[k * stride] = int16_t(share), left -= share;
    room[k] = 4096 * room[k] % sum;
  }
  for (; left > 0; --left) {
    int64_t* most = std::max_element(room, room + components);
    ++weights[(most - room) * stride], *most = -1;
  }
}

std::tuple<Tensor, Tensor, Tensor> integer_mixture(const Tensor& raw_, const Tensor& exp2) {
  VLKERN_CHECK(
      raw_.dim() >= 3 && raw_.scalar_type() == ScalarType::Int && raw_.size(-3) == 3 && raw_.size(-2) > 0,
      "raw must be int32 [..., 3, K, C]");
  VLKERN_CHECK(exp2.scalar_type() == ScalarType::Int && exp2.numel() == 1024, "exp2 must be int32 [1024]");
  Tensor raw = torch::stable::contiguous(raw_);
  auto shape = shape_of(raw);
  shape.erase(shape.end() - 3);
  const int64_t components = shape[shape.size() - 2], channels = shape.back(), size = components * channels;
  Tensor means = empty(raw, shape, ScalarType::Int), scales = empty(raw, shape, ScalarType::Byte),
         weights = empty(raw, shape, ScalarType::Short);
  const int64_t symbols = size ? means.numel() / size : 0;
  const int32_t *from = raw.const_data_ptr<int32_t>(), *table = exp2.const_data_ptr<int32_t>();
  auto* mean = means.mutable_data_ptr<int32_t>();
  auto* scale = scales.mutable_data_ptr<uint8_t>();
  auto* weight = weights.mutable_data_ptr<int16_t>();
  torch::stable::parallel_for(
      0, symbols, std::max<int64_t>(1, 4096 / std::max<int64_t>(size, 1)), [&](int64_t begin, int64_t end) {
        std::vector<int64_t> room(components);
        for (int64_t i = begin; i < end; ++i) {
          const int32_t* row = from + 3 * i * size;
          for (int64_t c = 0; c < channels; ++c)
            shares(row + c, components, channels, table, room.data(), weight + i * size + c);
          std::copy_n(row + size, size, mean + i * size);
          for (int64_t j = 0; j < size; ++j)
            scale[i * size + j] = uint8_t(std::clamp(row[2 * size + j], 0, 63));
        }
      });
  return {means, scales, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("integer_linear", TORCH_BOX(&integer_linear));
  m.impl("integer_norm", TORCH_BOX(&integer_norm));
  m.impl("integer_attention", TORCH_BOX(&integer_attention));
  m.impl("integer_mixture", TORCH_BOX(&integer_mixture));
}

}  // namespace vlkern
