// Activations, plain and gated, with an optional bias: one read of each input, one write of each output. The backward
// computes the activation anew from its input instead of keeping it.
#include "include/host.cuh"

namespace megatron_ru {
namespace {

struct ValueAndSlope {
  float value, slope;
};

// kExact: fp32 results. The others have 8 or 11 bits, for which the special function unit is more than enough.
template <bool kExact>
__device__ __forceinline__ float exponential(float x) {
  return kExact ? expf(x) : exp2_fast(x * kLog2e);
}

template <bool kExact>
__device__ __forceinline__ float sigmoid(float x) {
  const float denominator = 1.0f + exponential<kExact>(-x);
  return kExact ? 1.0f / denominator : __fdividef(1.0f, denominator);
}

// Normal distribution function, and its density times sqrt(2 pi).
//
// erfc(a / sqrt 2) = exp(-a^2 / 2) t P(t) with t = 1 / (1 + 0.36 a), the form of Hastings (Abramowitz and Stegun, 1964,
// 7.1.26); the coefficients are a least-squares fit of the relative error, below 9e-7 for a in [0, 14].
template <bool kExact>
__device__ __forceinline__ ValueAndSlope normal_distribution(float x) {
  if (kExact) return {normcdff(x), expf(-0.5f * x * x)};
  const float a = fabsf(x);
  const float t = __fdividef(1.0f, fmaf(0.36f, a, 1.0f));
  float p = 0.09412017741844597f;
  p = fmaf(p, t, -0.35955341989946155f);
  p = fmaf(p, t, 0.36193766071992667f);
  p = fmaf(p, t, 0.053080474256218146f);
  p = fmaf(p, t, 0.279444417919219f);
  p = fmaf(p, t, 0.2835439289949797f);
  p = fmaf(p, t, 0.2874261567057312f);
  const float density = exp2_fast(-0.5f * kLog2e * x * x);
  const float tail = 0.5f * p * t * density;
  return {x < 0 ? tail : 1.0f - tail, density};
}

template <Pointwise kFunction, bool kExact>
__device__ __forceinline__ ValueAndSlope evaluate(float x) {
  if constexpr (kFunction == Pointwise::kRelu) {
    // Both comparisons let a NaN through.
    return {x < 0 ? 0.0f : x, x <= 0 ? 0.0f : 1.0f};
  } else if constexpr (kFunction == Pointwise::kSwish) {
    const float s = sigmoid<kExact>(x);
    return {x * s, s * fmaf(x, 1.0f - s, 1.0f)};
  } else if constexpr (kFunction == Pointwise::kGeluTanh) {
    // (1 + tanh u) / 2 is sigmoid(2 u).
    constexpr float kTwice = 1.5957691216057308f, kCubic = 0.044715f;
    const float s = sigmoid<kExact>(kTwice * x * fmaf(kCubic * x, x, 1.0f));
    return {x * s, fmaf(x * s * (1.0f - s), kTwice * fmaf(3.0f * kCubic * x, x, 1.0f), s)};
  } else {
    constexpr float kDensity = 0.3989422804014327f;
    const ValueAndSlope normal = normal_distribution<kExact>(x);
    return {x * normal.value, fmaf(kDensity * x, normal.slope, normal.value)};
  }
}

// The vector of a bias, or zeros.
template <typename T>
__device__ __forceinline__ void load_bias(const void* bias, int64_t column, float (&out)[kVector<T>]) {
  if (bias != nullptr) {
    unpack<T>(load_shared(static_cast<const T*>(bias) + column), out);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) out[i] = 0;
}

// A block takes one tile of columns in kRows rows, whose loads are all under way before the first is used.
struct Tile {
  int64_t row, column;
};
template <typename T>
__device__ __forceinline__ Tile tile_of(int tiles, int rows) {
  const unsigned row = blockIdx.x / static_cast<unsigned>(tiles), tile = blockIdx.x - row * tiles;
  return {static_cast<int64_t>(row) * rows, (static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * kVector<T>};
}

template <typename T, Pointwise kFunction, bool kGated, bool kBias, int kRows>
__global__ void forward_kernel(const ActivationForward call, int tiles) {
  constexpr int N = kVector<T>;
  constexpr bool kExact = sizeof(T) == sizeof(float);
  const Tile tile = tile_of<T>(tiles, kRows);
  if (tile.column >= call.columns) return;
  follow_previous_kernel();
  uint4 gates[kRows], ups[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (tile.row + r >= call.rows) continue;
    gates[r] = load_vector(static_cast<const T*>(call.gate) + (tile.row + r) * call.gate_stride + tile.column);
    if (kGated) ups[r] = load_vector(static_cast<const T*>(call.up) + (tile.row + r) * call.up_stride + tile.column);
  }
  float gate_bias[N], up_bias[N];
  if (kBias) {
    load_bias<T>(call.gate_bias, tile.column, gate_bias);
    if (kGated) load_bias<T>(call.up_bias, tile.column, up_bias);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (tile.row + r >= call.rows) continue;
    float gate[N], up[N], out[N];
    unpack<T>(gates[r], gate);
    if (kGated) unpack<T>(ups[r], up);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = evaluate<kFunction, kExact>(kBias ? gate[i] + gate_bias[i] : gate[i]).value;
      if (kGated) out[i] *= kBias ? up[i] + up_bias[i] : up[i];
    }
    store_vector(static_cast<T*>(call.out) + (tile.row + r) * call.out_stride + tile.column, pack<T>(out));
  }
}

template <typename T, Pointwise kFunction, bool kGated, bool kBias, int kRows>
__global__ void backward_kernel(const ActivationBackward call, int tiles) {
  constexpr int N = kVector<T>;
  constexpr bool kExact = sizeof(T) == sizeof(float);
  const Tile tile = tile_of<T>(tiles, kRows);
  if (tile.column >= call.columns) return;
  follow_previous_kernel();
  uint4 gates[kRows], ups[kRows], dys[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (tile.row + r >= call.rows) continue;
    dys[r] = load_vector(static_cast<const T*>(call.dy) + (tile.row + r) * call.dy_stride + tile.column);
    gates[r] = load_vector(static_cast<const T*>(call.gate) + (tile.row + r) * call.gate_stride + tile.column);
    if (kGated) ups[r] = load_vector(static_cast<const T*>(call.up) + (tile.row + r) * call.up_stride + tile.column);
  }
  float gate_bias[N], up_bias[N];
  if (kBias) {
    load_bias<T>(call.gate_bias, tile.column, gate_bias);
    if (kGated) load_bias<T>(call.up_bias, tile.column, up_bias);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (tile.row + r >= call.rows) continue;
    float dy[N], gate[N], up[N], dgate[N], dup[N];
    unpack<T>(dys[r], dy);
    unpack<T>(gates[r], gate);
    if (kGated) unpack<T>(ups[r], up);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const ValueAndSlope f = evaluate<kFunction, kExact>(kBias ? gate[i] + gate_bias[i] : gate[i]);
      dgate[i] = dy[i] * f.slope;
      if (!kGated) continue;
      dgate[i] *= kBias ? up[i] + up_bias[i] : up[i];
      dup[i] = dy[i] * f.value;
    }
    store_streaming(static_cast<T*>(call.dgate) + (tile.row + r) * call.dgate_stride + tile.column, pack<T>(dgate));
    if (kGated)
      store_streaming(static_cast<T*>(call.dup) + (tile.row + r) * call.dup_stride + tile.column, pack<T>(dup));
  }
}

// Any width and alignment: a thread a number.
template <typename T, Pointwise kFunction>
__global__ void forward_any_kernel(const ActivationForward call) {
  constexpr bool kExact = sizeof(T) == sizeof(float);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < call.rows * call.columns;
       index += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = index / call.columns, column = index % call.columns;
    const auto at = [&](const void* data, const void* bias, int64_t stride) {
      const float x = to_float(static_cast<const T*>(data)[row * stride + column]);
      return bias == nullptr ? x : x + to_float(static_cast<const T*>(bias)[column]);
    };
    float out = evaluate<kFunction, kExact>(at(call.gate, call.gate_bias, call.gate_stride)).value;
    if (call.up != nullptr) out *= at(call.up, call.up_bias, call.up_stride);
    static_cast<T*>(call.out)[row * call.out_stride + column] = from_float<T>(out);
  }
}

template <typename T, Pointwise kFunction>
__global__ void backward_any_kernel(const ActivationBackward call) {
  constexpr bool kExact = sizeof(T) == sizeof(float);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < call.rows * call.columns;
       index += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = index / call.columns, column = index % call.columns;
    const auto at = [&](const void* data, const void* bias, int64_t stride) {
      const float x = to_float(static_cast<const T*>(data)[row * stride + column]);
      return bias == nullptr ? x : x + to_float(static_cast<const T*>(bias)[column]);
    };
    const float dy = at(call.dy, nullptr, call.dy_stride);
    const ValueAndSlope f = evaluate<kFunction, kExact>(at(call.gate, call.gate_bias, call.gate_stride));
    float dgate = dy * f.slope;
    if (call.up != nullptr) {
      dgate *= at(call.up, call.up_bias, call.up_stride);
      static_cast<T*>(call.dup)[row * call.dup_stride + column] = from_float<T>(dy * f.value);
    }
    static_cast<T*>(call.dgate)[row * call.dgate_stride + column] = from_float<T>(dgate);
  }
}

}  // namespace
}  // namespace megatron_ru

#ifndef __CUDACC_RTC__

namespace megatron_ru {
namespace {

constexpr int kForwardRows = 2, kBackwardRows = 1, kBlock = 256;

struct TileShape {
  LaunchShape at;
  int tiles;
};

TileShape tile_shape(int64_t rows, int64_t vectors, int rows_per_block) {
  const int64_t tiles = ceil_div(vectors, kBlock);
  const int threads = static_cast<int>(ceil_div(ceil_div(vectors, tiles), kWarp)) * kWarp;
  LaunchShape at{dim3(blocks(tiles * ceil_div(rows, rows_per_block))), dim3(threads)};
  at.overlaps_previous = true;
  return {at, static_cast<int>(tiles)};
}

template <typename Function>
const char* for_function(Pointwise function, Function&& run) {
  switch (function) {
    case Pointwise::kRelu:
      return run.template operator()<Pointwise::kRelu>();
    case Pointwise::kGelu:
      return run.template operator()<Pointwise::kGelu>();
    case Pointwise::kGeluTanh:
      return run.template operator()<Pointwise::kGeluTanh>();
    default:
      return run.template operator()<Pointwise::kSwish>();
  }
}

LaunchShape any_shape(int64_t numbers) {
  return {dim3(blocks(std::min<int64_t>(ceil_div(numbers, kBlock), 1 << 20))), dim3(kBlock)};
}

// The vector kernels count their blocks in 32 bits.
bool fits(int64_t rows, int64_t columns, int64_t vector) {
  return columns % vector == 0 && ceil_div(columns / vector, kBlock) * rows <= 2147483647;
}

template <typename T, Pointwise kFunction>
const char* run_forward(const ActivationForward& call, Stream stream) {
  const bool vector = fits(call.rows, call.columns, kVector<T>) && aligned(call.gate, call.gate_stride, sizeof(T)) &&
                      aligned(call.up, call.up_stride, sizeof(T)) && aligned(call.out, call.out_stride, sizeof(T)) &&
                      aligned(call.gate_bias, 0, 1) && aligned(call.up_bias, 0, 1);
  if (!vector) return launch(any_shape(call.rows * call.columns), stream, forward_any_kernel<T, kFunction>, call);
  const TileShape shape = tile_shape(call.rows, call.columns / kVector<T>, kForwardRows);
  const bool gated = call.up != nullptr, bias = call.gate_bias != nullptr;
  const auto kernel = gated ? (bias ? forward_kernel<T, kFunction, true, true, kForwardRows>
                                    : forward_kernel<T, kFunction, true, false, kForwardRows>)
                            : (bias ? forward_kernel<T, kFunction, false, true, kForwardRows>
                                    : forward_kernel<T, kFunction, false, false, kForwardRows>);
  return launch(shape.at, stream, kernel, call, shape.tiles);
}

template <typename T, Pointwise kFunction>
const char* run_backward(const ActivationBackward& call, Stream stream) {
  const bool vector = fits(call.rows, call.columns, kVector<T>) && aligned(call.dy, call.dy_stride, sizeof(T)) &&
                      aligned(call.gate, call.gate_stride, sizeof(T)) && aligned(call.up, call.up_stride, sizeof(T)) &&
                      aligned(call.dgate, call.dgate_stride, sizeof(T)) && aligned(call.dup, call.dup_stride, sizeof(T)) &&
                      aligned(call.gate_bias, 0, 1) && aligned(call.up_bias, 0, 1);
  if (!vector) return launch(any_shape(call.rows * call.columns), stream, backward_any_kernel<T, kFunction>, call);
  const TileShape shape = tile_shape(call.rows, call.columns / kVector<T>, kBackwardRows);
  const bool gated = call.up != nullptr, bias = call.gate_bias != nullptr;
  const auto kernel = gated ? (bias ? backward_kernel<T, kFunction, true, true, kBackwardRows>
                                    : backward_kernel<T, kFunction, true, false, kBackwardRows>)
                            : (bias ? backward_kernel<T, kFunction, false, true, kBackwardRows>
                                    : backward_kernel<T, kFunction, false, false, kBackwardRows>);
  return launch(shape.at, stream, kernel, call, shape.tiles);
}

}  // namespace

const char* activation_forward_cuda(const ActivationForward& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) {
    return for_function(call.function, [&]<Pointwise kFunction>() { return run_forward<decltype(zero), kFunction>(call, stream); });
  });
}

const char* activation_backward_cuda(const ActivationBackward& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) {
    return for_function(call.function, [&]<Pointwise kFunction>() { return run_backward<decltype(zero), kFunction>(call, stream); });
  });
}

}  // namespace megatron_ru

#else

// Instantiations for a compiler that knows no launches, which checks other architectures.
using megatron_ru::Pointwise;
template __global__ void megatron_ru::forward_kernel<megatron_ru::BFloat16, Pointwise::kGelu, true, true, 2>(const megatron_ru::ActivationForward, int);
template __global__ void megatron_ru::backward_kernel<megatron_ru::Half, Pointwise::kSwish, true, false, 2>(const megatron_ru::ActivationBackward, int);
template __global__ void megatron_ru::backward_kernel<float, Pointwise::kGeluTanh, false, true, 2>(const megatron_ru::ActivationBackward, int);
template __global__ void megatron_ru::forward_any_kernel<megatron_ru::BFloat16, Pointwise::kRelu>(const megatron_ru::ActivationForward);
template __global__ void megatron_ru::backward_any_kernel<megatron_ru::BFloat16, Pointwise::kGelu>(const megatron_ru::ActivationBackward);

#endif
