// 16-byte memory accesses and sums over threads.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

namespace vlkern::cuda {

// As many elements as one thread moves in one access. Addresses must be multiples of 16 bytes.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

template <class T>
__device__ Vector<T> load(const T* p) {
  return std::bit_cast<Vector<T>>(*reinterpret_cast<const uint4*>(p));
}

template <class T>
__device__ void store(T* p, const Vector<T>& v) {
  *reinterpret_cast<uint4*>(p) = std::bit_cast<uint4>(v);
}

template <int kCount>
__device__ void load_floats(const float* p, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    Vector<float> v = load(p + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[i + k] = v.at[k];
  }
}

template <class T, int kCount>
__device__ void store_as(T* p, const float (&values)[kCount]) {
  constexpr int kSize = Vector<T>::kSize;
#pragma unroll
  for (int i = 0; i < kCount; i += kSize) {
    Vector<T> v;
#pragma unroll
    for (int k = 0; k < kSize; ++k) v.at[k] = T(values[i + k]);
    store(p + i, v);
  }
}

inline bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Every lane of the warp gets the sum, added in an order that never changes. All 32 lanes must call it.
template <class T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// Sum over the blockDim.x threads (whole warps) that share threadIdx.y. All threads of the block must call
// it. `warps` is shared memory, one float per warp of the block; two calls in a row must not use the same.
__device__ inline float row_sum(float value, float* warps) {
  value = warp_sum(value);
  if (blockDim.x == 32) return value;
  int per_row = blockDim.x / 32, first = threadIdx.y * per_row;
  if (threadIdx.x % 32 == 0) warps[first + threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < per_row; ++warp) total += warps[first + warp];
  return total;
}

}  // namespace vlkern::cuda
