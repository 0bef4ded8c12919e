// Tasks on several threads, for code without PyTorch's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace vlkern {

// f(task) for every task < count on at most so many threads. The first exception of any of them is thrown
// again here.
template <class F>
void on_threads(int64_t count, int threads, F f) {
  std::atomic<int64_t> next = 0;
  std::exception_ptr failure;
  std::mutex guard;
  auto work = [&] {
    for (int64_t task; (task = next.fetch_add(1)) < count;) {
      try {
        f(task);
      } catch (...) {
        std::lock_guard lock(guard);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(threads, count); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace vlkern
