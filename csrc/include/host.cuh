// What every launcher needs: properties of the current device, launches with their error, dispatch on dtypes.
#pragma once

#include "device.cuh"

#ifndef __CUDACC_RTC__

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace megatron_ru {

inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  // Clears what is not sticky, so that the next call does not report it again.
  cudaGetLastError();
  return cudaGetErrorString(error);
}

struct Device {
  int multiprocessors, capability;
};

// Of the current device, asked once each.
inline const Device& device() {
  constexpr int kMost = 64;
  static Device known[kMost] = {};
  int index = 0;
  cudaGetDevice(&index);
  Device& found = known[index % kMost];
  if (found.multiprocessors == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    found.capability = 10 * major + minor;
    cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  return found;
}

inline bool aligned(const void* pointer, int64_t stride, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * element_size % 16 == 0;
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared = 0;
  int cluster = 1;
  bool overlaps_previous = false;  // the kernel calls follow_previous_kernel before it touches memory
};

template <typename... Parameters, typename... Arguments>
const char* launch(const LaunchShape& shape, Stream stream, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (shape.overlaps_previous && device().capability >= 90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  return error_text(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Lets a kernel have this much dynamic shared memory; beyond 48 KiB it must be asked for.
template <typename... Parameters>
const char* allow_shared(void (*kernel)(Parameters...), int64_t bytes) {
  if (bytes <= 48 * 1024) return nullptr;
  return error_text(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// Blocks of a one-dimensional grid, which holds 2^31 - 1 of them.
inline unsigned blocks(int64_t wanted) {
  return static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(wanted, 1), 2147483647));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename Function>
const char* for_dtype(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(float{});
    case Dtype::kFloat16:
      return function(Half{});
    case Dtype::kBFloat16:
      return function(BFloat16{});
    default:
      return "float64 has no CUDA kernel";
  }
}

}  // namespace megatron_ru

#endif  // __CUDACC_RTC__
