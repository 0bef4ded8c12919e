#include "threads.h"

#include <unistd.h>

#include <condition_variable>
#include <system_error>
#include <thread>
#include <vector>

namespace vlkern {
namespace {

// Threads that wait for work, started when they are first needed.
class Pool {
 public:
  const pid_t process = getpid();

  void run(int64_t others, const std::function<void()>& work) {
    Job job = {&work, 0};
    {
      std::lock_guard lock(guard_);
      others = start(others);
      waiting_.insert(waiting_.end(), others, &job);
    }
    while (others-- > 0) asked_.notify_one();
    work();
    {
      std::lock_guard lock(guard_);
      std::erase(waiting_, &job);  // nobody came for these
    }
    // The others are nearly done: to be woken would take longer.
    for (int i = 0; i < 100 && job.running > 0; ++i) std::this_thread::yield();
    std::unique_lock lock(guard_);
    done_.wait(lock, [&] { return job.running == 0; });
  }

  // From now on everybody works alone.
  void end() {
    std::vector<std::thread> ended;
    {
      std::lock_guard lock(guard_);
      most_ = 0;
      ended.swap(threads_);
    }
    asked_.notify_all();
    for (std::thread& thread : ended) thread.join();
  }

 private:
  struct Job {
    const std::function<void()>* work;
    std::atomic<int> running;  // threads of the pool
  };

  // How many threads may come, of so many that are wanted. They are made if there are cores and memory for
  // them.
  int64_t start(int64_t wanted) {
    wanted = std::min(wanted, most_);
    try {
      while (int64_t(threads_.size()) < wanted) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
      wanted = int64_t(threads_.size());
    }
    return wanted;
  }

  void serve() {
    std::unique_lock lock(guard_);
    for (;;) {
      asked_.wait(lock, [&] { return most_ == 0 || !waiting_.empty(); });
      if (most_ == 0) return;
      Job& job = *waiting_.back();
      waiting_.pop_back();
      ++job.running;
      lock.unlock();
      (*job.work)();
      lock.lock();
      if (--job.running == 0) done_.notify_all();
    }
  }

  int64_t most_ = std::max<int64_t>(std::thread::hardware_concurrency(), 2) - 1;
  std::mutex guard_;
  std::condition_variable asked_, done_;
  std::vector<std::thread> threads_;
  std::vector<Job*> waiting_;  // one for each thread that may come
};

// The pool of this process. A fork has none of its parent's threads and makes a pool of its own; the other
// one is left as it is, since its locks may be held forever. Pools are never freed: at the end of the process
// somebody may still be in one.
std::atomic<Pool*> current = nullptr;

Pool& pool() {
  Pool* found = current;
  while (!found || found->process != getpid()) {
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

struct End {
  ~End() {
    Pool* const last = current;
    if (last && last->process == getpid()) last->end();
  }
} end;

}  // namespace

void with_helpers(int64_t others, const std::function<void()>& work) {
  if (others > 0)
    pool().run(others, work);
  else
    work();
}

}  // namespace vlkern
