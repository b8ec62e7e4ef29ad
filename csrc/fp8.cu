// Rounds a matrix to fp8 with one scale, and lays it down twice: as it is and transposed.
//
// Hopper multiplies fp8 matrices only along their rows' last dimension, so that each operand of the three products of a
// linear layer is needed both ways. The largest magnitude is found in one read, both copies are written in a second.
#include <cuda_fp8.h>

#include "include/host.cuh"

namespace megatron_ru {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;
// A block's tile; its transpose waits in shared memory in words of four rows.
constexpr int kTile = 128;
constexpr int kWords = kTile / 4;

__global__ void zero_kernel(uint32_t* word) {
  follow_previous_kernel();
  *word = 0;
}

// The largest magnitude as the bits of an fp32: they order as the numbers do, and those of a NaN come last.
template <typename T>
__global__ void __launch_bounds__(kThreads) largest_kernel(const T* x, int64_t elements, uint32_t* largest) {
  constexpr int N = kVector<T>;
  follow_previous_kernel();
  uint32_t found = 0;
  const int64_t vectors = elements / N, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; first < vectors; first += kAhead * step) {
    uint4 raw[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) raw[i] = first + i * step < vectors ? load_vector(x + (first + i * step) * N) : uint4{};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float values[N];
      unpack<T>(raw[i], values);
#pragma unroll
      for (int j = 0; j < N; ++j) found = max(found, __float_as_uint(values[j]) & 0x7fffffffu);
    }
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) found = max(found, __shfl_xor_sync(0xffffffffu, found, offset));
  __shared__ uint32_t warps[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = found;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / kWarp; ++i) found = max(found, warps[i]);
    atomicMax(largest, found);
  }
}

__device__ __forceinline__ uint32_t four_to_fp8(float a, float b, float c, float d, __nv_fp8_interpretation_t kind) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kind);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, kind);
  return low | high << 16;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) round_kernel(const RoundFp8 call) {
  constexpr int N = 8;  // columns of one thread
  constexpr int kVectors = kTile / N;
  __shared__ uint32_t turned[kTile * kWords];
  follow_previous_kernel();
  const __nv_fp8_interpretation_t kind = call.e5m2 ? __NV_E5M2 : __NV_E4M3;
  const float limit = call.e5m2 ? 57344.0f : 448.0f, largest = __uint_as_float(*call.largest);
  // Rows of zeros have any scale; a NaN stays one.
  const float scale = largest == 0.0f ? 1.0f : limit / largest;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *call.inverse_scale = largest == 0.0f ? 1.0f : largest / limit;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile, first_column = static_cast<int64_t>(blockIdx.x) * kTile;
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const int64_t column = first_column + vector * N;
  const T* in = static_cast<const T*>(call.in);
#pragma unroll
  for (int part = 0; part < kWords / (kThreads / kVectors); ++part) {
    const int quad = part * (kThreads / kVectors) + static_cast<int>(threadIdx.x) / kVectors;
    float values[4][N];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_row + quad * 4 + i;
      if (row < call.rows && column < call.columns) {
        const T* from = in + row * call.columns + column;
#pragma unroll
        for (int half = 0; half < N / kVector<T>; ++half) {
          float some[kVector<T>];
          unpack<T>(load_vector(from + half * kVector<T>), some);
#pragma unroll
          for (int j = 0; j < kVector<T>; ++j) values[i][half * kVector<T> + j] = some[j] * scale;
        }
        const uint2 packed = make_uint2(four_to_fp8(values[i][0], values[i][1], values[i][2], values[i][3], kind),
                                        four_to_fp8(values[i][4], values[i][5], values[i][6], values[i][7], kind));
        *reinterpret_cast<uint2*>(static_cast<unsigned char*>(call.out) + row * call.columns + column) = packed;
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) values[i][j] = 0.0f;
      }
    }
    // Columns eight apart would meet in one bank: each vector of columns shifts its words by its own number.
#pragma unroll
    for (int j = 0; j < N; ++j)
      turned[(vector * N + j) * kWords + (quad ^ (2 * vector))] =
          four_to_fp8(values[0][j], values[1][j], values[2][j], values[3][j], kind);
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = first_row + lane * 4;
  for (int at = static_cast<int>(threadIdx.x) / kWarp; at < kTile; at += kThreads / kWarp) {
    if (first_column + at >= call.columns) break;
    if (row < call.rows)
      *reinterpret_cast<uint32_t*>(static_cast<unsigned char*>(call.turned) + (first_column + at) * call.rows + row) =
          turned[at * kWords + (lane ^ (2 * (at / N)))];
  }
}

}  // namespace
}  // namespace megatron_ru

#ifndef __CUDACC_RTC__

namespace megatron_ru {

const char* round_fp8_cuda(const RoundFp8& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto type) -> const char* {
    using T = decltype(type);
    LaunchShape one;
    one.grid = dim3(1), one.block = dim3(1), one.overlaps_previous = true;
    if (const char* error = launch(one, stream, zero_kernel, call.largest)) return error;
    const int64_t elements = call.rows * call.columns;
    LaunchShape reading = one;
    reading.grid = dim3(blocks(std::min<int64_t>(ceil_div(elements, kThreads * kAhead * kVector<T>), 8 * device().multiprocessors)));
    reading.block = dim3(kThreads);
    if (const char* error = launch(reading, stream, largest_kernel<T>, static_cast<const T*>(call.in), elements, call.largest))
      return error;
    LaunchShape writing = reading;
    writing.grid = dim3(blocks(ceil_div(call.columns, kTile)), static_cast<unsigned>(ceil_div(call.rows, kTile)));
    return launch(writing, stream, round_kernel<T>, call);
  });
}

}  // namespace megatron_ru

#else

// Instantiations for a compiler that knows no launches, which checks other architectures.
template __global__ void megatron_ru::largest_kernel<megatron_ru::BFloat16>(const megatron_ru::BFloat16*, int64_t,
                                                                            uint32_t*);
template __global__ void megatron_ru::round_kernel<megatron_ru::BFloat16>(const megatron_ru::RoundFp8);

#endif
