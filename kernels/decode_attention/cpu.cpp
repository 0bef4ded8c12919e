// Decode attention on the CPU: checks, tasks, threads. The arithmetic is in cpu_kernel.inc, compiled for each
// instruction set.
#include <atomic>
#include <bit>
#include <cmath>

#include "arena.h"
#include "checks.h"
#include "cpu_problem.h"
#include "share.h"
#include "simd.h"

#define VLKERN_ROOM decode
#define VLKERN_ARITHMETIC "../kernels/decode_attention/cpu_kernel.inc"
// after the two names
#include "levels.inc"

namespace vlkern {
namespace {

using namespace decode;

// Below this many bytes of keys and values waking the other threads would take longer than reading them.
constexpr int64_t kAlone = int64_t(128) << 10;

// Tasks of all rows. Whoever finishes the last task of a row adds up its parts, in their order.
template <class Kernels, class T, class E>
void run(const Problem& p, const int32_t* length, int64_t batch) {
  using Worker = typename Kernels::template Attend<T, E>;
  const int64_t key_bytes = p.key_heads * (p.k.width + p.v.width) * int64_t(sizeof(E));
  std::vector<Row> rows;
  std::vector<int64_t> row_of_task;
  int64_t keys = 0;
  for (int64_t b = 0; b < batch; ++b) {
    rows.push_back(row_of(p, length[b], key_bytes, int64_t(row_of_task.size())));
    row_of_task.insert(row_of_task.end(), rows[b].tasks, b);
    keys += rows[b].hi - rows[b].lo;
  }
  const int64_t tasks = row_of_task.size(), queries = p.queries();
  const int64_t sums = queries * Worker::value_width(p.v.width);
  Arena arena(tasks * (Arena::bytes<float>(sums) + 2 * Arena::bytes<float>(queries)));
  std::vector<typename Kernels::Sums> parts(tasks);
  for (auto& part : parts)
    part = {arena.take<float>(sums), arena.take<float>(queries), arena.take<float>(queries)};
  std::vector<std::atomic<int64_t>> left(batch);
  for (int64_t b = 0; b < batch; ++b) left[b] = rows[b].tasks;
  auto make = [&] {
    return [&, worker = Worker(p)](int64_t t) mutable {
      const int64_t b = row_of_task[t];
      const Row& row = rows[b];
      const int64_t begin = row.lo + (t - row.first_task) * row.chunk;
      worker.task(b, begin, std::min(begin + row.chunk, row.hi), row.hi - 1, parts[t]);
      if (left[b].fetch_sub(1) == 1) worker.finish(b, &parts[row.first_task], row.tasks);
    };
  };
  if (keys * key_bytes > kAlone) return share(tasks, make);
  auto work = make();
  for (int64_t t = 0; t < tasks; ++t) work(t);
}

Stored stored(const Tensor& x, const std::optional<Tensor>& scale) {
  const int64_t size = x.element_size();
  Stored s{static_cast<const char*>(x.const_data_ptr()),
           x.stride(0) * size,
           x.stride(1) * size,
           x.stride(2) * size,
           x.size(3),
           nullptr,
           0,
           0,
           0};
  if (scale) {
    s.scale = scale->const_data_ptr<float>();
    s.scale_row = scale->stride(0), s.scale_slot = scale->stride(1), s.scale_head = scale->stride(2);
  }
  return s;
}

Tensor decode_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& length_,
                        const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                        std::optional<int64_t> window, double scale, std::optional<double> softcap) {
  check(q_, k_, v_, length_, k_scale, v_scale);
  Tensor q = torch::stable::contiguous(q_), k = unit_columns(k_), v = unit_columns(v_),
         length = torch::stable::contiguous(length_);
  Tensor out = empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
  const Problem p{stored(k, k_scale),
                  stored(v, v_scale),
                  q.size(1),
                  q.size(2),
                  k.size(2),
                  k.size(1),
                  window.value_or(0),
                  float(scale),
                  float(softcap.value_or(0)),
                  q.const_data_ptr(),
                  out.mutable_data_ptr()};
  const bool narrow = k.scalar_type() == ScalarType::Char;
  dispatch(q.scalar_type(), [&]<class T>() {
    with_kernels([&]<class Kernels>() {
      const int32_t* lengths = length.const_data_ptr<int32_t>();
      narrow ? run<Kernels, T, int8_t>(p, lengths, q.size(0)) : run<Kernels, T, T>(p, lengths, q.size(0));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlkern, CPU, m) {
  m.impl("decode_attention.cpu", TORCH_BOX(&decode_attention));
}

}  // namespace vlkern
