// A CUDA runtime on the CPU, so that the kernels' indices, masks, barriers and sums are tested without a GPU.
//
// Blocks run one after the other; the threads of a block are fibers that change places at barriers and
// shuffles. A barrier that some thread of the block never reaches ends the process. It says nothing about
// races between barriers, caches or speed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = void*;
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;

inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 3  // few, so that persistent blocks take several rows
           : which == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 100 << 10
                                                                  : 99 << 10;
  return cudaSuccess;
}

namespace emulator {
inline size_t shared_bytes = 48 << 10;  // that the next launch may ask for
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);
void block_barrier();
void warp_barrier();
char* lane_slot(int lane);  // 8 bytes a lane of the current warp
int lane();
}  // namespace emulator

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

#include "asynchronous.h"

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  emulator::shared_bytes = size_t(bytes);
  return cudaSuccess;
}

[[noreturn]] inline void __trap() {
  std::abort();
}
inline void __syncthreads() {
  emulator::block_barrier();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  if (mask != 0xffffffffu) std::abort();
  std::memcpy(emulator::lane_slot(emulator::lane()), &value, sizeof(T));
  emulator::warp_barrier();
  std::memcpy(&value, emulator::lane_slot(lane), sizeof(T));
  emulator::warp_barrier();
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int across) {
  return __shfl_sync(mask, value, emulator::lane() ^ across);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  if (mask != 0xffffffffu) std::abort();
  *emulator::lane_slot(emulator::lane()) = vote;
  emulator::warp_barrier();
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= unsigned(*emulator::lane_slot(lane)) << lane;
  emulator::warp_barrier();
  return votes;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  dim3 grid = config->gridDim, block = config->blockDim;
  if (block.x * block.y * block.z > 1024 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      config->dynamicSmemBytes > emulator::shared_bytes || config->dynamicSmemBytes > 99 << 10)
    return cudaErrorInvalidConfiguration;
  emulator::run(grid, block, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  emulator::shared_bytes = 48 << 10;
  return cudaSuccess;
}
