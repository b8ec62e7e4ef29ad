// Finds the gradients that hold a NaN or an infinity, in one read of all of them, and makes those tensors zero.
#include "include/host.cuh"

namespace megatron_ru {
namespace {

// Tensors of one launch: they travel as a kernel parameter, which holds 4 KiB.
constexpr int kTensors = 160;
constexpr int kBlock = 512;
// Bytes that a block reads.
constexpr int64_t kChunk = 64 * 1024;

struct Table {
  void* tensors[kTensors];
  int64_t bytes[kTensors];
  int32_t first_block[kTensors + 1];
  int32_t count;
  int32_t* flags;
};

// Whether a word holds a non-finite number: its exponent is all ones. `magnitude` keeps the largest word without signs.
template <typename T>
__device__ __forceinline__ void keep_largest(uint32_t word, uint32_t& magnitude) {
  if (sizeof(T) == 4) {
    magnitude = max(magnitude, word & 0x7fffffffu);
  } else {
    magnitude = __vmaxu2(magnitude, word & 0x7fff7fffu);
  }
}

template <typename T>
__device__ __forceinline__ bool is_nonfinite(uint32_t magnitude);
template <>
__device__ __forceinline__ bool is_nonfinite<float>(uint32_t magnitude) {
  return magnitude >= 0x7f800000u;
}
template <>
__device__ __forceinline__ bool is_nonfinite<Half>(uint32_t magnitude) {
  return (magnitude & 0xffffu) >= 0x7c00u || (magnitude >> 16) >= 0x7c00u;
}
template <>
__device__ __forceinline__ bool is_nonfinite<BFloat16>(uint32_t magnitude) {
  return (magnitude & 0xffffu) >= 0x7f80u || (magnitude >> 16) >= 0x7f80u;
}

template <typename T>
__global__ void __launch_bounds__(kBlock) scan_kernel(const __grid_constant__ Table table) {
  constexpr int kAhead = static_cast<int>(kChunk / 16 / kBlock);
  const int tensor = tensor_of(table, blockIdx.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[tensor]) * kChunk;
  const int64_t bytes = min(kChunk, table.bytes[tensor] - begin);
  const char* data = static_cast<const char*>(table.tensors[tensor]) + begin;
  follow_previous_kernel();
  uint32_t magnitude = 0;
  if (bytes == kChunk && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
    uint4 raw[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) raw[i] = load_streaming(data + (i * kBlock + threadIdx.x) * 16);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      keep_largest<T>(raw[i].x, magnitude);
      keep_largest<T>(raw[i].y, magnitude);
      keep_largest<T>(raw[i].z, magnitude);
      keep_largest<T>(raw[i].w, magnitude);
    }
  } else {
    for (int64_t i = threadIdx.x; i < bytes / static_cast<int64_t>(sizeof(T)); i += kBlock) {
      if (sizeof(T) == 4)
        keep_largest<T>(reinterpret_cast<const uint32_t*>(data)[i], magnitude);
      else
        keep_largest<T>(reinterpret_cast<const unsigned short*>(data)[i], magnitude);
    }
  }
  // Every block that finds something writes the same number.
  if (is_nonfinite<T>(magnitude)) table.flags[tensor] = 1;
}

__global__ void __launch_bounds__(kBlock) zero_kernel(const __grid_constant__ Table table) {
  __shared__ int32_t flags[kTensors];
  follow_previous_kernel();
  int32_t flag = 0;
  if (threadIdx.x < table.count) flags[threadIdx.x] = flag = table.flags[threadIdx.x];
  if (!__syncthreads_or(flag)) return;
  for (int tensor = 0; tensor < table.count; ++tensor) {
    if (flags[tensor] == 0) continue;
    char* data = static_cast<char*>(table.tensors[tensor]);
    const int64_t bytes = table.bytes[tensor], stride = static_cast<int64_t>(gridDim.x) * kBlock;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    const int64_t words = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? bytes / 16 : 0;
    for (int64_t i = thread; i < words; i += stride) reinterpret_cast<uint4*>(data)[i] = make_uint4(0, 0, 0, 0);
    for (int64_t i = 16 * words + thread; i < bytes; i += stride) data[i] = 0;
  }
}

}  // namespace
}  // namespace megatron_ru

#ifndef __CUDACC_RTC__

namespace megatron_ru {

const char* gradient_guard_cuda(const GradientGuard& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    for (int64_t first = 0; first < call.count;) {
      Table table{};
      table.flags = call.flags + first;
      int64_t next_block = 0;
      while (first < call.count && table.count < kTensors) {
        const int64_t bytes = call.sizes[first] * static_cast<int64_t>(sizeof(T));
        const int64_t chunks = ceil_div(bytes, kChunk);
        if (next_block + chunks > 2147483647) {
          if (table.count == 0) return "a tensor of more than 128 TiB";
          break;
        }
        table.tensors[table.count] = call.tensors[first];
        table.bytes[table.count] = bytes;
        table.first_block[table.count] = static_cast<int32_t>(next_block);
        next_block += chunks;
        ++table.count;
        ++first;
      }
      // Empty tensors share their first block with the next one; the last that begins there is the one with data.
      table.first_block[table.count] = static_cast<int32_t>(next_block);
      if (next_block == 0) continue;
      LaunchShape scan{dim3(blocks(next_block)), dim3(kBlock)};
      scan.overlaps_previous = true;
      const char* error = launch(scan, stream, scan_kernel<T>, table);
      if (error != nullptr) return error;
      LaunchShape fill{dim3(blocks(std::min<int64_t>(next_block, device().multiprocessors))), dim3(kBlock)};
      fill.overlaps_previous = true;
      error = launch(fill, stream, zero_kernel, table);
      if (error != nullptr) return error;
    }
    return nullptr;
  });
}

}  // namespace megatron_ru

#else

// Instantiations for a compiler that knows no launches, which checks other architectures.
template __global__ void megatron_ru::scan_kernel<float>(const __grid_constant__ megatron_ru::Table);
template __global__ void megatron_ru::scan_kernel<megatron_ru::BFloat16>(const __grid_constant__ megatron_ru::Table);

#endif
