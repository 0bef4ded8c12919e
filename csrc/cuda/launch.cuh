// How native code reaches the GPU: the device of a tensor, PyTorch's current stream there, launches that are
// checked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "vlkern.h"

namespace vlkern::cuda {

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forget it: the next launch must not report this one's error
  VLKERN_CHECK(false, "CUDA: ", cudaGetErrorString(status));
}

// While it lives, the device of `t` is current. Kernels run on PyTorch's current stream of that device;
// nothing waits.
class Stream {
 public:
  static constexpr int kFreelyShared = 48 << 10;  // bytes; a kernel must ask for more

  explicit Stream(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // An empty grid is no work, not an error.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) const {
    launch_with(0, kernel, grid, block, arguments...);
  }

  // With so many bytes of dynamic shared memory a block.
  template <class... Parameters, class... Arguments>
  void launch_with(int shared, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   Arguments... arguments) const {
    if (grid.x == 0 || grid.y == 0) return;
    if (shared > kFreelyShared)
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = size_t(shared);
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  // Kernels get raw pointers: a tensor from elsewhere would be read at an address that means nothing on this
  // device.
  void check_device(const Tensor& t) const {
    VLKERN_CHECK(t.get_device_index() == device_, "all tensors must be on one CUDA device");
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Number of blocks in x, the only grid dimension that reaches beyond 65535.
inline unsigned blocks(int64_t count) {
  VLKERN_CHECK(count <= INT32_MAX, "too many rows for one launch: ", count);
  return unsigned(count);
}

}  // namespace vlkern::cuda
