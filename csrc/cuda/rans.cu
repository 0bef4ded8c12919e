// Streams of rANS (host/rans.h) to symbols on NVIDIA GPUs, by the steps of the host (rans_states.h,
// mixture_cdf.h).
//
// A warp decodes a stream, round by round: neighbouring symbols belong to neighbouring lanes, so each thread
// has one symbol and the state of its lane. The words of a round lie one after the other in the order of the
// lanes. Which threads need some is known by a ballot, and the bits below a thread's own say where its words
// are. Escapes, of which there are few, are read by all threads together, one after the other.
//
// Nothing that lies on the device is trusted: whatever the bytes, tables, rows and mixtures are, no address
// leaves its memory. The first thing that is wrong ends a stream, and is its status.
#include "rans_states.h"

#include <initializer_list>
#include <optional>
#include <tuple>

#include "cuda/launch.cuh"
#include "mixture_cdf.h"
#include "vlkern.h"

namespace vlkern {
namespace {

using cuda::Stream;
using mixture::Mixture;
using rans::Escape;
using rans::Found;
using rans::Range;

constexpr int kWarp = 32, kWarps = 4;  // of a block
constexpr unsigned kAll = 0xffffffffu;

// In the order of the messages in python/vlkern/coding/gpu.py.
enum Status : int32_t {
  kFine,
  kShorterThanStates,
  kStateOutOfRange,
  kEndsTooEarly,
  kEscapeTooLarge,
  kEscapeNotNeeded,
  kStatesDoNotEnd,
  kBytesLeft,
  kNoSuchRow,
  kRowDoesNotRise,
  kNoMixture,
  kNoSuchSpan
};

// A stream: bytes[8 eighth] and on, symbols first ... end - 1. All loads are aligned, then.
struct Span {
  int64_t eighth, bytes, first, end;
};

struct Streams {
  const char* bytes;
  int64_t size;
  const Span* spans;
  int64_t count, symbols;

  __device__ bool holds(const Span& s) const {
    return s.bytes >= 0 && s.bytes <= size && s.eighth >= 0 && s.eighth <= (size - s.bytes) / 8 &&
           0 <= s.first && s.first <= s.end && s.end <= symbols;
  }
};

// host/rans_tables.h: symbol i is coded with row index[i], or i.
struct Rows {
  const int32_t *cdf, *size, *offset, *index;
  int64_t rows, width;
  int escape, precision;

  __device__ int64_t row(int64_t i) const { return index ? index[i] : i; }

  __device__ Status find(int64_t i, uint32_t slot, Found& found) const {
    const int64_t r = row(i);
    if (uint64_t(r) >= uint64_t(rows)) return kNoSuchRow;
    const int32_t* at = cdf + r * width;
    const int32_t bins = size[r] - 1;
    if (bins < 1 || bins >= width) return kRowDoesNotRise;
    int32_t bin = 0, end = bins;  // the last one that starts at or before the slot lies in [bin, end)
    while (end - bin > 1) {
      const int32_t middle = (bin + end) / 2;
      (uint32_t(at[middle]) <= slot ? bin : end) = middle;
    }
    const uint32_t start = uint32_t(at[bin]), width = uint32_t(at[bin + 1]) - start, most = 1u << precision;
    if (start >= most || width - 1 >= most || slot - start >= width) return kRowDoesNotRise;
    found = {{start, width}, int32_t(uint32_t(offset[r]) + uint32_t(bin)), bin == bins - escape};
    return kFine;
  }

  __device__ bool holds(int64_t i, int32_t symbol) const {
    const int64_t r = row(i);
    return uint64_t(int64_t(symbol) - offset[r]) < uint64_t(size[r] - 1 - escape);
  }
};

// host/rans_mixtures.h: means, scales, weights [..., components, channels]
struct Mixtures {
  const int32_t* means;
  const uint8_t* scales;
  const int16_t* weights;
  int components;
  int64_t channels;

  __device__ Mixture of(int64_t i) const {
    const int64_t at = i / channels * components * channels + i % channels;
    return {means + at, scales + at, weights + at, components, channels};
  }

  static __device__ bool right(const Mixture& m) {
    int32_t sum = 0;
    bool found = true;
    for (int c = 0; c < m.count; ++c) {
      const int64_t at = c * m.stride;
      const int32_t mean = m.means[at], weight = m.weights[at];
      found &= mean >= -mixture::kMostMean && mean <= mixture::kMostMean && weight >= 0 &&
               m.scales[at] < mixture::kScales;
      sum += weight;
    }
    return found && sum == mixture::kWeights;
  }

  // The symbol in the middle first, as on the host, then by halves.
  __device__ Status find(int64_t i, uint32_t slot, Found& found) const {
    const Mixture m = of(i);
    if (!right(m)) return kNoMixture;
    const mixture::Window w = mixture::window(m);
    const int32_t n = 2 * w.half, before = mixture::before(m, w);
    auto entry = [&](int32_t j) {
      return uint32_t(mixture::entry(before, mixture::cumulative(m, w.low + j - 1), j, n));
    };
    int32_t bin = 0, end = n + 1;  // entry(bin) <= slot < entry(end)
    uint32_t first = 0, last = mixture::kTotal;
    const uint32_t start = entry(w.half), stop = entry(w.half + 1);
    if (slot < start) {
      end = w.half, last = start;
    } else if (slot >= stop) {
      bin = w.half + 1, first = stop;
    } else {
      bin = w.half, end = w.half + 1, first = start, last = stop;
    }
    while (end - bin > 1) {
      const int32_t middle = (bin + end) / 2;
      const uint32_t at = entry(middle);
      if (at <= slot)
        bin = middle, first = at;
      else
        end = middle, last = at;
    }
    found = {{first, last - first}, w.low + bin, bin == n};
    return kFine;
  }

  __device__ bool holds(int64_t i, int32_t symbol) const {
    const mixture::Window w = mixture::window(of(i));
    return symbol >= w.low && symbol < w.low + 2 * w.half;
  }
};

template <class T>
__device__ T load(const char* p) {
  return *reinterpret_cast<const T*>(p);
}

// The same status for all threads of a warp. `rest` holds the states of lanes from kWarp on.
template <class C, class Model>
__device__ Status decode_stream(const Span& span, const char* in, const Model& model, int precision,
                                int lanes, typename C::State* rest, int32_t* symbols) {
  using State = typename C::State;
  using Word = typename C::Word;
  const int thread = int(threadIdx.x % kWarp);
  const unsigned below = (1u << thread) - 1;
  const char* end = in + span.bytes;
  if (span.bytes < int64_t(lanes * sizeof(State))) return kShorterThanStates;

  State held = C::kLeast;  // of lane `thread`
  bool normal = true;
  for (int lane = thread; lane < lanes; lane += kWarp) {
    const State x = load<State>(in + lane * sizeof(State));
    normal &= C::normal(x);
    if (lane == thread)
      held = x;
    else
      rest[lane] = x;
  }
  if (__ballot_sync(kAll, !normal)) return kStateOutOfRange;
  in += lanes * sizeof(State);

  int base = 0;  // the first lane of a round
  for (int64_t first = span.first; first < span.end;) {
    const int active = lanes - base < kWarp ? lanes - base : kWarp;
    const int64_t i = first + thread;
    const bool mine = thread < active && i < span.end;
    State x = C::kLeast;
    Found found{};
    Status status = kFine;
    if (mine) {
      x = base ? rest[base + thread] : held;
      const uint32_t slot = uint32_t(x & ((State(1) << precision) - 1));
      status = model.find(i, slot, found);
      if (status == kFine) x = C::after(x, found.range, slot, precision);
    }

    const int needed = status != kFine || x >= C::kLeast ? 0 : x << C::kWordBits >= C::kLeast ? 1 : 2;
    const unsigned one = __ballot_sync(kAll, needed >= 1);
    const unsigned two = C::kMostWords == 2 ? __ballot_sync(kAll, needed >= 2) : 0;
    if (end - in < ptrdiff_t((__popc(one) + __popc(two)) * sizeof(Word))) return kEndsTooEarly;
    const char* word = in + (__popc(one & below) + __popc(two & below)) * sizeof(Word);
    for (int k = 0; k < needed; ++k, word += sizeof(Word)) x = (x << C::kWordBits) | load<Word>(word);
    in += (__popc(one) + __popc(two)) * sizeof(Word);

    for (unsigned left = __ballot_sync(kAll, found.escaped); left; left &= left - 1) {
      int32_t symbol = 0;
      const Escape read = rans::read_escape(in, end, symbol);
      if (read != Escape::kWhole) return read == Escape::kCut ? kEndsTooEarly : kEscapeTooLarge;
      if (thread == __ffs(int(left)) - 1) {
        found.symbol = symbol;
        if (model.holds(i, symbol)) status = kEscapeNotNeeded;
      }
    }
    if (const unsigned wrong = __ballot_sync(kAll, status != kFine))
      return Status(__shfl_sync(kAll, int(status), __ffs(int(wrong)) - 1));

    if (mine) {
      symbols[i] = found.symbol;
      if (base)
        rest[base + thread] = x;
      else
        held = x;
    }
    first += active;
    base = base + active == lanes ? 0 : base + active;
  }

  bool least = held == C::kLeast;
  for (int lane = thread + kWarp; lane < lanes; lane += kWarp) least &= rest[lane] == C::kLeast;
  if (__ballot_sync(kAll, !least)) return kStatesDoNotEnd;
  return in == end ? kFine : kBytesLeft;
}

template <class C, class Model>
__global__ void __launch_bounds__(kWarp* kWarps)
    decode(Streams streams, Model model, int precision, int lanes, typename C::State* __restrict__ states,
           int32_t* __restrict__ symbols, int32_t* __restrict__ status) {
  const int64_t s = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (s >= streams.count) return;  // a whole warp
  const Span span = streams.spans[s];
  Status found = kNoSuchSpan;
  if (streams.holds(span))
    found = decode_stream<C>(span, streams.bytes + 8 * span.eighth, model, precision, lanes,
                             states + s * lanes, symbols);
  if (threadIdx.x % kWarp == 0) status[s] = found;
}

// bytes uint8 [B], spans int64 [S, 4] -> symbols [count], status [S]
template <class Model>
std::tuple<Tensor, Tensor> launch(const Tensor& bytes, const Tensor& spans, const Model& model, int64_t count,
                                  int64_t kind, int64_t precision, int64_t lanes, const Stream& stream) {
  VLKERN_CHECK(bytes.scalar_type() == ScalarType::Byte && bytes.is_contiguous(),
               "bytes must be uint8 without gaps");
  VLKERN_CHECK(spans.scalar_type() == ScalarType::Long && spans.is_contiguous() && spans.dim() == 2 &&
                   spans.size(1) == 4,
               "spans must be int64 [S, 4] without gaps");
  VLKERN_CHECK(kind >= 0 && kind <= 2 && lanes >= 1 && lanes <= 1024, "kind or lanes out of range");
  VLKERN_CHECK(precision >= 1 && precision <= (kind == 0 ? 30 : 16), "precision out of range");
  const auto* first = static_cast<const char*>(bytes.const_data_ptr());
  VLKERN_CHECK(reinterpret_cast<uintptr_t>(first) % 8 == 0, "bytes must begin at a multiple of 8");
  for (const Tensor* t : {&bytes, &spans}) stream.check_device(*t);
  const int64_t number = spans.size(0);
  const Streams streams{first, bytes.numel(), static_cast<const Span*>(spans.const_data_ptr()), number,
                        count};
  Tensor symbols = empty(bytes, {count}, ScalarType::Int), status = empty(bytes, {number}, ScalarType::Int),
         states = empty(bytes, {number * lanes}, ScalarType::Long);
  rans::with_coder(rans::Kind(kind), [&]<class C>(C) {
    stream.launch(decode<C, Model>, cuda::blocks(ceil_div(number, kWarps)), kWarp * kWarps, streams, model,
                  int(precision), int(lanes), static_cast<typename C::State*>(states.mutable_data_ptr()),
                  symbols.mutable_data_ptr<int32_t>(), status.mutable_data_ptr<int32_t>());
  });
  return {symbols, status};
}

std::tuple<Tensor, Tensor> rans_decode_tables(const Tensor& bytes, const Tensor& spans, const Tensor& cdf,
                                              const Tensor& size, const Tensor& offset,
                                              const std::optional<Tensor>& index, bool escape, int64_t kind,
                                              int64_t precision, int64_t lanes) {
  VLKERN_CHECK(cdf.dim() == 2 && size.numel() == cdf.size(0) && offset.numel() == cdf.size(0),
               "tables must have a size and an offset for each row");
  const Stream stream(bytes);
  for (const Tensor* t : {&cdf, &size, &offset, index ? &*index : &cdf}) {
    VLKERN_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous(),
                 "tables and index must be int32 without gaps");
    stream.check_device(*t);
  }
  const Rows rows{cdf.const_data_ptr<int32_t>(),
                  size.const_data_ptr<int32_t>(),
                  offset.const_data_ptr<int32_t>(),
                  index ? index->const_data_ptr<int32_t>() : nullptr,
                  cdf.size(0),
                  cdf.size(1),
                  escape,
                  int(precision)};
  return launch(bytes, spans, rows, index ? index->numel() : cdf.size(0), kind, precision, lanes, stream);
}

std::tuple<Tensor, Tensor> rans_decode_mixtures(const Tensor& bytes, const Tensor& spans, const Tensor& means,
                                                const Tensor& scales, const Tensor& weights, int64_t kind,
                                                int64_t lanes) {
  VLKERN_CHECK(means.dim() == 3 && means.size(1) >= 1 && means.size(1) <= 16,
               "means must have shape [rows, K, C] with K from 1 to 16");
  VLKERN_CHECK(means.scalar_type() == ScalarType::Int && scales.scalar_type() == ScalarType::Byte &&
                   weights.scalar_type() == ScalarType::Short,
               "means must be int32, scales uint8, weights int16");
  const Stream stream(bytes);
  for (const Tensor* t : {&means, &scales, &weights}) {
    VLKERN_CHECK(t->numel() == means.numel() && t->is_contiguous(),
                 "mixtures must have one shape, without gaps");
    stream.check_device(*t);
  }
  const Mixtures mixtures{means.const_data_ptr<int32_t>(), scales.const_data_ptr<uint8_t>(),
                          weights.const_data_ptr<int16_t>(), int(means.size(1)), means.size(2)};
  return launch(bytes, spans, mixtures, means.size(0) * means.size(2), kind, 16, lanes, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CUDA, m) {
  m.impl("rans_decode_tables", TORCH_BOX(&rans_decode_tables));
  m.impl("rans_decode_mixtures", TORCH_BOX(&rans_decode_mixtures));
}

}  // namespace vlkern
