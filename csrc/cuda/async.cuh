// Copies from global to shared memory that run on while their threads do something else (cp.async), barriers
// in shared memory that count their arrivals (mbarrier), and barriers of some of a block's warps. Compute
// capability 8.0 or later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vlkern::cuda {

// Shared memory whose size the launch gives.
__device__ inline char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) char memory[];
  return memory;
#else
  return emulator::dynamic_shared();
#endif
}

__device__ inline unsigned shared_address(const void* p) {
#ifdef __CUDACC__
  return unsigned(__cvta_generic_to_shared(p));
#else
  return unsigned(reinterpret_cast<uintptr_t>(p));
#endif
}

// kBytes, 4, 8 or 16, to an address in shared memory; zeros, and `from` is not read, where it is not `real`.
// Both addresses are multiples of kBytes.
template <int kBytes>
__device__ void copy_async(void* to, const void* from, bool real) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDACC__
  const int read = real ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(read)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(read), "n"(kBytes)
                 : "memory");
#else
  emulator::copy_later(to, from, kBytes, real);
#endif
}

// Until this thread's copies are done, as they must be before it ends.
__device__ inline void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A barrier in shared memory. Phases are counted from 0; one ends with the arrival that makes the count full.
class Gate {
 public:
  __device__ void init(unsigned count) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&state_)), "r"(count) : "memory");
#else
    emulator::gate_init(&state_, count);
#endif
  }

  __device__ void arrive() {
#ifdef __CUDACC__
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(&state_))
                 : "memory");
#else
    emulator::gate_arrive(&state_);
#endif
  }

  // Arrives once this thread's copies so far are done, without waiting for them.
  __device__ void arrive_after_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&state_)) : "memory");
#else
    emulator::gate_arrive_after_copies(&state_);
#endif
  }

  // Until the last phase of this parity, or a later one, is over.
  __device__ void wait(unsigned parity) const {
#ifdef __CUDACC__
    for (unsigned over = 0; !over;) {
#if __CUDA_ARCH__ >= 900  // the thread may sleep meanwhile
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(over)
                   : "r"(shared_address(&state_)), "r"(parity)
                   : "memory");
#else
      asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(over)
                   : "r"(shared_address(&state_)), "r"(parity)
                   : "memory");
#endif
    }
#else
    emulator::gate_wait(&state_, parity);
#endif
  }

 private:
  uint64_t state_;
};

// Barrier number `id`, 1 to 15, for so many threads of the block (whole warps); number 0 is __syncthreads.
__device__ inline void named_barrier(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::named_barrier(id, threads);
#endif
}

}  // namespace vlkern::cuda
