// What kernels use whose warps work at their own pace, and the tensor cores. Copies to shared memory happen
// as late as they may: when no thread of the block can go on without one. Shared memory holds NaN before.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

char* dynamic_shared();
void copy_later(void* to, const void* from, int bytes, bool real);
void gate_init(uint64_t* state, unsigned count);
void gate_arrive(uint64_t* state);
void gate_arrive_after_copies(uint64_t* state);
void gate_wait(const uint64_t* state, unsigned parity);
void named_barrier(int id, int threads);

constexpr int kLanes = 32, kWords = 6;  // that a lane brings to a joint step, at most
using Words = uint32_t[kLanes][kWords];
// All lanes bring their words; `step` sees them all, once, and leaves what each lane takes away.
void together(uint32_t (&words)[kWords], void (*step)(const Words& in, Words& out));

// a [16, 16] and b [16, 8], as csrc/cuda/tensor_core.cuh documents them
template <class T>
void multiply_step(const Words& in, Words& out) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int word = 0; word < 6; ++word) {
      T two[2];
      std::memcpy(two, &in[lane][word], 4);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 2; ++i)
        if (word < 4)
          a[g + word % 2 * 8][2 * t + word / 2 * 8 + i] = float(two[i]);
        else
          b[2 * t + (word - 4) * 8 + i][g] = float(two[i]);
    }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      double sum = 0;
      for (int k = 0; k < 16; ++k)
        sum += double(a[lane / 4 + i / 2 * 8][k]) * double(b[k][lane % 4 * 2 + i % 2]);
      const auto rounded = float(sum);
      std::memcpy(&out[lane][i], &rounded, 4);
    }
}

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t words[kWords] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  together(words, multiply_step<T>);
  float product[4];
  std::memcpy(product, words, sizeof product);
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}

inline uint32_t transpose(uint32_t word) {
  uint32_t words[kWords] = {word};
  together(words, [](const Words& in, Words& out) {
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column) {
        const uint32_t x = in[row * 4 + column / 2][0] >> (column % 2 * 16) & 0xffffu;
        uint32_t& to = out[column * 4 + row / 2][0];
        to = row % 2 ? to | x << 16 : x;
      }
  });
  return words[0];
}

}  // namespace emulator

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};

inline void __syncwarp() {
  emulator::warp_barrier();
}
inline void __threadfence() {}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, decltype(T{}) value) {
  T before = *p;
  *p = before + value;
  return before;
}
template <class T>
T atomicCAS(T* p, decltype(T{}) expected, decltype(T{}) value) {
  T before = *p;
  if (before == expected) *p = value;
  return before;
}
// Byte i of the result is byte (selector >> 4 i) % 8 of b:a.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= unsigned(both >> ((selector >> 4 * i & 7) * 8) & 0xff) << 8 * i;
  return out;
}
