// bf16 attention on AMX tiles. Panels, masks, softmax and slopes are those of cpu_kernel.inc, with 32 rows a
// panel; the products are tiles:
//   forward    S^T = K Q^T        O^T += V^T P^T
//   backward   S^T, dP^T = V G^T  dQ^T += K^T dS^T     and for all panels of a block at once  dV += P^T G, dK
//   += dS^T Q
// Packed operands are [16 rows or columns][inner dimension / 32][tile], as in amx.h; what pads them is zero.
// Keys are cut into steps of 32, so that a panel looks at up to 31 keys more than it sees, but never beyond
// its block's.
//
// cpu.cpp includes this under `#pragma GCC target`, which lambdas, unlike attributes, inherit.
#pragma once

namespace vlkern::attention::tiles {

using amx::kTile;
using avx512::Panel;
using avx512::Running;
using avx512::Span;

constexpr int64_t kRows = 32, kPanels = 8, kBlockRows = kRows * kPanels;
constexpr int64_t kTileKeys = 128, kSteps = kTileKeys / 32;

// C [16 m, 16 n] (+)= A [16 m, 32 k] B [32 k, 16 n]. The panels of A and B are a_panel and b_panel apart.
inline void multiply(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t a_panel, const bf16* b,
                     int64_t b_panel, float* c, int64_t c_row, bool add) {
  asm volatile("" ::: "memory");  // GCC 12 does not know that _tile_loadd reads memory
  auto block = [&]<bool Tall, bool Wide>(int64_t i, int64_t j) {
    float* out = c + 16 * (i * c_row + j);
    add ? amx::load_block<Tall, Wide>(out, c_row) : amx::zero_block<Tall, Wide>();
    amx::multiply_block<Tall, Wide>(a + i * a_panel, a_panel, b + j * b_panel, b_panel, k);
    amx::store_block<Tall, Wide>(out, c_row);
  };
  for (int64_t i = 0; i < m; i += 2)
    for (int64_t j = 0; j < n; j += 2)
      if (i + 1 < m)
        j + 1 < n ? block.operator()<true, true>(i, j) : block.operator()<true, false>(i, j);
      else
        j + 1 < n ? block.operator()<false, true>(i, j) : block.operator()<false, false>(i, j);
}

// The tokens [begin, begin + count) of one head.
inline amx::Source tokens(const Heads<const bf16>& x, int64_t begin, int64_t count, int64_t head) {
  return {x.at(begin, head), count, x.width, x.token};
}

// The rows of a panel, copied; lanes without a row, and rows without keys, are zero.
inline amx::Source rows_of(const Heads<const bf16>& x, const Bounds& b, const Panel& p, int64_t head,
                           bf16* copy) {
  for (int64_t i = 0; i < kRows; ++i) {
    bf16* row = copy + i * x.width;
    if (i < p.count && !b.empty(p.row + i))
      std::copy_n(x.at(p.row + i, head), x.width, row);
    else
      std::fill_n(row, x.width, bf16(0.0f));
  }
  return {copy, kRows, x.width, x.width};
}

// Packs all of x, or x transposed, with its rows, or its columns, as the outer dimension of an operand A.
inline void pack_a(const amx::Source& x, bf16* out) {
  for (int64_t i = 0; i < x.rows; i += 16)
    for (int64_t k = 0; k < x.columns; k += 32, out += kTile) amx::pack_a(x, i, k, out);
}
inline void pack_a_transposed(const amx::Source& x, bf16* out) {  // [columns / 16][kSteps]
  for (int64_t j = 0; j < x.columns; j += 16)
    for (int64_t k = 0; k < x.rows; k += 32)
      amx::pack_a_transposed(x, k, j, out + (j / 16 * kSteps + k / 32) * kTile);
}
// x transposed as B: its rows are columns.
inline void pack_b_transposed(const amx::Source& x, bf16* out) {
  for (int64_t j = 0; j < x.rows; j += 16)
    for (int64_t k = 0; k < x.columns; k += 32, out += kTile) amx::pack_b_transposed(x, j, k, out);
}

inline Panel panel_at(const Bounds& b, int64_t row, int64_t end) {
  Panel p = avx512::panel_at(b, row, std::min(row + kRows, end));
  p.width = kRows;
  return p;
}

// As in cpu_kernel.inc, from a whole step of the tile on.
inline Span padded_span(const Panel& p, int64_t tile, int64_t keys) {
  Span s = avx512::span_of(p, tile, keys);
  if (s.count <= 0) return s;
  int64_t before = (s.begin - tile) % 32;
  return {s.begin - before, s.count + before, s.edge || before > 0};
}

// The panels of a block of rows, and the hull [lo, hi) of their keys.
struct Block {
  int64_t count = 0, lo = INT32_MAX, hi = 0;
  Panel panels[kPanels];
  Block(const Bounds& b, const Segment& rows) {
    for (int64_t i = rows.row; i < rows.end; i += kRows) {
      const Panel& p = panels[count++] = panel_at(b, i, rows.end);
      lo = std::min(lo, p.lo), hi = std::max(hi, p.hi);
    }
  }
};

// The forward of a block of rows. One worker per thread.
class ForwardWorker {
 public:
  explicit ForwardWorker(const Forward<bf16>& c)
      : c_(c),
        d_(c.q.width),
        dv_(c.v.width),
        depth_(ceil_div(d_, 32)),
        across_(ceil_div(dv_, 16)),
        arena_(bytes()) {
    keys_ = arena_.take<bf16>(kTileKeys / 16 * depth_ * kTile),
    values_ = arena_.take<bf16>(across_ * kSteps * kTile);
    p_ = arena_.take<bf16>(2 * kSteps * kTile), copy_ = arena_.take<bf16>(kRows * d_);
    s_ = arena_.take<float>(kTileKeys * kRows), rows_ = arena_.take<float>(kRows * dv_);
    for (int64_t p = 0; p < kPanels; ++p) {
      q_[p] = arena_.take<bf16>(2 * depth_ * kTile);
      running_[p] = {arena_.take<float>(kRows), arena_.take<float>(kRows),
                     arena_.take<float>(across_ * 16 * kRows), arena_.take<int32_t>(kRows),
                     arena_.take<int32_t>(kRows)};
    }
  }

  void block(const Segment& rows, int64_t head) {
    const Block block(c_.bounds, rows);
    for (int64_t p = 0; p < block.count; ++p) begin_panel(block.panels[p], p, head);
    for (int64_t tile = block.lo; tile < block.hi; tile += kTileKeys) {
      int64_t keys = std::min(kTileKeys, block.hi - tile);
      pack_a(tokens(c_.k, tile, keys, head / c_.group), keys_);
      pack_a_transposed(tokens(c_.v, tile, keys, head / c_.group), values_);
      for (int64_t p = 0; p < block.count; ++p) {
        Span span = padded_span(block.panels[p], tile, keys);
        if (span.count > 0) visit(p, span, span.begin - tile);
      }
    }
    for (int64_t p = 0; p < block.count; ++p) end_panel(block.panels[p], running_[p], head);
  }

 private:
  int64_t bytes() const {
    return 2 * (kTileKeys / 16 * depth_ * kTile + across_ * kSteps * kTile + 2 * kSteps * kTile +
                kRows * d_) +
           4 * kRows * (kTileKeys + dv_) + kPanels * (4 * depth_ * kTile + 4 * kRows * (across_ * 16 + 4)) +
           64 * (6 + 6 * kPanels);
  }

  void begin_panel(const Panel& panel, int64_t p, int64_t head) {
    const Running& r = running_[p];
    pack_b_transposed(rows_of(c_.q, c_.bounds, panel, head, copy_), q_[p]);
    avx512::load_bounds(c_.bounds, panel, r.start, r.stop);
    std::fill_n(r.top, kRows, avx512::kMasked);
    std::fill_n(r.sum, kRows, 0.0f);
    std::fill_n(r.out, across_ * 16 * kRows, 0.0f);
  }

  void visit(int64_t p, const Span& span, int64_t from) {
    const int64_t steps = ceil_div(span.count, 32), panel = depth_ * kTile;
    multiply(ceil_div(span.count, 16), 2, depth_, keys_ + from / 16 * panel, panel, q_[p], panel, s_, kRows,
             false);
    avx512::with_kind<2>(span.edge, c_.cap > 0, [&]<int N, bool Edge, bool Cap>() {
      avx512::softmax<N, Edge, Cap, true>(s_, span, running_[p], dv_, c_.cap, c_.scale);
    });
    std::fill(s_ + span.count * kRows, s_ + steps * 32 * kRows, 0.0f);
    for (int64_t k = 0; k < steps; ++k)
      amx::round_block_b(s_ + k * 32 * kRows, p_ + k * kTile, p_ + (kSteps + k) * kTile);
    multiply(across_, 2, steps, values_ + from / 32 * kTile, kSteps * kTile, p_, kSteps * kTile,
             running_[p].out, kRows, true);
  }

  void end_panel(const Panel& panel, const Running& r, int64_t head) {
    avx512::transpose(r.out, dv_, kRows, rows_);
    for (int64_t i = 0; i < panel.count; ++i) {
      if (c_.bounds.empty(panel.row + i)) continue;
      avx512::narrow(rows_ + i * dv_, c_.out.at(panel.row + i, head), dv_, 1.0f / r.sum[i]);
      c_.lse[(panel.row + i) * c_.query_heads + head] = r.top[i] + std::log(r.sum[i]);
    }
  }

  const Forward<bf16>& c_;
  int64_t d_, dv_, depth_, across_;  // depth: steps of 32 channels of Q and K; across: panels of 16 of V
  amx::Tiles registers_;
  Arena arena_;
  Running running_[kPanels];
  bf16 *keys_, *values_, *p_, *copy_, *q_[kPanels];
  float *s_, *rows_;
};

// The backward of one query head over a family of documents: block by block, each tile of its keys.
class BackwardWorker {
 public:
  explicit BackwardWorker(const Backward<bf16>& c)
      : c_(c),
        d_(c.q.width),
        dv_(c.v.width),
        depth_(ceil_div(d_, 32)),
        depth_v_(ceil_div(dv_, 32)),
        across_(ceil_div(d_, 16)),
        across_v_(ceil_div(dv_, 16)),
        arena_(bytes()) {
    auto packed = [&](int64_t tiles) { return arena_.take<bf16>(tiles * kTile); };
    keys_ = packed(kTileKeys / 16 * depth_), values_ = packed(kTileKeys / 16 * depth_v_);
    keys_t_ = packed(across_ * kSteps), ds_t_ = packed(2 * kSteps);
    q_ = packed(across_ * kPanels), g_ = packed(across_v_ * kPanels);
    p_ = packed(kTileKeys / 16 * kPanels), ds_ = packed(kTileKeys / 16 * kPanels);
    copy_ = arena_.take<bf16>(kRows * std::max(d_, dv_));
    s_ = arena_.take<float>(kTileKeys * kRows), dp_s_ = arena_.take<float>(kTileKeys * kRows);
    rows_ = arena_.take<float>(kRows * 16 * std::max(across_, across_v_));
    for (State& s : states_)
      s = {packed(2 * depth_),         packed(2 * depth_v_),      arena_.take<float>(across_ * 16 * kRows),
           arena_.take<float>(kRows),  arena_.take<float>(kRows), arena_.take<int32_t>(kRows),
           arena_.take<int32_t>(kRows)};
  }

  // dk and dv [hi - lo, ...] of the family are added to.
  void family(const Family& f, int64_t head, float* dk, float* dv) {
    for (const Segment& rows : blocks(f.members, kBlockRows)) block(rows, head, f.lo, dk, dv);
  }

 private:
  struct State {
    bf16 *q_t, *g_t;        // tiles of [D, 32], [Dv, 32]
    float* dq_t;            // [D, 32]
    float *lse, *delta;     // [32]
    int32_t *start, *stop;  // [32]
  };

  int64_t bytes() const {
    int64_t tiles = kTileKeys / 16 * (depth_ + depth_v_ + 2 * kPanels) + (across_ + 2) * kSteps +
                    (across_ + across_v_ + 2 * (depth_ + depth_v_)) * kPanels;
    int64_t floats =
        kRows * (2 * kTileKeys + 16 * std::max(across_, across_v_) + kPanels * (across_ * 16 + 4));
    return 2 * tiles * kTile + 2 * kRows * std::max(d_, dv_) + 4 * floats + 64 * (12 + 7 * kPanels);
  }

  void block(const Segment& rows, int64_t head, int64_t origin, float* dk, float* dv) {
    const Block block(c_.bounds, rows);
    for (int64_t p = 0; p < block.count; ++p) begin_panel(block.panels[p], p, head);
    for (int64_t tile = block.lo; tile < block.hi; tile += kTileKeys) {
      int64_t keys = std::min(kTileKeys, block.hi - tile);
      amx::Source k = tokens(c_.k, tile, keys, head / c_.group),
                  v = tokens(c_.v, tile, keys, head / c_.group);
      pack_a(k, keys_), pack_a(v, values_), pack_a_transposed(k, keys_t_);
      uint32_t seen[kSteps] = {};  // by which panels, as bits
      for (int64_t p = 0; p < block.count; ++p) {
        Span span = padded_span(block.panels[p], tile, keys);
        if (span.count <= 0) continue;
        int64_t from = (span.begin - tile) / 32, steps = ceil_div(span.count, 32);
        visit(p, span, from, steps);
        for (int64_t k = from; k < from + steps; ++k) seen[k] |= 1u << p;
      }
      for (int64_t k = 0; k < ceil_div(keys, 32); ++k) {
        int64_t begin = tile + 32 * k - origin, count = std::min<int64_t>(32, keys - 32 * k);
        if (seen[k]) add_keys(k, seen[k], count, dk + begin * d_, dv + begin * dv_);
      }
    }
    for (int64_t p = 0; p < block.count; ++p) end_panel(block.panels[p], states_[p], head);
  }

  void begin_panel(const Panel& panel, int64_t p, int64_t head) {
    const State& s = states_[p];
    auto pack = [&](const Heads<const bf16>& x, bf16* transposed, bf16* out) {
      amx::Source rows = rows_of(x, c_.bounds, panel, head, copy_);
      pack_b_transposed(rows, transposed);
      for (int64_t j = 0; j < x.width; j += 16) amx::pack_b(rows, 0, j, out + (j / 16 * kPanels + p) * kTile);
    };
    pack(c_.q, s.q_t, q_);
    pack(c_.grad, s.g_t, g_);
    avx512::load_bounds(c_.bounds, panel, s.start, s.stop);
    std::fill_n(s.dq_t, across_ * 16 * kRows, 0.0f);
    for (int64_t i = 0; i < kRows; ++i) {
      bool real = i < panel.count && !c_.bounds.empty(panel.row + i);
      s.lse[i] = real ? c_.lse[(panel.row + i) * c_.query_heads + head] : 0.0f;
      s.delta[i] = real ? c_.delta[(panel.row + i) * c_.query_heads + head] : 0.0f;
    }
  }

  // p and ds of panel p and the steps of keys [from, from + steps), rounded; dq.
  void visit(int64_t p, const Span& span, int64_t from, int64_t steps) {
    const State& s = states_[p];
    const int64_t panel = depth_ * kTile, panel_v = depth_v_ * kTile, m = ceil_div(span.count, 16);
    multiply(m, 2, depth_, keys_ + 2 * from * panel, panel, s.q_t, panel, s_, kRows, false);
    multiply(m, 2, depth_v_, values_ + 2 * from * panel_v, panel_v, s.g_t, panel_v, dp_s_, kRows, false);
    avx512::with_kind<2>(span.edge, c_.cap > 0, [&]<int N, bool Edge, bool Cap>() {
      avx512::slopes<N, Edge, Cap, true>(s_, dp_s_, span, s.start, s.stop, s.lse, s.delta, c_.cap, c_.scale);
    });
    std::fill(s_ + span.count * kRows, s_ + steps * 32 * kRows, 0.0f);
    std::fill(dp_s_ + span.count * kRows, dp_s_ + steps * 32 * kRows, 0.0f);
    for (int64_t k = 0; k < steps; ++k) {
      bf16 *b = ds_t_ + k * kTile, *first = tile(p_, from + k, p), *second = tile(ds_, from + k, p);
      amx::round_block_a(s_ + k * 32 * kRows, first, first + kPanels * kTile);
      amx::round_block(dp_s_ + k * 32 * kRows, second, second + kPanels * kTile, b, b + kSteps * kTile);
    }
    multiply(across_, 2, steps, keys_t_ + from * kTile, kSteps * kTile, ds_t_, kSteps * kTile, s.dq_t, kRows,
             true);
  }

  // The first 16 of the 32 keys of a step, and panel p, in p_ or ds_.
  static bf16* tile(bf16* packed, int64_t step, int64_t p) {
    return packed + (2 * step * kPanels + p) * kTile;
  }

  // dv += P^T G and dk += dS^T Q for the 32 keys of a step and all panels that see some of them.
  void add_keys(int64_t step, uint32_t seen, int64_t count, float* dk, float* dv) {
    const int64_t first = std::countr_zero(seen), panels = std::bit_width(seen) - first;
    for (int64_t p = first; p < first + panels; ++p)
      if (!(seen >> p & 1))
        for (bf16* packed : {tile(p_, step, p), tile(ds_, step, p)})
          for (int64_t half : {0, 1}) std::fill_n(packed + half * kPanels * kTile, kTile, bf16(0.0f));
    auto add = [&](bf16* a, const bf16* b, int64_t across, float scale, float* out, int64_t width) {
      multiply(2, across, panels, tile(a, step, first), kPanels * kTile, b + first * kTile, kPanels * kTile,
               rows_, 16 * across, false);
      for (int64_t i = 0; i < count; ++i)
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) out[i * width + j] += scale * rows_[i * 16 * across + j];
    };
    add(p_, g_, across_v_, 1.0f, dv, dv_);
    add(ds_, q_, across_, c_.scale, dk, d_);
  }

  void end_panel(const Panel& panel, const State& s, int64_t head) {
    avx512::transpose(s.dq_t, d_, kRows, rows_);
    for (int64_t i = 0; i < panel.count; ++i)
      if (!c_.bounds.empty(panel.row + i))
        avx512::narrow(rows_ + i * d_, c_.dq.at(panel.row + i, head), d_, c_.scale);
  }

  const Backward<bf16>& c_;
  int64_t d_, dv_, depth_, depth_v_, across_, across_v_;  // depth: steps of 32 channels; across: panels of 16
  amx::Tiles registers_;
  Arena arena_;
  State states_[kPanels];
  bf16 *keys_, *values_, *keys_t_, *ds_t_;  // K and V [keys, channels], K^T, dS^T of a panel
  bf16 *q_, *g_, *p_, *ds_;                 // of all panels: Q, G; P^T, dS^T
  bf16* copy_;
  float *s_, *dp_s_, *rows_;
};

struct Kernels {
  static constexpr int64_t kRows = kBlockRows;
  template <class>
  using Forward = ForwardWorker;
  template <class>
  using Backward = BackwardWorker;
};

}  // namespace vlkern::attention::tiles
