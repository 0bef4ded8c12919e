// Tasks on several threads, for code without PyTorch's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace vlkern {

// Calls `work` here and, as far as the machine has cores and they are not at something else, on up to
// `others` threads more that wait for such calls. Returns when all of these calls have; `work` must not
// throw.
void with_helpers(int64_t others, const std::function<void()>& work);

// f(task) for every task < count on at most so many threads. The first exception of any of them is thrown
// again here.
template <class F>
void on_threads(int64_t count, int threads, F f) {
  std::atomic<int64_t> next = 0;
  std::exception_ptr failure;
  std::mutex guard;
  with_helpers(std::min<int64_t>(threads, count) - 1, [&] {
    for (int64_t task; (task = next.fetch_add(1)) < count;) {
      try {
        f(task);
      } catch (...) {
        std::lock_guard lock(guard);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace vlkern
