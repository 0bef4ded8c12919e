// Tasks of different sizes on all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace vlkern {

// Runs work(task) for every task < count on all threads. A thread that is done takes the next one: tasks
// differ in size, and no result depends on who computes it. `make` gives each thread its worker.
template <class Make>
void share(int64_t count, Make make) {
  std::atomic<int64_t> next = 0;
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t task; (task = next.fetch_add(1)) < count;) work(task);
  });
}

}  // namespace vlkern
