// RMSNorm and LayerNorm, with an optional residual added first.
//
// Forward: a row stays in registers between the read and the write, so each number crosses memory once.
// Backward: a fixed grid walks over the rows and keeps its share of dweight in registers; the shares are added in a
// fixed order by a second, small kernel, so the result does not depend on which block ran first.
#include "include/host.cuh"

namespace megatron_ru {
namespace {

// A row belongs to threadIdx.x = 0..blockDim.x - 1, at most kMostWarps warps; a block holds blockDim.y rows. Sums over a
// row's threads go through shared memory: each warp publishes its own, and after a barrier every thread collects them.
// The two sets are used in turn, so that one barrier lies between any two uses of a set.
template <int kCount, int kMostWarps>
struct RowSums {
  // Sums are collected in fours.
  static constexpr int kPlaces = (kMostWarps + 3) / 4 * 4;
  static constexpr int kFloats = 2 * kCount * kPlaces;
  float* own;  // kFloats of this row

  __device__ __forceinline__ explicit RowSums(float* shared) : own(shared + threadIdx.y * kFloats) {}

  __device__ __forceinline__ void publish(float (&x)[kCount], int set) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float* places = own + ((set & 1) * kCount + i) * kPlaces;
      x[i] = warp_sum(x[i]);
      if (lane == 0) places[warp] = x[i];
      // What no warp fills counts as zero.
      if (warp == 0 && lane >= warps && lane < kPlaces) places[lane] = 0;
    }
  }

  __device__ __forceinline__ void collect(float (&x)[kCount], int set) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4* places = reinterpret_cast<const float4*>(own + ((set & 1) * kCount + i) * kPlaces);
      x[i] = 0;
#pragma unroll
      for (int four = 0; four < kPlaces / 4; ++four) {
        const float4 part = places[four];
        x[i] += (part.x + part.y) + (part.z + part.w);
      }
    }
  }

  __device__ __forceinline__ void sum(float (&x)[kCount], int set) const {
    publish(x, set);
    if (blockDim.x == kWarp) return;
    __syncthreads();
    collect(x, set);
  }
};

extern __shared__ uint4 shared_memory[];

// Of a block of the kernels for any width.
constexpr int kAnyThreads = 256;

// kThreads bounds those of a row; kBlocks of as many threads share a multiprocessor, which bounds the registers.
template <typename T, bool kLayerNorm, bool kResidual, int kVectors, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_kernel(const NormForward call) {
  constexpr int N = kVector<T>;
  const RowSums<1, kThreads / kWarp> sums(reinterpret_cast<float*>(shared_memory));
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool mine = row < call.rows;
  const int vectors = static_cast<int>(call.hidden / N);
  const T* x_row = static_cast<const T*>(call.x) + row * call.x_stride;
  const T* residual_row = static_cast<const T*>(call.residual) + row * call.residual_stride;
  follow_previous_kernel();

  uint4 raw[kVectors], added[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = threadIdx.x + v * blockDim.x;
    raw[v] = make_uint4(0, 0, 0, 0);
    if (kResidual) added[v] = raw[v];
    if (!mine || at >= vectors) continue;
    raw[v] = load_vector(x_row + at * N);
    if (kResidual) added[v] = load_vector(residual_row + at * N);
  }
  float x[kVectors][N];
  float moment[1] = {0};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    unpack<T>(raw[v], x[v]);
    if (kResidual) {
      float other[N];
      unpack<T>(added[v], other);
#pragma unroll
      for (int i = 0; i < N; ++i) x[v][i] += other[i];
      // What the next layer sees is the rounded sum, so that is what gets normed.
      raw[v] = pack<T>(x[v]);
      unpack<T>(raw[v], x[v]);
      const int at = threadIdx.x + v * blockDim.x;
      if (mine && at < vectors) store_vector(static_cast<T*>(call.sum) + row * call.hidden + at * N, raw[v]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) moment[0] += kLayerNorm ? x[v][i] : x[v][i] * x[v][i];
  }
  sums.sum(moment, 0);
  const float share = 1.0f / static_cast<float>(call.hidden);
  float mean = 0;
  if (kLayerNorm) {
    // The squares about the mean, not the mean of the squares: nothing is lost where the mean is large.
    mean = moment[0] * share;
    moment[0] = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (static_cast<int>(threadIdx.x + v * blockDim.x) >= vectors) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) moment[0] += (x[v][i] - mean) * (x[v][i] - mean);
    }
    sums.sum(moment, 1);
  }
  const float inverse = rsqrtf(moment[0] * share + static_cast<float>(call.eps));
  if (!mine) return;
  if (threadIdx.x == 0) {
    static_cast<float*>(call.inverse_deviation)[row] = inverse;
    if (kLayerNorm) static_cast<float*>(call.mean)[row] = mean;
  }
  const bool wide_parameters = call.weight_dtype == Dtype::kFloat32;
  const float offset = call.zero_centered ? 1.0f : 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = threadIdx.x + v * blockDim.x;
    if (at >= vectors) continue;
    float gain[N], y[N];
    load_parameter<T>(call.weight, wide_parameters, at * N, gain);
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = (x[v][i] - mean) * inverse * (gain[i] + offset);
    if (kLayerNorm && call.bias != nullptr) {
      float bias[N];
      load_parameter<T>(call.bias, wide_parameters, at * N, bias);
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] += bias[i];
    }
    store_vector(static_cast<T*>(call.y) + row * call.hidden + at * N, pack<T>(y));
  }
}

// Any width and alignment: one block a row, which reads it once per moment and once to write.
template <typename T, bool kLayerNorm, bool kResidual>
__global__ void forward_any_kernel(const NormForward call) {
  const RowSums<1, kAnyThreads / kWarp> sums(reinterpret_cast<float*>(shared_memory));
  const int64_t row = blockIdx.x;
  const T* x_row = static_cast<const T*>(call.x) + row * call.x_stride;
  const T* residual_row = static_cast<const T*>(call.residual) + row * call.residual_stride;
  T* sum_row = static_cast<T*>(call.sum) + row * call.hidden;
  const T* normed = kResidual ? sum_row : x_row;
  float moment[1] = {0};
  for (int64_t i = threadIdx.x; i < call.hidden; i += blockDim.x) {
    float x = to_float(x_row[i]);
    if (kResidual) {
      const T rounded = from_float<T>(x + to_float(residual_row[i]));
      sum_row[i] = rounded;
      x = to_float(rounded);
    }
    moment[0] += kLayerNorm ? x : x * x;
  }
  sums.sum(moment, 0);
  const float share = 1.0f / static_cast<float>(call.hidden);
  float mean = 0;
  if (kLayerNorm) {
    mean = moment[0] * share;
    moment[0] = 0;
    for (int64_t i = threadIdx.x; i < call.hidden; i += blockDim.x) {
      const float x = to_float(normed[i]) - mean;
      moment[0] += x * x;
    }
    sums.sum(moment, 1);
  }
  const float inverse = rsqrtf(moment[0] * share + static_cast<float>(call.eps));
  if (threadIdx.x == 0) {
    static_cast<float*>(call.inverse_deviation)[row] = inverse;
    if (kLayerNorm) static_cast<float*>(call.mean)[row] = mean;
  }
  const bool wide_parameters = call.weight_dtype == Dtype::kFloat32;
  const float offset = call.zero_centered ? 1.0f : 0.0f;
  for (int64_t i = threadIdx.x; i < call.hidden; i += blockDim.x) {
    float y = (to_float(normed[i]) - mean) * inverse * (parameter_at<T>(call.weight, wide_parameters, i) + offset);
    if (kLayerNorm && call.bias != nullptr) y += parameter_at<T>(call.bias, wide_parameters, i);
    static_cast<T*>(call.y)[row * call.hidden + i] = from_float<T>(y);
  }
}

// Rows wait in a ring in shared memory: one whose sums are known, one whose sums are taken, and kStages - 2 on their way,
// more bytes in flight than registers could hold. The sums of a row are taken one turn before they are used, so that the
// barrier between lies behind work. A block works on blockDim.y rows at once, each with a barrier of its own, and adds up
// their shares of dweight before it writes them: fewer, for the kernel that sums the blocks' shares.
template <typename T, bool kLayerNorm, bool kResidual, int kVectors, int kStages, int kMostRowThreads, int kMostThreads>
__global__ void __launch_bounds__(kMostThreads, 1) backward_kernel(const NormBackward call) {
  constexpr int N = kVector<T>;
  constexpr int kSums = kLayerNorm ? 2 : 1;
  constexpr int kInputs = kResidual ? 3 : 2;
  using Sums = RowSums<kSums, kMostRowThreads / kWarp>;
  const Sums row_sums(reinterpret_cast<float*>(shared_memory));
  // The ring: [stage][input][vector of this thread][thread]. A thread reads back only what it copied itself.
  const int lanes = blockDim.x * blockDim.y;
  const int ring = blockDim.y * (Sums::kFloats / 4) + threadIdx.y * blockDim.x + threadIdx.x;
  const auto slot = [&](int stage, int input, int v) -> uint4& {
    return shared_memory[ring + (stage * kInputs * kVectors + input * kVectors + v) * lanes];
  };
  const int vectors = static_cast<int>(call.hidden / N);
  bool holds[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) holds[v] = static_cast<int>(threadIdx.x + v * blockDim.x) < vectors;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // How many rows these threads work on.
  const auto rows_from = [&](int64_t row) { return row < call.rows ? static_cast<int>((call.rows - row + step - 1) / step) : 0; };
  const int mine = rows_from(first);
  const auto meet_row = [] {
    asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(threadIdx.y) + 1), "r"(static_cast<int>(blockDim.x)) : "memory");
  };
  const float share = 1.0f / static_cast<float>(call.hidden);
  follow_previous_kernel();

  // Each pointer moves from row to row; additions are cheaper than products of 64 bits.
  const int across = threadIdx.x * N, next_vector = blockDim.x * N;
  const T* x_at = static_cast<const T*>(call.x) + first * call.x_stride + across;
  const T* dy_at = static_cast<const T*>(call.dy) + first * call.dy_stride + across;
  const T* dsum_at = static_cast<const T*>(call.dsum) + first * call.dsum_stride + across;
  T* dx_at = static_cast<T*>(call.dx) + first * call.hidden + across;
  const auto fetch = [&](bool live, int stage) {
    if (live) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (!holds[v]) continue;
        copy_in_background(&slot(stage, 0, v), x_at + v * next_vector);
        copy_in_background(&slot(stage, 1, v), dy_at + v * next_vector);
        if (kResidual) copy_in_background(&slot(stage, 2, v), dsum_at + v * next_vector);
      }
      x_at += step * call.x_stride;
      dy_at += step * call.dy_stride;
      if (kResidual) dsum_at += step * call.dsum_stride;
    }
    end_group_of_copies();
  };
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch(ahead < mine, ahead);

  float gain[kVectors][N], dweight[kVectors][N], dbias[kLayerNorm ? kVectors : 1][N];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      gain[v][i] = dweight[v][i] = 0;
      if (kLayerNorm) dbias[v][i] = 0;
    }
    if (!holds[v]) continue;
    load_parameter<T>(call.weight, call.weight_dtype == Dtype::kFloat32, across + v * next_vector, gain[v]);
    if (call.zero_centered) {
#pragma unroll
      for (int i = 0; i < N; ++i) gain[v][i] += 1.0f;
    }
  }

  struct Moments {
    float inverse, mean;
  };
  const float* inverse_at = static_cast<const float*>(call.inverse_deviation) + first;
  const float* mean_at = static_cast<const float*>(call.mean) + first;
  const auto next_moments = [&](bool live) -> Moments {
    if (!live) return {0, 0};
    const Moments found{__ldg(inverse_at), kLayerNorm ? __ldg(mean_at) : 0.0f};
    inverse_at += step;
    if (kLayerNorm) mean_at += step;
    return found;
  };
  const auto take_sums = [&](bool live, int stage, const Moments& of, int set) {
    float dots[kSums] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!live || !holds[v]) continue;
      float x[N], dy[N];
      unpack<T>(slot(stage, 0, v), x);
      unpack<T>(slot(stage, 1, v), dy);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float product = dy[i] * (kLayerNorm ? x[i] - of.mean : x[i]);
        dweight[v][i] = fmaf(product, of.inverse, dweight[v][i]);
        dots[0] = fmaf(product, gain[v][i], dots[0]);
        if (kLayerNorm) {
          dbias[v][i] += dy[i];
          dots[kSums - 1] = fmaf(dy[i], gain[v][i], dots[kSums - 1]);
        }
      }
    }
    row_sums.publish(dots, set);
  };
  const auto write_row = [&](int stage, const Moments& of, int set) {
    float dots[kSums];
    row_sums.collect(dots, set);
    // dx = r (gain dy - mean(gain dy) - n mean(gain dy n)) with n = (x - mean) r, as r gain dy + along x + level.
    const float along = -(dots[0] * of.inverse * share) * of.inverse * of.inverse;
    const float level = kLayerNorm ? -of.inverse * (dots[kSums - 1] * share) - along * of.mean : 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!holds[v]) continue;
      float x[N], dy[N], dx[N];
      unpack<T>(slot(stage, 0, v), x);
      unpack<T>(slot(stage, 1, v), dy);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float wanted = dy[i] * gain[v][i];
        dx[i] = fmaf(along, x[i], kLayerNorm ? fmaf(of.inverse, wanted, level) : of.inverse * wanted);
      }
      if (kResidual) {
        float dsum[N];
        unpack<T>(slot(stage, 2, v), dsum);
#pragma unroll
        for (int i = 0; i < N; ++i) dx[i] += dsum[i];
      }
      store_vector(dx_at + v * next_vector, pack<T>(dx));
    }
    dx_at += step * call.hidden;
  };

  Moments now = next_moments(0 < mine), next = next_moments(1 < mine);
  wait_for_copies<kStages - 2>();
  take_sums(0 < mine, 0, now, 0);
  meet_row();
  int stage = 0;
  const auto after = [](int index, int rows) { return index + rows >= kStages ? index + rows - kStages : index + rows; };
  for (int turn = 0; turn < mine; ++turn) {
    fetch(turn + kStages - 1 < mine, after(stage, kStages - 1));
    const Moments later = next_moments(turn + 2 < mine);
    wait_for_copies<kStages - 2>();
    take_sums(turn + 1 < mine, after(stage, 1), next, turn + 1);
    write_row(stage, now, turn);
    meet_row();
    now = next;
    next = later;
    stage = after(stage, 1);
  }

  // The rows' shares meet where the ring was, [row][sum][hidden] in fp32, and are added in the order of the rows.
  wait_for_copies<0>();
  __syncthreads();
  float* const shares = reinterpret_cast<float*>(shared_memory);
  const int sums = call.dbias != nullptr ? 2 : 1, width = sums * static_cast<int>(call.hidden);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!holds[v]) continue;
    float* const share_of_row = shares + threadIdx.y * width + across + v * next_vector;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      *reinterpret_cast<float4*>(share_of_row + i) =
          make_float4(dweight[v][i], dweight[v][i + 1], dweight[v][i + 2], dweight[v][i + 3]);
      if (kLayerNorm && sums == 2)
        *reinterpret_cast<float4*>(share_of_row + call.hidden + i) =
            make_float4(dbias[v][i], dbias[v][i + 1], dbias[v][i + 2], dbias[v][i + 3]);
    }
  }
  __syncthreads();
  float* const partial = static_cast<float*>(call.partial) + static_cast<int64_t>(blockIdx.x) * width;
  for (int at = 4 * (threadIdx.y * blockDim.x + threadIdx.x); at < width; at += 4 * lanes) {
    float4 total = *reinterpret_cast<const float4*>(shares + at);
    for (int row = 1; row < static_cast<int>(blockDim.y); ++row) {
      const float4 other = *reinterpret_cast<const float4*>(shares + row * width + at);
      total = make_float4(total.x + other.x, total.y + other.y, total.z + other.z, total.w + other.w);
    }
    *reinterpret_cast<float4*>(partial + at) = total;
  }
}

// Any width and alignment. A block adds its rows' products to its own row of `partial`, which holds zeros at first.
template <typename T, bool kLayerNorm, bool kResidual>
__global__ void backward_any_kernel(const NormBackward call) {
  constexpr int kSums = kLayerNorm ? 2 : 1;
  const RowSums<kSums, kAnyThreads / kWarp> row_sums(reinterpret_cast<float*>(shared_memory));
  const bool wide_parameters = call.weight_dtype == Dtype::kFloat32;
  const float offset = call.zero_centered ? 1.0f : 0.0f, share = 1.0f / static_cast<float>(call.hidden);
  const int sums = call.dbias != nullptr ? 2 : 1;
  float* partial = static_cast<float*>(call.partial) + static_cast<int64_t>(blockIdx.x) * sums * call.hidden;
  for (int64_t i = threadIdx.x; i < sums * call.hidden; i += blockDim.x) partial[i] = 0;
  __syncthreads();
  int turn = 0;
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const T* x_row = static_cast<const T*>(call.x) + row * call.x_stride;
    const T* dy_row = static_cast<const T*>(call.dy) + row * call.dy_stride;
    const float inverse = static_cast<const float*>(call.inverse_deviation)[row];
    const float mean = kLayerNorm ? static_cast<const float*>(call.mean)[row] : 0.0f;
    float dots[kSums] = {};
    for (int64_t i = threadIdx.x; i < call.hidden; i += blockDim.x) {
      const float normal = (to_float(x_row[i]) - mean) * inverse, dy = to_float(dy_row[i]);
      const float gain = parameter_at<T>(call.weight, wide_parameters, i) + offset;
      // The same thread meets the same column in every row.
      partial[i] += dy * normal;
      if (kLayerNorm && call.dbias != nullptr) partial[call.hidden + i] += dy;
      dots[0] += dy * normal * gain;
      if (kLayerNorm) dots[kSums - 1] += dy * gain;
    }
    row_sums.sum(dots, turn++);
    const float along = dots[0] * share, level = kLayerNorm ? dots[kSums - 1] * share : 0.0f;
    for (int64_t i = threadIdx.x; i < call.hidden; i += blockDim.x) {
      const float normal = (to_float(x_row[i]) - mean) * inverse;
      const float gain = parameter_at<T>(call.weight, wide_parameters, i) + offset;
      float dx = inverse * (to_float(dy_row[i]) * gain - level - normal * along);
      if (kResidual) dx += to_float(static_cast<const T*>(call.dsum)[row * call.dsum_stride + i]);
      static_cast<T*>(call.dx)[row * call.hidden + i] = from_float<T>(dx);
    }
  }
}

// Columns of `partial` summed over its rows, in order: a warp takes 32 columns and every 32nd row, then the warps are
// added one after the other.
template <typename T>
__global__ void finish_kernel(const NormBackward call) {
  __shared__ float part[kWarp][kWarp + 1];
  const int sums = call.dbias != nullptr ? 2 : 1;
  const int64_t width = sums * call.hidden;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  follow_previous_kernel();
  float total = 0;
  if (column < width) {
    const float* partial = static_cast<const float*>(call.partial);
    // All of a thread's loads are under way at once.
    constexpr int kAhead = 5;
    for (int64_t first = threadIdx.y; first < call.partial_rows; first += kAhead * kWarp) {
      float part_of[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t row = first + a * kWarp;
        part_of[a] = row < call.partial_rows ? partial[row * width + column] : 0.0f;
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) total += part_of[a];
    }
  }
  part[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarp; ++w) total += part[w][threadIdx.x];
  void* out = column < call.hidden ? call.dweight : call.dbias;
  const int64_t index = column < call.hidden ? column : column - call.hidden;
  if (call.weight_dtype == Dtype::kFloat32)
    static_cast<float*>(out)[index] = total;
  else
    static_cast<T*>(out)[index] = from_float<T>(total);
}

}  // namespace
}  // namespace megatron_ru

#ifndef __CUDACC_RTC__

namespace megatron_ru {
namespace {

constexpr int kMostThreads = 1024;

struct RowShape {
  int vectors;  // per thread; 0: the kernel for any width
  int threads;  // per row
  int rows;     // per block
};

// `vectors` each for as many threads as a row needs; narrow rows share a block of `block` threads.
RowShape row_shape(int64_t row_vectors, int vectors, int block) {
  const int threads = static_cast<int>(ceil_div(ceil_div(row_vectors, vectors), kWarp)) * kWarp;
  return {vectors, threads, std::max(1, block / threads)};
}

template <typename T>
RowShape forward_shape(int64_t hidden) {
  if (hidden % kVector<T> != 0) return {0, 256, 1};
  const int64_t vectors = hidden / kVector<T>;
  if (vectors <= kWarp) return row_shape(vectors, 1, 128);
  if (vectors <= 2 * kWarp) return row_shape(vectors, 2, 128);
  if (vectors <= 4 * kMostThreads) return row_shape(vectors, 4, 128);
  return {0, 1024, 1};
}

// Of a block of the backward, which has a multiprocessor to itself: two rows of 4096 in flight of three are as many bytes
// as its share of the memory's bandwidth needs; 768 threads were slower by 5%, for want of registers (H200).
constexpr int kBackwardThreads = 512, kBackwardStages = 3;
// Named barriers of a block, less the one of __syncthreads.
constexpr int kMostRows = 15;

template <typename T>
RowShape backward_shape(int64_t hidden) {
  if (hidden % kVector<T> != 0) return {0, kAnyThreads, 1};
  const int64_t vectors = hidden / kVector<T>;
  if (vectors > 2 * kMostThreads) return {0, kAnyThreads, 1};
  RowShape shape = row_shape(vectors, vectors <= kWarp ? 1 : 2, kBackwardThreads);
  shape.rows = std::min(shape.rows, kMostRows);
  return shape;
}

template <typename T, bool kLayerNorm, bool kResidual>
const char* run_forward(const NormForward& call, Stream stream) {
  RowShape shape = forward_shape<T>(call.hidden);
  const bool vector = aligned(call.x, call.x_stride, sizeof(T)) && aligned(call.residual, call.residual_stride, sizeof(T)) &&
                      aligned(call.y, call.hidden, sizeof(T)) && aligned(call.sum, 0, sizeof(T)) &&
                      aligned(call.weight, 0, 1) && aligned(call.bias, 0, 1);
  if (!vector || shape.vectors == 0) {
    const LaunchShape any{dim3(blocks(call.rows)), dim3(kAnyThreads), RowSums<1, kAnyThreads / kWarp>::kFloats * sizeof(float)};
    return launch(any, stream, forward_any_kernel<T, kLayerNorm, kResidual>, call);
  }
  LaunchShape at{dim3(blocks(ceil_div(call.rows, shape.rows))), dim3(shape.threads, shape.rows)};
  at.overlaps_previous = true;
  const auto go = [&]<int kVectors, int kThreads, int kBlocks>() {
    at.shared = shape.rows * RowSums<1, kThreads / kWarp>::kFloats * sizeof(float);
    return launch(at, stream, forward_kernel<T, kLayerNorm, kResidual, kVectors, kThreads, kBlocks>, call);
  };
  if (shape.vectors == 1) return go.template operator()<1, 128, 8>();
  if (shape.vectors == 2) return go.template operator()<2, 128, 8>();
  if (shape.threads <= 256) return go.template operator()<4, 256, kResidual ? 4 : (kLayerNorm ? 6 : 5)>();
  return go.template operator()<4, kMostThreads, 1>();
}

// Launches the backward with a block a multiprocessor, or fewer where that gives each the same number of rows;
// `call.partial_rows` becomes the number of blocks.
template <typename T, bool kLayerNorm, bool kResidual, int kVectors, int kStages, int kRowThreads, int kThreads>
const char* launch_backward(NormBackward& call, RowShape shape, Stream stream) {
  constexpr int kSums = kLayerNorm ? 2 : 1, kInputs = kResidual ? 3 : 2;
  constexpr int64_t kMostShared = 224 * 1024;
  const int64_t shared_of_row = RowSums<kSums, kRowThreads / kWarp>::kFloats * static_cast<int64_t>(sizeof(float)) +
                                kStages * kInputs * kVectors * shape.threads * static_cast<int64_t>(sizeof(uint4));
  shape.rows = static_cast<int>(std::min<int64_t>(shape.rows, kMostShared / shared_of_row));
  if (shape.rows == 0) return "a row does not fit in shared memory";
  const int64_t shared = shape.rows * shared_of_row;
  const auto kernel = backward_kernel<T, kLayerNorm, kResidual, kVectors, kStages, kRowThreads, kThreads>;
  if (const char* error = allow_shared(kernel, shared)) return error;
  const int64_t groups = ceil_div(call.rows, shape.rows);
  call.partial_rows = ceil_div(groups, ceil_div(groups, device().multiprocessors));
  LaunchShape at{dim3(blocks(call.partial_rows)), dim3(shape.threads, shape.rows), static_cast<size_t>(shared)};
  at.overlaps_previous = true;
  return launch(at, stream, kernel, call);
}

template <typename T, bool kLayerNorm, bool kResidual>
const char* run_backward(NormBackward call, Stream stream) {
  constexpr int kSums = kLayerNorm ? 2 : 1;
  const RowShape shape = backward_shape<T>(call.hidden);
  const bool vector = aligned(call.x, call.x_stride, sizeof(T)) && aligned(call.dy, call.dy_stride, sizeof(T)) &&
                      aligned(call.dsum, call.dsum_stride, sizeof(T)) && aligned(call.dx, call.hidden, sizeof(T)) &&
                      aligned(call.weight, 0, 1);
  const char* error = nullptr;
  if (!vector || shape.vectors == 0) {
    const LaunchShape any{dim3(blocks(call.partial_rows)), dim3(kAnyThreads),
                          RowSums<kSums, kAnyThreads / kWarp>::kFloats * sizeof(float)};
    error = launch(any, stream, backward_any_kernel<T, kLayerNorm, kResidual>, call);
  } else if (shape.vectors == 1) {
    error = launch_backward<T, kLayerNorm, kResidual, 1, 4, kWarp, kBackwardThreads>(call, shape, stream);
  } else if (shape.threads <= 256) {
    error = launch_backward<T, kLayerNorm, kResidual, 2, kBackwardStages, 256, kBackwardThreads>(call, shape, stream);
  } else if (shape.threads <= 512) {
    error = launch_backward<T, kLayerNorm, kResidual, 2, kBackwardStages, 512, kBackwardThreads>(call, shape, stream);
  } else {
    error = launch_backward<T, kLayerNorm, kResidual, 2, kResidual ? 2 : kBackwardStages, kMostThreads, kMostThreads>(call, shape, stream);
  }
  if (error != nullptr) return error;
  const int64_t width = (call.dbias != nullptr ? 2 : 1) * call.hidden;
  LaunchShape finish{dim3(blocks(ceil_div(width, kWarp))), dim3(kWarp, kWarp)};
  finish.overlaps_previous = true;
  return launch(finish, stream, finish_kernel<T>, call);
}

}  // namespace

const char* norm_forward_cuda(const NormForward& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (call.layer_norm)
      return call.residual != nullptr ? run_forward<T, true, true>(call, stream) : run_forward<T, true, false>(call, stream);
    return call.residual != nullptr ? run_forward<T, false, true>(call, stream) : run_forward<T, false, false>(call, stream);
  });
}

int64_t norm_backward_partial_rows_cuda(int64_t rows, int64_t, Dtype, bool) {
  return std::min<int64_t>(rows, device().multiprocessors);
}

const char* norm_backward_cuda(const NormBackward& call, Stream stream) {
  return for_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (call.layer_norm)
      return call.dsum != nullptr ? run_backward<T, true, true>(call, stream) : run_backward<T, true, false>(call, stream);
    return call.dsum != nullptr ? run_backward<T, false, true>(call, stream) : run_backward<T, false, false>(call, stream);
  });
}

}  // namespace megatron_ru

#else

// Instantiations for a compiler that knows no launches, which checks other architectures.
template __global__ void megatron_ru::forward_kernel<megatron_ru::BFloat16, false, true, 4, 256, 4>(const megatron_ru::NormForward);
template __global__ void megatron_ru::backward_kernel<megatron_ru::Half, true, true, 2, 4, 512, 512>(const megatron_ru::NormBackward);
template __global__ void megatron_ru::forward_any_kernel<megatron_ru::BFloat16, true, true>(const megatron_ru::NormForward);
template __global__ void megatron_ru::backward_any_kernel<float, true, true>(const megatron_ru::NormBackward);
template __global__ void megatron_ru::finish_kernel<megatron_ru::BFloat16>(const megatron_ru::NormBackward);

#endif
