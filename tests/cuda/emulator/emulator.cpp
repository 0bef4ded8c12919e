// The fibers of cuda_runtime.h, what PyTorch and cuBLAS offer on a machine with a GPU, and the kernels of one
// room.
#include <setjmp.h>
#include <ucontext.h>

#include "cuda/blas.cuh"

#include <deque>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  jmp_buf here;  // where it waits; unlike swapcontext, a jump asks nothing of the kernel
  bool running = false, begun = false;
};

std::vector<Fiber> fibers(1024);
std::vector<Barrier> warps(32), named(16);
Barrier whole;
char slots[32][32][8];
jmp_buf scheduler;
const std::function<void()>* body;
int current, count, steps;  // steps: arrivals at barriers and returns from the kernel

// Copies and arrivals that wait for them, in the order in which they were asked for.
struct Pending {
  void* to;
  const void* from;  // null: zeros
  int bytes;
  uint64_t* gate;  // or an arrival there
};
std::deque<Pending> pending;
alignas(128) char shared[99 << 10];
Words brought[32], taken[32];

struct Gate {
  uint16_t count, left;
  uint32_t phase;
};

void start() {
  (*body)();
  fibers[current].running = false;
  ++steps;
  _longjmp(scheduler, 1);
}

// The current thread gives way; the scheduler lets it go on.
void give_way() {
  if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

void go_on() {
  if (_setjmp(scheduler)) return;
  if (fibers[current].begun) _longjmp(fibers[current].here, 1);
  fibers[current].begun = true;
  setcontext(&fibers[current].context);
}

void wait(Barrier& barrier, int members) {
  int generation = barrier.generation;
  ++steps;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) give_way();
}

// What has been put off, up to the end of a gate's phase. False: there was nothing.
bool catch_up() {
  if (pending.empty()) return false;
  for (bool over = false; !over && !pending.empty();) {
    const Pending p = pending.front();
    pending.pop_front();
    if (p.gate) {
      const uint32_t before = std::bit_cast<Gate>(*p.gate).phase;
      gate_arrive(p.gate);
      over = std::bit_cast<Gate>(*p.gate).phase != before;
    } else if (p.from) {
      std::memcpy(p.to, p.from, p.bytes);
    } else {
      std::memset(p.to, 0, p.bytes);
    }
  }
  return true;
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start, 0);
  fiber.running = true, fiber.begun = false;
}

void run_block() {
  for (int t = 0; t < count; ++t) prepare(fibers[t]);
  for (int before = -1; before != steps || catch_up();) {
    before = steps;
    for (current = 0; current < count; ++current) {
      if (!fibers[current].running) continue;
      threadIdx = dim3(current % blockDim.x, current / blockDim.x);
      go_on();
    }
  }
  for (int t = 0; t < count; ++t)
    if (fibers[t].running) {
      std::fprintf(stderr, "thread %d of block (%u, %u) waits for threads that never come\n", t, blockIdx.x,
                   blockIdx.y);
      std::abort();
    }
}

}  // namespace

// Every second launch takes the blocks from the last to the first: their order must not matter.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  static bool backwards = true;
  backwards = !backwards;
  gridDim = grid, blockDim = block, body = &thread;
  count = int(block.x * block.y), steps = 0;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    const unsigned at = backwards ? grid.x * grid.y - 1 - i : i;
    blockIdx = dim3(at % grid.x, at / grid.x);
    std::memset(shared, 0xff, shared_bytes);
    run_block();
  }
}

char* dynamic_shared() {
  return shared;
}

void copy_later(void* to, const void* from, int bytes, bool real) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes || to < shared ||
      static_cast<char*>(to) + bytes > shared + sizeof shared) {
    std::fprintf(stderr, "a copy of %d bytes from %p to %p\n", bytes, from, to);
    std::abort();
  }
  pending.push_back({to, real ? from : nullptr, bytes, nullptr});
}

void gate_init(uint64_t* state, unsigned members) {
  *state = std::bit_cast<uint64_t>(Gate{uint16_t(members), uint16_t(members), 0});
}
void gate_arrive(uint64_t* state) {
  auto gate = std::bit_cast<Gate>(*state);
  ++steps;
  if (--gate.left == 0) gate.left = gate.count, ++gate.phase;
  *state = std::bit_cast<uint64_t>(gate);
}
void gate_arrive_after_copies(uint64_t* state) {
  pending.push_back({nullptr, nullptr, 0, state});
}
void gate_wait(const uint64_t* state, unsigned parity) {
  while (std::bit_cast<Gate>(*state).phase % 2 == parity) give_way();
}
void named_barrier(int id, int threads) {
  wait(named[id], threads);
}

void together(uint32_t (&words)[kWords], void (*step)(const Words& in, Words& out)) {
  const int warp = current / kLanes;
  std::memcpy(brought[warp][lane()], words, sizeof words);
  if (warps[warp].arrived + 1 == kLanes) step(brought[warp], taken[warp]);
  warp_barrier();
  std::memcpy(words, taken[warp][lane()], sizeof words);
}

int lane() {
  return current % 32;
}
char* lane_slot(int lane) {
  return slots[current / 32][lane];
}
void block_barrier() {
  wait(whole, count);
}
void warp_barrier() {
  wait(warps[current / 32], 32);
}  // a warp that is not whole never meets

template <class T>
void gemm(int transa, int transb, int m, int n, int k, const T* a, int lda, const T* b, int ldb, float beta,
          float* c, int ldc) {
  for (int64_t col = 0; col < n; ++col)
    for (int64_t row = 0; row < m; ++row) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i)
        sum += double(float(a[transa ? i + row * lda : row + i * lda])) *
               double(float(b[transb ? col + i * ldb : i + col * ldb]));
      float& out = c[row + col * ldc];
      out = float(sum) + (beta == 0 ? 0 : beta * out);
    }
}

}  // namespace emulator

extern "C" {

// Column-major C = op(A) op(B) + beta C, as cuBLAS documents it.
__attribute__((visibility("default"))) int cublasGemmEx(void*, int transa, int transb, int m, int n, int k,
                                                        const float* alpha, const void* a, int type, int lda,
                                                        const void* b, int b_type, int ldb, const float* beta,
                                                        void* c, int c_type, int ldc, int compute,
                                                        int algorithm) {
  bool leading = lda >= (transa ? k : m) && ldb >= (transb ? n : k) && ldc >= m;
  if (*alpha != 1 || type != b_type || c_type != CUDA_R_32F || compute != 68 || algorithm != -1 || !leading)
    return 7;
  auto call = [&]<class T>() {
    emulator::gemm(transa, transb, m, n, k, static_cast<const T*>(a), lda, static_cast<const T*>(b), ldb,
                   *beta, static_cast<float*>(c), ldc);
  };
  if (type == CUDA_R_32F) call.operator()<float>();
  if (type == CUDA_R_16F) call.operator()<torch::headeronly::Half>();
  if (type == CUDA_R_16BF) call.operator()<torch::headeronly::BFloat16>();
  return 0;
}

AOTITorchError torch_get_current_cuda_blas_handle(void** handle) {
  return *handle = nullptr, 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  return *stream = nullptr, 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  return *guard = nullptr, 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return 0;
}
}

#define CUDA CPU  // the room's overloads take CPU tensors
#include VLKERN_SOURCE
