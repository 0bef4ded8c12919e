// Products of small matrices by a warp on the tensor cores, of bfloat16 or float16 into float32, and int8
// widened for them. g = lane / 4 and t = lane % 4 say which elements a lane holds. Compute capability 8.0 or
// later.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace vlkern::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Two numbers in a word, the first in its low half.
template <class T>
struct alignas(4) Two {
  T low, high;
};

template <class T>
__device__ uint32_t pack(float low, float high) {
  return std::bit_cast<uint32_t>(Two<T>{T(low), T(high)});
}

template <class T>
__device__ Two<T> unpack(uint32_t word) {
  return std::bit_cast<Two<T>>(word);
}

// d [16, 8] += a [16, 16] b [16, 8]. Words hold two numbers with neighbouring indices of the sum.
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)     b: (2t, g), (2t + 8, g)
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <class T>
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::multiply<T>(d, a, b);
#endif
}

// The transpose of an 8 x 8 matrix of 16-bit numbers: word t of row g holds columns 2t and 2t + 1.
__device__ inline uint32_t transpose(uint32_t word) {
#ifdef __CUDACC__
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
  return out;
#else
  return emulator::transpose(word);
#endif
}

template <class T>
__device__ uint32_t add_two(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t out;
  if constexpr (std::is_same_v<T, BFloat16>)  // adding alone is of 9.0
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(0x3f803f80u), "r"(b));
  else
    asm("add.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
#else
  const Two<T> x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(float(x.low) + float(y.low), float(x.high) + float(y.high));
#endif
}

// The int8 in bytes 0 and 2 of the word as numbers of T, exactly; its other bytes do not matter.
//   bfloat16: 0x4300 | the lower seven bits = 128 + these; 0xc300 | the sign bit = -128 or, if it is set,
//   -256 float16:  0x6400 | the byte with its sign bit turned = 1024 + 128 + int8; 0xe480 = -1152
template <class T>
__device__ uint32_t widen(uint32_t word) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return add_two<T>((word & 0x007f007fu) | 0x43004300u, (word & 0x00800080u) | 0xc300c300u);
  else
    return add_two<T>((word & 0x00ff00ffu) ^ 0x64806480u, 0xe480e480u);
}

}  // namespace vlkern::cuda
