// Decode attention on NVIDIA GPUs: one launch. A block takes one part of a row's keys for one key head. Its
// last warp copies them, a stage of 16 keys after the other, into a ring in shared memory, as far ahead as
// there is room; the other warps take turns at the stages, each with a streaming softmax of its own
// (cuda_tile.cuh). So nobody waits for anybody but for memory. At the end a block adds up its warps' sums,
// and the last block of a row's parts to be done adds up the parts, in their order.
//
// Lengths are read on the device: the launch depends on shapes alone.
#include <initializer_list>

#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda_tile.cuh"

namespace vlkern {
namespace decode {
namespace {

using cuda::Gate;

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kConsumed = 1;  // the barrier of the warps that compute

// Copies the stages of one side of the cache; a warp's lanes share out the rows, or several rows if they are
// short.
template <int kPiece>
struct Copier {
  const Stored& x;
  const char* from;
  int width, pieces, row, rows, column;

  __device__ Copier(const Stored& x, int b, int head, int lane)
      : x(x), from(x.data + b * x.row + head * x.head), width(1), pieces(x.bytes / kPiece) {
    while (width < pieces && width < 32) width *= 2;
    row = lane / width, rows = 32 / width, column = lane % width;
  }

  // 16 keys from `slot` on, around the end of the ring, of which `real` are there and the others zeros.
  __device__ void stage(char* to, int slot, int slots, int real) const {
#pragma unroll 4
    for (int r = row; r < kKeys; r += rows) {
      int at = slot + r;
      at = at < slots ? at : at - slots;
      const char* source = r < real ? from + at * x.slot : from;
      for (int c = column; c < pieces; c += width)
        cuda::copy_async<kPiece>(to + r * x.pitch + c * kPiece, source + c * kPiece, r < real);
    }
  }
};

template <int kPiece>
__device__ void copy_keys(const Call& call, const Layout& at, const Span& span, int b, int head, int lane) {
  char* shared = cuda::dynamic_shared();
  Gate *full = reinterpret_cast<Gate*>(shared + at.full), *empty = reinterpret_cast<Gate*>(shared + at.empty);
  const Copier<kPiece> keys(call.k, b, head, lane), values(call.v, b, head, lane);
  const Stored& coded = lane < kKeys ? call.k : call.v;
  const float* scale = coded.scale ? coded.scale + b * coded.scale_row + head * coded.scale_head : nullptr;
  int slot = span.begin % call.slots;
  unsigned stage = 0, round = 0;
  for (int begin = span.begin; begin < span.end; begin += kKeys) {
    if (round > 0) empty[stage].wait((round - 1) & 1);
    const int real = span.end - begin;
    char* ring = shared + at.ring + stage * at.stage;
    keys.stage(ring, slot, call.slots, real);
    values.stage(ring + at.values, slot, call.slots, real);
    if (scale) {
      const int r = lane % kKeys, from = slot + r < call.slots ? slot + r : slot + r - call.slots;
      cuda::copy_async<4>(shared + at.scales + (stage * 32 + lane) * 4,
                          r < real ? scale + from * coded.scale_slot : scale, r < real);
    }
    full[stage].arrive_after_copies();
    slot += kKeys;
    slot = slot < call.slots ? slot : slot - call.slots;
    if (++stage == unsigned(call.stages)) stage = 0, ++round;
  }
  cuda::wait_for_copies();
}

// Columns that a product reads beyond a row's own must be finite.
__device__ void clear(char* rows, int count, const Stored& x, int padded) {
  const int words = (padded - x.bytes) / 8;
  for (int i = int(threadIdx.x); i < count * words; i += 32 * kConsumers)
    *reinterpret_cast<uint64_t*>(rows + i / words * x.pitch + x.bytes + i % words * 8) = 0;
}

// The sum over `count` parts of one query, of which a lane takes four columns. Part i has its sums at sums +
// i stride and its largest score and sum of weights at stats + i stats_stride; kFresh: other blocks have just
// written them.
template <bool kFresh>
__device__ float2 merge(const float* stats, int64_t stats_stride, const float* sums, int64_t stride,
                        int count, int lane, bool inside, float (&sum)[4]) {
  auto read = [](const float* p) {
    if constexpr (kFresh) return __ldcg(p);
    return *p;
  };
  float top = -INFINITY;
  for (int i = lane; i < count; i += 32) top = fmaxf(top, read(stats + i * stats_stride));
#pragma unroll
  for (int across = 16; across > 0; across /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, across));
  const float shift = top == -INFINITY ? 0.0f : top;
  float total = 0;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float weight = exp2f(read(stats + i * stats_stride) - shift);
    total = fmaf(weight, read(stats + i * stats_stride + 1), total);
    const auto* p = reinterpret_cast<const uint4*>(sums + i * stride);
    uint4 words{};
    if (inside) {
      if constexpr (kFresh)
        words = __ldcg(p);
      else
        words = *p;
    }
    const auto x = std::bit_cast<cuda::Vector<float>>(words);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] = fmaf(weight, x.at[k], sum[k]);
  }
  return {top, total};
}

// Which queries a block has.
struct Queries {
  const Call& call;
  int b, head, block, count;

  // Of the block's query n, in [B, L, H].
  __device__ int64_t row(int n) const {
    const int r = block * call.block_queries() + n, token = r / call.group();
    return (int64_t(b) * call.tokens + token) * call.heads + head * call.group() + r % call.group();
  }
};

template <class T>
__device__ void write(const Queries& queries, int n, int column, float2 stats, const float (&sum)[4]) {
  const int columns = queries.call.v.columns;
  if (column >= columns) return;
  T* out = static_cast<T*>(queries.call.out) + queries.row(n) * columns + column;
  const float share = stats.y > 0 ? 1 / stats.y : 0.0f;
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = T(sum[k] * share);
}

template <class T, class E>
__device__ void consume(const Call& call, const Layout& at, const Span& span, const Queries& queries,
                        int part, float2* stats, float* sums) {
  char* shared = cuda::dynamic_shared();
  Gate *full = reinterpret_cast<Gate*>(shared + at.full), *empty = reinterpret_cast<Gate*>(shared + at.empty);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, team = warp % call.teams,
            turns = kConsumers / call.teams;
  using Worker = Tile<T, E>;
  Worker tile(call, lane, reinterpret_cast<float*>(shared + at.scratch) + warp * (kKeys + 1) * kQueries);

  int position[2];  // of queries 2t and 2t + 1; -1: there is none
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = team * kQueries + lane % 4 * 2 + i;
    const int token = (queries.block * call.block_queries() + n) / call.group();
    position[i] = n < queries.count ? span.length - call.tokens + token : -1;
  }
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const int row = key_row(lane / 4);
  int stage = warp / call.teams;
  unsigned parity = 0;
  for (int begin = span.begin + stage * kKeys; begin < span.end; begin += turns * kKeys, stage += turns) {
    if (stage >= call.stages) stage -= call.stages, parity ^= 1;  // a stage is always the same team's
    const char* ring = shared + at.ring + stage * at.stage;
    full[stage].wait(parity);
    float s[4] = {};
    tile.scores(ring, call.k.pitch, shared + at.q, at.q_row, team, s);
    const float* scales = reinterpret_cast<const float*>(shared + at.scales) + stage * 32 + row;
    float higher[2] = {top[0], top[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = begin + row + i / 2;
      if constexpr (sizeof(E) == 1) s[i] *= scales[i / 2];
      s[i] *= call.factor;
      if (call.cap > 0) s[i] = call.cap * tanhf(s[i]);
      const bool seen = j < span.end && j <= position[i % 2] && j > position[i % 2] - call.window;
      s[i] = seen ? s[i] : -INFINITY;
      higher[i % 2] = fmaxf(higher[i % 2], s[i]);
    }
    float fade[2], shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int across = 4; across < 32; across *= 2)
        higher[i] = fmaxf(higher[i], __shfl_xor_sync(0xffffffffu, higher[i], across));
      shift[i] = higher[i] == -INFINITY ? 0.0f : higher[i];  // a query that has seen no key yet
      fade[i] = exp2f(top[i] - shift[i]);
      top[i] = higher[i];
      total[i] *= fade[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = exp2f(s[i] - shift[i % 2]);
      total[i % 2] += s[i];
      if constexpr (sizeof(E) == 1) s[i] *= scales[kKeys + i / 2];
    }
    tile.add(ring + at.values, call.v.pitch, s, fade);
    __syncwarp();
    if (lane == 0) empty[stage].arrive();
  }

  // All stages have been read: the ring becomes the place of the warps' sums.
  cuda::named_barrier(kConsumed, 32 * kConsumers);
  const int columns = call.v.columns;
  float* own = reinterpret_cast<float*>(shared + at.ring);
  float* own_stats = own + kConsumers * kQueries * columns;
  tile.store(own + warp * kQueries * columns);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int across = 4; across < 32; across *= 2) total[i] += __shfl_xor_sync(0xffffffffu, total[i], across);
    if (lane < 4) {
      float* to = own_stats + (warp * kQueries + lane * 2 + i) * 2;
      to[0] = top[i], to[1] = total[i];
    }
  }
  cuda::named_barrier(kConsumed, 32 * kConsumers);
  const int pieces = (columns + 127) / 128;
  for (int task = warp; task < queries.count * pieces; task += kConsumers) {
    const int n = task / pieces, column = task % pieces * 128 + lane * 4, stride = call.block_queries();
    float sum[4] = {};
    const float2 found = merge<false>(own_stats + n * 2, stride * 2, own + n * columns + column,
                                      int64_t(stride) * columns, turns, lane, column < columns, sum);
    if (span.parts == 1) {
      write<T>(queries, n, column, found, sum);
      continue;
    }
    const int64_t to = part * stride + n;
    if (column < columns) cuda::store(sums + to * columns + column, {sum[0], sum[1], sum[2], sum[3]});
    if (lane == 0 && column == 0) stats[to] = found;
  }
}

template <class T, class E>
__global__ void __launch_bounds__(kThreads, 2) attend(Call call) {
  int x = int(blockIdx.x);
  const int block = x % call.blocks;
  x /= call.blocks;
  const int part = x % call.parts;
  x /= call.parts;
  const int head = x % call.key_heads, b = x / call.key_heads;
  const Span span(call, b, part);
  if (part >= span.parts) return;

  const Layout at(call, sizeof(T));
  char* shared = cuda::dynamic_shared();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (int(threadIdx.x) < call.stages) {
    reinterpret_cast<Gate*>(shared + at.full)[threadIdx.x].init(32);
    reinterpret_cast<Gate*>(shared + at.empty)[threadIdx.x].init(unsigned(call.teams));
  }
  __syncthreads();
  if (warp == kConsumers) {
    if (call.k.piece == 16)
      copy_keys<16>(call, at, span, b, head, lane);
    else
      copy_keys<8>(call, at, span, b, head, lane);
    return;
  }

  const int64_t group = (int64_t(b) * call.key_heads + head) * call.blocks + block;
  const bool parted = span.parts > 1, first = threadIdx.x == 0;
  if (parted && first) cuda::open_counter(call.counter + group, call.number);
  const int rest = call.queries() - block * call.block_queries();
  const Queries queries{call, b, head, block, rest < call.block_queries() ? rest : call.block_queries()};
  const int groups = (call.k.columns + 31) / 32 * 4;
  for (int i = int(threadIdx.x); i < call.block_queries() * groups; i += 32 * kConsumers) {
    const int n = i / groups, eight = i % groups;
    const bool real = n < queries.count && eight * 8 < call.k.columns;
    const T* from =
        real ? static_cast<const T*>(call.q) + queries.row(n) * call.k.columns + eight * 8 : nullptr;
    Tile<T, E>::place(call, at, shared + at.q, n, eight, from);
  }
  for (int i = 0; i < call.stages; ++i) {
    char* ring = shared + at.ring + i * at.stage;
    clear(ring, kKeys, call.k, (call.k.columns + 31) / 32 * 32 * int(sizeof(E)));
    clear(ring + at.values, kKeys, call.v, (call.v.columns + 63) / 64 * 64 * int(sizeof(E)));
  }
  cuda::named_barrier(kConsumed, 32 * kConsumers);

  const int64_t rows = parted ? group * call.parts * call.block_queries() : 0;
  const int columns = call.v.columns;
  float2* stats = reinterpret_cast<float2*>(call.stats) + rows;
  float* sums = call.sums + rows * columns;
  consume<T, E>(call, at, span, queries, part, stats, sums);
  if (!parted) return;

  __threadfence();
  cuda::named_barrier(kConsumed, 32 * kConsumers);
  int* last = reinterpret_cast<int*>(shared + at.scratch);
  if (first) *last = cuda::arrive_last(call.counter + group, unsigned(span.parts));
  cuda::named_barrier(kConsumed, 32 * kConsumers);
  if (!*last) return;
  __threadfence();
  const int pieces = (columns + 127) / 128, stride = call.block_queries();
  for (int task = warp; task < queries.count * pieces; task += kConsumers) {
    const int n = task / pieces, column = task % pieces * 128 + lane * 4;
    float sum[4] = {};
    const float2 found = merge<true>(reinterpret_cast<const float*>(stats + n), stride * 2,
                                     sums + int64_t(n) * columns + column, int64_t(stride) * columns,
                                     span.parts, lane, column < columns, sum);
    write<T>(queries, n, column, found, sum);
  }
}

bool whole(const Tensor& x, int64_t bytes) {
  const int64_t size = x.element_size();
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % bytes || x.size(3) * size % bytes) return false;
  for (int d = 0; d < 3; ++d)
    if (x.size(d) > 1 && x.stride(d) * size % bytes) return false;
  return true;
}

// Rows that eight bytes at a time can be copied from.
Tensor in_words(const Tensor& x_) {
  const Tensor x = unit_columns(x_);
  return whole(x, 8) ? x : torch::stable::clone(torch::stable::contiguous(x));
}

Stored stored(const Tensor& x, const std::optional<Tensor>& scale, int multiple) {
  const int64_t size = x.element_size();
  Stored s{static_cast<const char*>(x.const_data_ptr()),
           x.stride(0) * size,
           x.stride(1) * size,
           x.stride(2) * size,
           nullptr,
           0,
           0,
           0,
           int(x.size(3)),
           int(x.size(3) * size),
           0,
           whole(x, 16) ? 16 : 8};
  s.pitch = pitch_of(int(round_up(x.size(3), multiple) * size));
  if (scale) {
    s.scale = scale->const_data_ptr<float>();
    s.scale_row = scale->stride(0), s.scale_slot = scale->stride(1), s.scale_head = scale->stride(2);
  }
  return s;
}

// Fills in teams, blocks and stages: as many as half of a multiprocessor's shared memory has room for, so
// that two blocks share one, or, if that is too few, as a block may have. A stage is always read by the same
// warps, so their number is a multiple of the turns; where there is no room for one in each turn, more warps
// share a stage.
void share_out(const cuda::Stream& stream, Call& call, int size) {
  const int half = stream.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 1024,
            most = stream.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  call.teams = call.queries() <= kQueries ? 1 : call.queries() <= 2 * kQueries ? 2 : 4;
  for (; call.teams <= kConsumers; call.teams *= 2) {
    call.blocks = int(ceil_div(call.queries(), call.block_queries()));
    const int turns = kConsumers / call.teams;
    for (const int room : {half, most}) {
      call.stages = 0;
      const Layout none(call, size);
      call.stages = std::min(kMostStages, (room - none.ring) / none.stage) / turns * turns;
      if (call.stages >= std::max(turns, 2) && none.all <= room) return;
    }
  }
  VLKERN_CHECK(false, "the device has too little shared memory");
}

template <class T, class E>
void launch(const cuda::Stream& stream, const Call& call, int64_t batch) {
  stream.launch_with(Layout(call, sizeof(T)).all, attend<T, E>,
                     cuda::blocks(batch * call.key_heads * call.parts * call.blocks), kThreads, call);
}

Tensor decode_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& length_,
                        const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                        std::optional<int64_t> window, double scale, std::optional<double> softcap) {
  check(q_, k_, v_, length_, k_scale, v_scale);
  VLKERN_CHECK(q_.size(3) <= 256 && v_.size(3) <= 256, "head dims must be at most 256");
  Tensor q = torch::stable::contiguous(q_), length = torch::stable::contiguous(length_);
  if (!cuda::aligned(q.const_data_ptr())) q = torch::stable::clone(q);
  const Tensor k = in_words(k_), v = in_words(v_);
  cuda::Stream stream(q);
  for (const Tensor* t : std::initializer_list<const Tensor*>{&k, &v, &length}) stream.check_device(*t);
  for (const std::optional<Tensor>* t : {&k_scale, &v_scale})
    if (*t) stream.check_device(**t);
  const int64_t batch = q.size(0);
  Tensor out = empty(q, {batch, q.size(1), q.size(2), v.size(3)}, q.scalar_type());
  if (batch == 0) return out;

  constexpr int64_t kEverything = int64_t(1) << 30;
  Call call{};
  call.k = stored(k, k_scale, 32), call.v = stored(v, v_scale, 64);
  call.k.piece = call.v.piece = std::min(call.k.piece, call.v.piece);
  call.q = q.const_data_ptr(), call.out = out.mutable_data_ptr(),
  call.length = length.const_data_ptr<int32_t>();
  call.tokens = int(q.size(1)), call.heads = int(q.size(2)), call.key_heads = int(k.size(2));
  call.slots = int(k.size(1)), call.window = int(std::min(window.value_or(kEverything), kEverything));
  call.cap = float(softcap.value_or(0)) * kLog2E;
  call.factor = softcap ? float(scale / *softcap) : float(scale) * kLog2E;
  share_out(stream, call, int(q.element_size()));
  const int64_t groups = batch * call.key_heads * call.blocks,
                span = std::min<int64_t>(call.slots, int64_t(call.window) + call.tokens - 1);
  const int64_t fair = 2 * stream.multiprocessors() / groups, most = ceil_div(span, kLeastKeys);
  call.parts = int(std::clamp<int64_t>(std::min(fair, most), 1, kMostParts));

  Tensor work;
  if (call.parts > 1) {
    const int64_t rows = groups * call.parts * call.block_queries();
    const int64_t counters = round_up(2 * groups, 4);
    work = empty(q, {counters + rows * (2 + v.size(3))}, ScalarType::Float);
    float* memory = work.mutable_data_ptr<float>();
    call.counter = reinterpret_cast<cuda::Ticket*>(memory), call.number = cuda::new_call();
    call.stats = memory + counters;
    call.sums = call.stats + 2 * rows;
  }
  const bool coded = k.scalar_type() == ScalarType::Char;
  dispatch(q.scalar_type(), [&]<class T>() {
    coded ? launch<T, int8_t>(stream, call, batch) : launch<T, T>(stream, call, batch);
  });
  return out;
}

}  // namespace
}  // namespace decode

STABLE_TORCH_LIBRARY_IMPL(vlkern, CUDA, m) {
  m.impl("decode_attention.cuda", TORCH_BOX(&decode::decode_attention));
}

}  // namespace vlkern
