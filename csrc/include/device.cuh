// What every kernel needs: 16-byte vectors, conversion to fp32 and back, sums over a warp and a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launchers.h"

namespace megatron_ru {

using Half = __half;
using BFloat16 = __nv_bfloat16;

constexpr int kWarp = 32;

// Elements of T in one 16-byte access, the widest a thread can do.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// One 32-bit word of a vector, as fp32 and back.
template <typename T>
struct Word;

template <>
struct Word<float> {
  static constexpr int kSize = 1;
  static __device__ __forceinline__ void unpack(uint32_t word, float* out) { out[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t pack(const float* in) { return __float_as_uint(in[0]); }
};

template <>
struct Word<Half> {
  static constexpr int kSize = 2;
  static __device__ __forceinline__ __half2 pair(uint32_t word) { return *reinterpret_cast<const __half2*>(&word); }
  static __device__ __forceinline__ void unpack(uint32_t word, float* out) {
    const float2 pair = __half22float2(Word::pair(word));
    out[0] = pair.x;
    out[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t pack(const float* in) {
    const __half2 pair = __floats2half2_rn(in[0], in[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct Word<BFloat16> {
  static constexpr int kSize = 2;
  static __device__ __forceinline__ __nv_bfloat162 pair(uint32_t word) {
    return *reinterpret_cast<const __nv_bfloat162*>(&word);
  }
  // bf16 is the upper half of an fp32: a shift and a mask are cheaper than two conversions.
  static __device__ __forceinline__ void unpack(uint32_t word, float* out) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* in) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <typename T>
__device__ __forceinline__ void unpack(const uint4& vector, float (&out)[kVector<T>]) {
  constexpr int size = Word<T>::kSize;
  Word<T>::unpack(vector.x, out);
  Word<T>::unpack(vector.y, out + size);
  Word<T>::unpack(vector.z, out + 2 * size);
  Word<T>::unpack(vector.w, out + 3 * size);
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&in)[kVector<T>]) {
  constexpr int size = Word<T>::kSize;
  return make_uint4(Word<T>::pack(in), Word<T>::pack(in + size), Word<T>::pack(in + 2 * size),
                    Word<T>::pack(in + 3 * size));
}

// 16 bytes by plain accesses, not the read-only path: some callers write where they read.
__device__ __forceinline__ uint4 load_vector(const void* address) { return *static_cast<const uint4*>(address); }
__device__ __forceinline__ void store_vector(void* address, const uint4& vector) {
  *static_cast<uint4*>(address) = vector;
}

// The same with a hint that nobody needs it soon. Measured, not believed (H200, percent of a copy with and without): it helps
// stores beside other loads (backward of GEGLU 101 and 89, of logits 91 and 89) and a kernel that only reads (statistics of
// logits, by 1), and harms loads beside stores (backward of SwiGLU 97 and 101, RoPE 89 and 92), AdamW (90 and 95) and norms
// (88 and 92).
__device__ __forceinline__ uint4 load_streaming(const void* address) {
  return __ldcs(static_cast<const uint4*>(address));
}
__device__ __forceinline__ void store_streaming(void* address, const uint4& vector) {
  __stcs(static_cast<uint4*>(address), vector);
}

// Values that every row shares and that the kernel does not write: weights, angles.
__device__ __forceinline__ uint4 load_shared(const void* address) { return __ldg(static_cast<const uint4*>(address)); }

// kVector<T> numbers of a parameter that is in T or in fp32, as fp32.
template <typename T>
__device__ __forceinline__ void load_parameter(const void* parameter, bool is_float, int64_t first,
                                               float (&out)[kVector<T>]) {
  if (sizeof(T) < sizeof(float) && !is_float) {
    unpack<T>(load_shared(static_cast<const T*>(parameter) + first), out);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T> / 4; ++i) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(parameter) + first) + i);
      out[4 * i] = four.x;
      out[4 * i + 1] = four.y;
      out[4 * i + 2] = four.z;
      out[4 * i + 3] = four.w;
    }
  }
}

template <typename T>
__device__ __forceinline__ float parameter_at(const void* parameter, bool is_float, int64_t index) {
  return is_float ? static_cast<const float*>(parameter)[index] : to_float(static_cast<const T*>(parameter)[index]);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// exp through the special function unit, 2 ulp: 2^(x log2 e).
constexpr float kLog2e = 1.4426950408889634f;
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The tensor that a block belongs to, in a table of `count` tensors whose blocks begin at `first_block`.
template <typename Table>
__device__ __forceinline__ int tensor_of(const Table& table, int block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Programmatic dependent launch (compute capability 9.0): the blocks of a kernel take their places while the one before
// drains. This waits until that one's results are visible, and lets the next kernel do the same as soon as every block
// of this one has begun. Worth about 3 us a kernel on an H200.
__device__ __forceinline__ void follow_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes from global to shared memory, in the background where the hardware can (compute capability 8.0). A thread
// that reads back only what it copied itself needs no barrier: it waits for its own groups of copies.
__device__ __forceinline__ void copy_in_background(uint4* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
  *shared = *static_cast<const uint4*>(global);
#endif
}
__device__ __forceinline__ void end_group_of_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until all but the last kPending groups of this thread have arrived.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace megatron_ru
