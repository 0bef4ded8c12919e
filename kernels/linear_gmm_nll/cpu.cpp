// The likelihood of mixtures from hidden states on the CPU, in fp32 through sgemm.
//
// The rows of the weight are cut into blocks of components (of channels, for mixtures of one dimension), the
// tokens into rows. The forward makes one tile of parameters after the other and keeps log weights only. The
// backward makes them again, for as many blocks at a time as kWait allows, turns them into their gradients G
// in place, and multiplies twice: dW = G^T X, finished at once for these rows, and dX += G W. No sum depends
// on the number of threads.
#include <memory>

#include "gmm.h"
#include "sgemm.h"
#include "share.h"
#include "simd.h"
#include "vlkern.h"

namespace vlkern {
namespace {

constexpr int64_t kRows = 128;      // tokens of a tile
constexpr int64_t kColumns = 1024;  // parameters of a tile, about
constexpr int64_t kSlice = 256;     // columns of a product in the backward
constexpr int64_t kWait =
    int64_t(1) << 23;  // gradients of parameters that wait for their two products: 32 MiB

using Buffer = std::unique_ptr<float[]>;
Buffer buffer(int64_t n) {
  return std::make_unique_for_overwrite<float[]>(n);
}

template <class T>
void widen(const T* in, float* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = to_float(in[j]);
}
template <class T>
void narrow(const float* in, T* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = from_float<T>(in[j]);
}

// Any float tensor as floats, without a copy where it holds them.
struct Floats {
  Buffer copy;
  const float* data;

  explicit Floats(const Tensor& t) {
    dispatch(t.scalar_type(), [&]<class T>() {
      if constexpr (std::is_same_v<T, float>) {
        data = t.const_data_ptr<float>();
      } else {
        copy = buffer(t.numel());
        widen(t.const_data_ptr<T>(), copy.get(), t.numel());
        data = copy.get();
      }
    });
  }
};

enum class Kind { logits, parts, channels };

// Components, or channels, [first, first + count): `pieces` ranges of `columns` rows of the weight, which lie
// side by side in a tile.
struct Block {
  Kind kind;
  int64_t first, count, columns;
  int pieces;
  int64_t row[3];

  int64_t width() const { return pieces * columns; }
};

struct Shape {
  int64_t n, width, k, d;
  bool joint;

  int64_t mixtures() const { return joint ? 1 : d; }  // of a token
  std::vector<Block> blocks(Kind kind) const {
    std::vector<Block> result;
    const int64_t each = kind == Kind::logits ? 1 : kind == Kind::parts ? 2 * d : 3 * k;
    const int64_t all = kind == Kind::channels ? d : k, step = std::max<int64_t>(1, kColumns / each);
    for (int64_t i = 0; i < all; i += step) {
      Block b{kind, i, std::min(step, all - i), 0, 1, {}};
      b.columns = b.count * (kind == Kind::channels ? k : each);
      b.row[0] = kind == Kind::parts ? k + i * each : kind == Kind::logits ? i : i * k;
      if (kind == Kind::channels)
        for (b.pieces = 1; b.pieces < 3; ++b.pieces) b.row[b.pieces] = (i + b.pieces * d) * k;
      result.push_back(b);
    }
    return result;
  }
};

template <class T>
class Head {
 public:
  Head(const Shape& shape, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
       const Tensor& target, float min_scale)
      : s_(shape),
        x_(hidden),
        weight_(weight.const_data_ptr<T>()),
        min_scale_(min_scale),
        room_(round_up(s_.d, gmm::kWidest)),
        targets_(buffer(s_.n * room_)) {
    if (bias) bias_ = bias->const_data_ptr<float>();
    Floats z(target);
    for (int64_t t = 0; t < s_.n; ++t) {
      std::copy_n(z.data + t * s_.d, s_.d, targets_.get() + t * room_);
      std::fill(targets_.get() + t * room_ + s_.d, targets_.get() + (t + 1) * room_, 0.0f);
    }
    const int64_t chunks = ceil_div(s_.n, kRows);
    rows_ = ceil_div(s_.n, std::max<int64_t>(1, chunks));
    chunks_ = s_.n ? ceil_div(s_.n, rows_) : 0;
  }

  void forward(float* log_weights, float* nll) {
    if (s_.joint) {
      tiles(s_.blocks(Kind::logits), [&](const Block& b, int64_t t, const float* row, float*) {
        std::copy_n(row, b.count, log_weights + t * s_.k + b.first);
      });
      each_token([&](int64_t t) {
        const gmm::Sum prior = gmm::sum_of_exps(log_weights + t * s_.k, s_.k);
        nll[t] = prior.most + prior.log;
      });
      tiles(s_.blocks(Kind::parts), [&](const Block& b, int64_t t, const float* row, float* room) {
        gmm::log_densities(row, b.count, s_.d, target(t), min_scale_, room);
        float* w = log_weights + t * s_.k + b.first;
        for (int64_t i = 0; i < b.count; ++i) w[i] += room[i];
      });
      each_token([&](int64_t t) {
        const gmm::Sum all = gmm::sum_of_exps(log_weights + t * s_.k, s_.k);
        nll[t] = (nll[t] - all.most) - all.log;
      });
    } else {
      tiles(s_.blocks(Kind::channels), [&](const Block& b, int64_t t, const float* row, float* room) {
        gmm::channels_nll(row, row + b.columns, row + 2 * b.columns, b.count, s_.k, target(t) + b.first,
                          min_scale_, room, nll + t * s_.d + b.first);
      });
    }
  }

  // Null pointers for gradients that are not wanted.
  struct Gradients {
    T *hidden, *weight;
    float *bias, *target;  // target [n, d]
  };

  void backward(const float* grad, const float* log_weights, const Gradients& out) {
    std::vector<Block> blocks = s_.blocks(s_.joint ? Kind::parts : Kind::channels);
    if (s_.joint) {
      std::vector<Block> logits = s_.blocks(Kind::logits);
      blocks.insert(blocks.begin(), logits.begin(), logits.end());
      all_.resize(s_.n);
      each_token([&](int64_t t) { all_[t] = gmm::sum_of_exps(log_weights + t * s_.k, s_.k); });
    }
    std::fill_n(out.target, s_.n * s_.d, 0.0f);
    Buffer sum;  // of dX, where its own numbers are too short
    if (out.hidden && !std::is_same_v<T, float>) sum = buffer(s_.n * s_.width);
    float* d_hidden = sum.get();
    if constexpr (std::is_same_v<T, float>) d_hidden = out.hidden;

    const int64_t most = std::max<int64_t>(kColumns, kWait / s_.n);
    for (size_t begin = 0, end; begin < blocks.size(); begin = end) {
      // The logits are together: their softmax needs all of them.
      int64_t columns = 0;
      for (end = begin;
           end < blocks.size() && blocks[end].kind == blocks[begin].kind &&
           (blocks[end].kind == Kind::logits || end == begin || columns + blocks[end].width() <= most);
           ++end)
        columns += blocks[end].width();
      std::vector<Block> here(blocks.begin() + begin, blocks.begin() + end);
      if (!waiting_ || columns > waiting_columns_)
        waiting_ = buffer(s_.n * columns), waiting_columns_ = columns;
      slopes(here, columns, grad, log_weights, out);
      products(here, columns, d_hidden, begin == 0, out);
    }
    if (sum) narrow(sum.get(), out.hidden, s_.n * s_.width);
  }

 private:
  Shape s_;
  Floats x_;
  const T* weight_;
  const float* bias_ = nullptr;
  float min_scale_;
  int64_t room_;    // of a target
  Buffer targets_;  // [n, room]
  int64_t rows_, chunks_;
  std::vector<gmm::Sum> all_;  // of the log weights of each token
  Buffer waiting_;             // gradients of parameters [n, columns]
  int64_t waiting_columns_ = 0;

  const float* target(int64_t t) const { return targets_.get() + t * room_; }

  template <class F>
  void each_token(F f) const {
    torch::stable::parallel_for(0, s_.n, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) f(t);
    });
  }

  // Rows of the weight as floats; `room` [rows, width].
  const float* widened(int64_t row, int64_t rows, float* room) const {
    const T* w = weight_ + row * s_.width;
    if constexpr (std::is_same_v<T, float>) return w;
    widen(w, room, rows * s_.width);
    return room;
  }
  static Buffer weight_room(int64_t rows, int64_t width) {
    return buffer(std::is_same_v<T, float> ? 0 : rows * width);
  }

  // The parameters of a block for tokens [first, first + rows), into z [rows, block] with the given stride.
  void parameters(const Block& b, int64_t first, int64_t rows, float* z, int64_t stride, float* room) const {
    for (int p = 0; p < b.pieces; ++p) {
      const int64_t at = p * b.columns;
      sgemm(rows, b.columns, s_.width, 1.0f, {x_.data + first * s_.width, s_.width},
            {widened(b.row[p], b.columns, room), s_.width, true}, 0.0f, z + at, stride);
      if (bias_)
        for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
          for (int64_t j = 0; j < b.columns; ++j) z[r * stride + at + j] += bias_[b.row[p] + j];
    }
  }

  // Floats that one token's arithmetic needs beside its parameters.
  int64_t token_room() const { return s_.joint ? kColumns + s_.k : gmm::channel_room(s_.k); }

  // f(block, token, its parameters, room), a tile after the other; tiles of a block follow one another.
  template <class F>
  void tiles(const std::vector<Block>& blocks, F f) const {
    const int64_t widest = blocks[0].width();
    share(int64_t(blocks.size()) * chunks_, [&] {
      return [&, z = buffer(rows_ * widest), w = weight_room(blocks[0].columns, s_.width),
              room = buffer(token_room())](int64_t task) {
        const Block& b = blocks[task / chunks_];
        const int64_t first = task % chunks_ * rows_, rows = std::min(rows_, s_.n - first);
        parameters(b, first, rows, z.get(), b.width(), w.get());
        for (int64_t r = 0; r < rows; ++r) f(b, first + r, z.get() + r * b.width(), room.get());
      };
    });
  }

  // G [n, columns] of some blocks in `waiting_`, and their part of the target's gradient.
  void slopes(const std::vector<Block>& blocks, int64_t columns, const float* grad, const float* log_weights,
              const Gradients& out) {
    std::vector<int64_t> column(1, 0);
    for (const Block& b : blocks) column.push_back(column.back() + b.width());
    const bool parts = blocks[0].kind == Kind::parts;
    Buffer sums = buffer(parts ? int64_t(blocks.size()) * s_.n * room_ : 0);  // of the target, block by block
    share(int64_t(blocks.size()) * chunks_, [&] {
      return [&, w = weight_room(blocks[0].columns, s_.width), room = buffer(token_room())](int64_t task) {
        const Block& b = blocks[task / chunks_];
        const int64_t first = task % chunks_ * rows_, rows = std::min(rows_, s_.n - first);
        float* z = waiting_.get() + first * columns + column[task / chunks_];
        parameters(b, first, rows, z, columns, w.get());
        for (int64_t t = first; t < first + rows; ++t, z += columns) {
          if (parts) {
            float* sum = sums.get() + (task / chunks_ * s_.n + t) * room_;
            std::fill_n(sum, room_, 0.0f);
            gmm::softmax(log_weights + t * s_.k + b.first, b.count, all_[t], grad[t], room.get());
            gmm::gradients(z, b.count, s_.d, target(t), room.get(), min_scale_, z, sum);
          } else if (b.kind == Kind::channels) {
            gmm::channels_gradients(z, z + b.columns, z + 2 * b.columns, b.count, s_.k, target(t) + b.first,
                                    grad + t * s_.d + b.first, min_scale_, room.get(), z, z + b.columns,
                                    z + 2 * b.columns, out.target + t * s_.d + b.first);
          }
        }
      };
    });
    each_token([&](int64_t t) {
      if (parts)
        for (size_t b = 0; b < blocks.size(); ++b)
          for (int64_t j = 0; j < s_.d; ++j) out.target[t * s_.d + j] += sums[(b * s_.n + t) * room_ + j];
      if (blocks[0].kind == Kind::logits) {
        float* row = waiting_.get() + t * columns;
        Buffer shares = buffer(s_.k);
        gmm::softmax(row, s_.k, gmm::sum_of_exps(row, s_.k), grad[t], row);
        gmm::softmax(log_weights + t * s_.k, s_.k, all_[t], grad[t], shares.get());
        for (int64_t i = 0; i < s_.k; ++i) row[i] -= shares[i];
      }
    });
  }

  // A range of columns of G and the rows of the weight that they belong to.
  struct Range {
    int64_t column, row, count;
  };

  void products(const std::vector<Block>& blocks, int64_t columns, float* d_hidden, bool fresh,
                const Gradients& out) const {
    std::vector<Range> slices, pieces;
    int64_t column = 0;
    for (const Block& b : blocks)
      for (int p = 0; p < b.pieces; ++p, column += b.columns) {
        // Neighbours in both are one piece: for float, one product.
        Range* last = pieces.empty() ? nullptr : &pieces.back();
        if (last && std::is_same_v<T, float> && last->row + last->count == b.row[p])
          last->count += b.columns;
        else
          pieces.push_back({column, b.row[p], b.columns});
        for (int64_t i = 0; i < b.columns; i += kSlice)
          slices.push_back({column + i, b.row[p] + i, std::min(kSlice, b.columns - i)});
      }
    const int64_t slices_of_width = ceil_div(s_.width, kSlice);
    const int64_t of_weight = out.weight || out.bias ? int64_t(slices.size()) : 0;
    const int64_t of_hidden = d_hidden ? chunks_ * slices_of_width : 0;
    int64_t longest = 0;
    for (const Range& r : pieces) longest = std::max(longest, r.count);
    share(of_weight + of_hidden, [&] {
      return [&, room = weight_room(std::max(kSlice, longest), s_.width)](int64_t task) {
        if (task < of_weight) return weight_rows(slices[task], columns, out, room.get());
        task -= of_weight;
        const int64_t first = task / slices_of_width * rows_, rows = std::min(rows_, s_.n - first);
        const int64_t channel = task % slices_of_width * kSlice,
                      channels = std::min(kSlice, s_.width - channel);
        bool add = !fresh;
        for (const Range& r : pieces) {
          const float* w = narrow_columns(r, channel, channels, room.get());
          const int64_t stride = std::is_same_v<T, float> ? s_.width : channels;
          sgemm(rows, channels, r.count, 1.0f, {waiting_.get() + first * columns + r.column, columns},
                {w, stride}, add ? 1.0f : 0.0f, d_hidden + first * s_.width + channel, s_.width);
          add = true;
        }
      };
    });
  }

  // Some channels of some rows of the weight as floats.
  const float* narrow_columns(const Range& r, int64_t channel, int64_t channels, float* room) const {
    const T* w = weight_ + r.row * s_.width + channel;
    if constexpr (std::is_same_v<T, float>) return w;
    for (int64_t i = 0; i < r.count; ++i) widen(w + i * s_.width, room + i * channels, channels);
    return room;
  }

  void weight_rows(const Range& r, int64_t columns, const Gradients& out, float* room) const {
    const float* g = waiting_.get() + r.column;
    if (out.weight) {
      float* product = room;
      if constexpr (std::is_same_v<T, float>) product = out.weight + r.row * s_.width;
      sgemm(r.count, s_.width, s_.n, 1.0f, {g, columns, true}, {x_.data, s_.width}, 0.0f, product, s_.width);
      if constexpr (!std::is_same_v<T, float>)
        narrow(product, out.weight + r.row * s_.width, r.count * s_.width);
    }
    if (!out.bias) return;
    float* sum = out.bias + r.row;
    std::fill_n(sum, r.count, 0.0f);
    for (int64_t t = 0; t < s_.n; ++t)
#pragma omp simd
      for (int64_t j = 0; j < r.count; ++j) sum[j] += g[t * columns + j];
  }
};

struct Inputs {
  Tensor hidden, weight, target;
  std::optional<Tensor> bias;
  Shape shape;
};

Inputs check(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
             const Tensor& target, bool joint) {
  VLKERN_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) &&
                   hidden.scalar_type() == weight.scalar_type(),
               "hidden must be [N, D] and weight [P, D] of one dtype");
  VLKERN_CHECK(target.dim() == 2 && target.size(0) == hidden.size(0) && target.size(1) > 0,
               "target must be [N, d]");
  const int64_t d = target.size(1), each = joint ? 1 + 2 * d : 3 * d;
  VLKERN_CHECK(weight.size(0) > 0 && weight.size(0) % each == 0, "weight must hold k components");
  if (bias)
    VLKERN_CHECK(bias->numel() == weight.size(0) && bias->scalar_type() == ScalarType::Float,
                 "bias must be [P] float32");
  Inputs in{torch::stable::contiguous(hidden),
            torch::stable::contiguous(weight),
            torch::stable::contiguous(target),
            {},
            {hidden.size(0), hidden.size(1), weight.size(0) / each, d, joint}};
  if (bias) in.bias = torch::stable::contiguous(*bias);
  return in;
}

std::tuple<Tensor, Tensor> linear_gmm_nll(const Tensor& hidden, const Tensor& weight,
                                          const std::optional<Tensor>& bias, const Tensor& target, bool joint,
                                          double min_scale) {
  const Inputs in = check(hidden, weight, bias, target, joint);
  const Shape& s = in.shape;
  Tensor nll = joint ? empty(hidden, {s.n}, ScalarType::Float) : empty(hidden, {s.n, s.d}, ScalarType::Float);
  Tensor log_weights = empty(hidden, {s.n, joint ? s.k : 0}, ScalarType::Float);
  if (s.n)
    dispatch(hidden.scalar_type(), [&]<class T>() {
      Head<T>(s, in.hidden, in.weight, in.bias, in.target, float(min_scale))
          .forward(log_weights.mutable_data_ptr<float>(), nll.mutable_data_ptr<float>());
    });
  return {nll, log_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_gmm_nll_backward(
    const Tensor& grad_, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& target, const Tensor& log_weights_, bool joint, double min_scale, bool of_hidden,
    bool of_weight) {
  const Inputs in = check(hidden, weight, bias, target, joint);
  const Shape& s = in.shape;
  Tensor grad = torch::stable::contiguous(grad_), log_weights = torch::stable::contiguous(log_weights_);
  VLKERN_CHECK(grad.numel() == s.n * s.mixtures() && grad.scalar_type() == ScalarType::Float,
               "grad must be float32, one number for each of nll");
  VLKERN_CHECK(
      log_weights.numel() == (joint ? s.n * s.k : 0) && log_weights.scalar_type() == ScalarType::Float,
      "log_weights must be float32 [N, k] of a joint mixture");
  const ScalarType dtype = hidden.scalar_type();
  auto fresh = [&](std::vector<int64_t> shape, ScalarType type) {
    return s.n ? empty(hidden, shape, type) : zeros(hidden, shape, type);
  };
  Tensor d_hidden = fresh({of_hidden ? s.n : 0, s.width}, dtype);
  Tensor d_weight = fresh({of_weight ? in.weight.size(0) : 0, s.width}, dtype);
  Tensor d_bias = fresh({bias ? in.weight.size(0) : 0}, ScalarType::Float);
  Tensor d_target = fresh({s.n, s.d}, target.scalar_type());
  if (s.n)
    dispatch(dtype, [&]<class T>() {
      Buffer sum = buffer(s.n * s.d);
      Head<T>(s, in.hidden, in.weight, in.bias, in.target, float(min_scale))
          .backward(grad.const_data_ptr<float>(), log_weights.const_data_ptr<float>(),
                    {of_hidden ? d_hidden.mutable_data_ptr<T>() : nullptr,
                     of_weight ? d_weight.mutable_data_ptr<T>() : nullptr,
                     bias ? d_bias.mutable_data_ptr<float>() : nullptr, sum.get()});
      dispatch(target.scalar_type(),
               [&]<class Z>() { narrow(sum.get(), d_target.mutable_data_ptr<Z>(), s.n * s.d); });
    });
  return {d_hidden, d_weight, d_bias, d_target};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("linear_gmm_nll.cpu", TORCH_BOX(&linear_gmm_nll));
  m.impl("linear_gmm_nll_backward.cpu", TORCH_BOX(&linear_gmm_nll_backward));
}

}  // namespace vlkern
