// RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba, Kiros and Hinton, 2016), row by row.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace megatron_ru {
namespace {

// Sums start anew for every block: shorter chains of additions round less, and the processor works at several at once.
constexpr int64_t kBlock = 512;

// Rows are read several times. Those of binary16 are unpacked to float once, for a loop cannot do it as fast as half.h;
// rows of other types are used where they are, and `room` stays empty.
template <class T>
using Unpacked = std::conditional_t<std::is_same_v<T, Half>, float, T>;

template <class T>
MEGATRON_RU_INLINE const T* unpacked(const T* rows, int64_t row, int64_t stride, int64_t, std::vector<T>&) {
  return rows + row * stride;
}

// Asks for the next row meanwhile: nothing else of this row comes from memory, which would stand idle.
MEGATRON_RU_INLINE const float* unpacked(const Half* rows, int64_t row, int64_t stride, int64_t hidden,
                                         std::vector<float>& room) {
  const Half *from = rows + row * stride, *next = from + stride;
  for (int64_t i = 0; i < hidden; i += kHalvesPerLine) __builtin_prefetch(next + i);
  room.resize(hidden);
  widen_halves(from, hidden, room.data());
  return room.data();
}

// Where a row is to be computed that `pack` then brings to its place.
template <class T>
MEGATRON_RU_INLINE T* unpacked_room(T* row, int64_t, std::vector<T>&) {
  return row;
}

// Asks for the row's place in time: a store that waits for it would hold up all later ones.
MEGATRON_RU_INLINE float* unpacked_room(Half* row, int64_t hidden, std::vector<float>& room) {
  for (int64_t i = 0; i < hidden; i += kHalvesPerLine) __builtin_prefetch(row + i, 1);
  room.resize(hidden);
  return room.data();
}

template <class T>
MEGATRON_RU_INLINE void pack(const T*, int64_t, T*) {}

MEGATRON_RU_INLINE void pack(const float* row, int64_t hidden, Half* to) { narrow_halves(row, hidden, to); }

// The gain of every column: weight, or 1 + weight when it is centered on zero.
template <class W>
MEGATRON_RU_INLINE std::vector<W> gain_of(const void* weight, Dtype dtype, int64_t hidden, bool zero_centered) {
  std::vector<W> room(hidden);
  W* gain = room.data();
  const W* from = widen(weight, dtype, hidden, gain);
  const W offset = zero_centered ? 1 : 0;
#pragma omp simd
  for (int64_t i = 0; i < hidden; ++i) gain[i] = from[i] + offset;
  return room;
}

template <class W, class T>
MEGATRON_RU_INLINE W sum_of(const T* x, int64_t hidden) {
  W total = 0;
  for (int64_t begin = 0; begin < hidden; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, hidden);
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += to_wide(x[i]);
    total += sum;
  }
  return total;
}

template <class W, class T>
MEGATRON_RU_INLINE W sum_of_squares(const T* x, W center, int64_t hidden) {
  W total = 0;
  for (int64_t begin = 0; begin < hidden; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, hidden);
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += (to_wide(x[i]) - center) * (to_wide(x[i]) - center);
    total += sum;
  }
  return total;
}

template <class T, class W>
MEGATRON_RU_INLINE void forward(const NormForward& call, int64_t first_row, int64_t last_row) {
  using U = Unpacked<T>;
  const int64_t hidden = call.hidden;
  const std::vector<W> gain_row = gain_of<W>(call.weight, call.weight_dtype, hidden, call.zero_centered);
  std::vector<W> bias_row(hidden);
  std::vector<U> x_room, residual_room, sum_room, y_room;
  const W* gain = gain_row.data();
  const W* bias = call.bias ? widen(call.bias, call.weight_dtype, hidden, bias_row.data()) : bias_row.data();

  for (int64_t row = first_row; row < last_row; ++row) {
    T* y_row = static_cast<T*>(call.y) + row * hidden;
    U* y = unpacked_room(y_row, hidden, y_room);
    const U* x = unpacked(static_cast<const T*>(call.x), row, call.x_stride, hidden, x_room);
    if (call.residual) {
      const U* residual =
          unpacked(static_cast<const T*>(call.residual), row, call.residual_stride, hidden, residual_room);
      T* sum_row = static_cast<T*>(call.sum) + row * hidden;
      U* sum = unpacked_room(sum_row, hidden, sum_room);
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) sum[i] = from_wide<U>(to_wide(x[i]) + to_wide(residual[i]));
      pack(sum, hidden, sum_row);
      x = unpacked(sum_row, 0, 0, hidden, x_room);  // rounded, as the next layer will read it
    }
    const W mean = call.layer_norm ? sum_of<W>(x, hidden) / hidden : 0;
    const W variance = sum_of_squares(x, mean, hidden) / hidden;
    const W inverse_deviation = 1 / std::sqrt(variance + static_cast<W>(call.eps));
#pragma omp simd
    for (int64_t i = 0; i < hidden; ++i) {
      y[i] = from_wide<U>((to_wide(x[i]) - mean) * inverse_deviation * gain[i] + bias[i]);
    }
    pack(y, hidden, y_row);
    if (call.mean) static_cast<W*>(call.mean)[row] = mean;
    static_cast<W*>(call.inverse_deviation)[row] = inverse_deviation;
  }
}

// With n = (x - mean) / deviation and w = dy gain: dweight = sum over rows of dy n, dbias = sum over rows of dy,
// dx = (w - mean(w) - n mean(w n)) / deviation, where RMSNorm has no mean(w).
template <class T, class W>
MEGATRON_RU_INLINE void backward(const NormBackward& call, int64_t partial_row, int64_t first_row, int64_t last_row) {
  using U = Unpacked<T>;
  const int64_t hidden = call.hidden;
  const std::vector<W> gain_row = gain_of<W>(call.weight, call.weight_dtype, hidden, call.zero_centered);
  std::vector<U> x_room, dy_room, dsum_room, dx_room;
  const W* gain = gain_row.data();
  W* dweight = static_cast<W*>(call.partial) + partial_row * (call.dbias ? 2 : 1) * hidden;
  W* dbias = dweight + hidden;

  for (int64_t row = first_row; row < last_row; ++row) {
    T* dx_row = static_cast<T*>(call.dx) + row * hidden;
    U* dx = unpacked_room(dx_row, hidden, dx_room);
    const U* x = unpacked(static_cast<const T*>(call.x), row, call.x_stride, hidden, x_room);
    const U* dy = unpacked(static_cast<const T*>(call.dy), row, call.dy_stride, hidden, dy_room);
    const W mean = call.layer_norm ? static_cast<const W*>(call.mean)[row] : 0;
    const W inverse_deviation = static_cast<const W*>(call.inverse_deviation)[row];

    W w_total = 0, wn_total = 0;
    for (int64_t begin = 0; begin < hidden; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, hidden);
      W w_sum = 0, wn_sum = 0;
#pragma omp simd reduction(+ : w_sum, wn_sum)
      for (int64_t i = begin; i < end; ++i) {
        const W dyn = to_wide(dy[i]) * ((to_wide(x[i]) - mean) * inverse_deviation);
        dweight[i] += dyn;
        w_sum += to_wide(dy[i]) * gain[i];
        wn_sum += dyn * gain[i];
      }
      w_total += w_sum, wn_total += wn_sum;
    }
    if (call.dbias) {
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) dbias[i] += to_wide(dy[i]);
    }

    const W w_mean = call.layer_norm ? w_total / hidden : 0, wn_mean = wn_total / hidden;
    const auto dx_at = [&](int64_t i) MEGATRON_RU_INLINE_LAMBDA {
      const W n = (to_wide(x[i]) - mean) * inverse_deviation;
      return (to_wide(dy[i]) * gain[i] - w_mean - n * wn_mean) * inverse_deviation;
    };
    if (call.dsum) {
      const U* dsum = unpacked(static_cast<const T*>(call.dsum), row, call.dsum_stride, hidden, dsum_room);
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) dx[i] = from_wide<U>(dx_at(i) + to_wide(dsum[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) dx[i] = from_wide<U>(dx_at(i));
    }
    pack(dx, hidden, dx_row);
  }
}

}  // namespace

MEGATRON_RU_CLONES void norm_forward_cpu(const NormForward& call, int64_t first_row, int64_t last_row) {
  switch (call.dtype) {
    case Dtype::kFloat64: return forward<double, double>(call, first_row, last_row);
    case Dtype::kFloat32: return forward<float, float>(call, first_row, last_row);
    case Dtype::kFloat16: return forward<Half, float>(call, first_row, last_row);
    case Dtype::kBFloat16: return forward<BFloat16, float>(call, first_row, last_row);
  }
}

MEGATRON_RU_CLONES void norm_backward_cpu(const NormBackward& call, int64_t partial_row, int64_t first_row,
                                          int64_t last_row) {
  switch (call.dtype) {
    case Dtype::kFloat64: return backward<double, double>(call, partial_row, first_row, last_row);
    case Dtype::kFloat32: return backward<float, float>(call, partial_row, first_row, last_row);
    case Dtype::kFloat16: return backward<Half, float>(call, partial_row, first_row, last_row);
    case Dtype::kBFloat16: return backward<BFloat16, float>(call, partial_row, first_row, last_row);
  }
}

}  // namespace megatron_ru
