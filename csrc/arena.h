// Scratch memory of one call: a single block, cut into pieces that start at cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vlkern {

class Arena {
 public:
  // With 4 KiB pages a tile kernel spends a third of its time in address translation: ask for 2 MiB ones if
  // it is large.
  explicit Arena(int64_t bytes) {
    int64_t unit = bytes < kPage ? 64 : kPage, size = (bytes + unit) / unit * unit;
    base_ = static_cast<char*>(std::aligned_alloc(unit, size));
    if (!base_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (unit == kPage) madvise(base_, size, MADV_HUGEPAGE);
#endif
  }
  ~Arena() { std::free(base_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  }
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ + used_;
    used_ += bytes<T>(count);
    return reinterpret_cast<T*>(piece);
  }

 private:
  static constexpr int64_t kPage = int64_t(2) << 20;
  int64_t used_ = 0;
  char* base_;
};

}  // namespace vlkern
