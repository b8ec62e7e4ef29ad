// RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba, Kiros and Hinton, 2016), row by row.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace megatron_ru {
namespace {

// Sums start anew for every block: shorter chains of additions round less, and the processor works at several at once.
// A block stays in the first cache for all that is done with it before the next.
constexpr int64_t kBlock = 512;

constexpr int64_t kBytesPerLine = 64;  // of the cache

// Rows are read several times. Those of binary16 are unpacked to float once, for a loop cannot do it as fast as half.h;
// numbers of other types are used where they are, and rooms stay empty.
template <class T>
using Unpacked = std::conditional_t<std::is_same_v<T, Half>, float, T>;

template <class T>
constexpr bool kIsPacked = !std::is_same_v<T, Unpacked<T>>;

// Where numbers stand unpacked, or are to be computed for `pack` to bring them to their place.
template <class T>
MEGATRON_RU_INLINE T* place(T* numbers, std::remove_const_t<T>*) {
  return numbers;
}

MEGATRON_RU_INLINE float* place(const Half*, float* room) { return room; }

template <class T>
MEGATRON_RU_INLINE const T* unpacked(const T* numbers, int64_t, T*) {
  return numbers;
}

MEGATRON_RU_INLINE const float* unpacked(const Half* numbers, int64_t count, float* room) {
  widen_halves(numbers, count, room);
  return room;
}

template <class T>
MEGATRON_RU_INLINE void pack(const T*, int64_t, T*) {}

MEGATRON_RU_INLINE void pack(const float* numbers, int64_t count, Half* to) { narrow_halves(numbers, count, to); }

// How many results are computed at a time: a whole row where they need no room.
template <class T>
MEGATRON_RU_INLINE int64_t results_at_once(int64_t hidden) {
  return kIsPacked<T> ? kBlock : hidden;
}

// Asks for numbers of the next row while this one is worked on, when memory would stand idle; wider ones than those of
// two bytes keep it busy as it is.
template <class T>
MEGATRON_RU_INLINE void prefetch(const T* numbers, int64_t count) {
  if (sizeof(T) > 2) return;
  for (int64_t i = 0; i < count; i += kBytesPerLine / sizeof(T)) __builtin_prefetch(numbers + i);
}

// The same for the place of results, in time: a store that waits for it would hold up all later ones.
template <class T>
MEGATRON_RU_INLINE void prefetch_to_write(const T* numbers, int64_t count) {
  if (sizeof(T) > 2) return;
  for (int64_t i = 0; i < count; i += kBytesPerLine / sizeof(T)) __builtin_prefetch(numbers + i, 1);
}

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
MEGATRON_RU_INLINE W sum_of(const T* x, int64_t count) {
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += to_wide(x[i]);
  return sum;
}

template <class W, class T>
MEGATRON_RU_INLINE W sum_of_squares(const T* x, W center, int64_t count) {
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += (to_wide(x[i]) - center) * (to_wide(x[i]) - center);
  return sum;
}

template <class T, class W>
MEGATRON_RU_INLINE void forward(const NormForward& call, int64_t first_row, int64_t last_row) {
  using U = Unpacked<T>;
  const int64_t hidden = call.hidden;
  const std::vector<W> gain_row = gain_of<W>(call.weight, call.weight_dtype, hidden, call.zero_centered);
  std::vector<W> bias_row(hidden);
  const W* gain = gain_row.data();
  const W* bias = call.bias ? widen(call.bias, call.weight_dtype, hidden, bias_row.data()) : bias_row.data();
  std::vector<U> x_room(kIsPacked<T> ? hidden : 0);
  U room[kBlock];

  for (int64_t row = first_row; row < last_row; ++row) {
    const T* x_row = static_cast<const T*>(call.x) + row * call.x_stride;
    T* sum_row = call.residual ? static_cast<T*>(call.sum) + row * hidden : nullptr;
    T* y_row = static_cast<T*>(call.y) + row * hidden;

    W total = 0, squares = 0;
    for (int64_t begin = 0; begin < hidden; begin += kBlock) {
      const int64_t count = std::min(kBlock, hidden - begin);
      U* x_block = x_room.data() + (kIsPacked<T> ? begin : 0);
      prefetch(x_row + call.x_stride + begin, count);
      prefetch_to_write(y_row + begin, count);
      const U* x = unpacked(x_row + begin, count, x_block);
      if (call.residual) {
        const T* residual_block = static_cast<const T*>(call.residual) + row * call.residual_stride + begin;
        prefetch(residual_block + call.residual_stride, count);
        const U* residual = unpacked(residual_block, count, room);
        prefetch_to_write(sum_row + hidden + begin, count);
        U* sum = place(sum_row + begin, room);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sum[i] = from_wide<U>(to_wide(x[i]) + to_wide(residual[i]));
        pack(sum, count, sum_row + begin);
        x = unpacked(sum_row + begin, count, x_block);  // rounded, as the next layer will read it
      }
      if (call.layer_norm) {
        total += sum_of<W>(x, count);
      } else {
        squares += sum_of_squares<W>(x, 0, count);
      }
    }
    const U* x = place(call.residual ? sum_row : x_row, x_room.data());
    const W mean = total / hidden;
    if (call.layer_norm) {
      for (int64_t begin = 0; begin < hidden; begin += kBlock) {
        squares += sum_of_squares(x + begin, mean, std::min(kBlock, hidden - begin));
      }
    }
    const W inverse_deviation = 1 / std::sqrt(squares / hidden + static_cast<W>(call.eps));
    for (int64_t begin = 0; begin < hidden; begin += results_at_once<T>(hidden)) {
      const int64_t count = std::min(results_at_once<T>(hidden), hidden - begin);
      U* y = place(y_row + begin, room);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const W n = (to_wide(x[begin + i]) - mean) * inverse_deviation;
        y[i] = from_wide<U>(n * gain[begin + i] + bias[begin + i]);
      }
      pack(y, count, y_row + begin);
    }
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
  const W* gain = gain_row.data();
  W* dweight = static_cast<W*>(call.partial) + partial_row * (call.dbias ? 2 : 1) * hidden;
  W* dbias = dweight + hidden;
  std::vector<U> x_room(kIsPacked<T> ? hidden : 0), dy_room(kIsPacked<T> ? hidden : 0);
  U dx_room[kBlock], dsum_room[kBlock];

  for (int64_t row = first_row; row < last_row; ++row) {
    const T* x_row = static_cast<const T*>(call.x) + row * call.x_stride;
    const T* dy_row = static_cast<const T*>(call.dy) + row * call.dy_stride;
    T* dx_row = static_cast<T*>(call.dx) + row * hidden;
    const U* x = place(x_row, x_room.data());
    const U* dy = place(dy_row, dy_room.data());
    const W mean = call.layer_norm ? static_cast<const W*>(call.mean)[row] : 0;
    const W inverse_deviation = static_cast<const W*>(call.inverse_deviation)[row];

    W w_total = 0, wn_total = 0;
    for (int64_t begin = 0; begin < hidden; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, hidden);
      prefetch(x_row + call.x_stride + begin, end - begin);
      prefetch(dy_row + call.dy_stride + begin, end - begin);
      prefetch_to_write(dx_row + begin, end - begin);
      if constexpr (kIsPacked<T>) {
        unpacked(x_row + begin, end - begin, x_room.data() + begin);
        unpacked(dy_row + begin, end - begin, dy_room.data() + begin);
      }
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
    for (int64_t begin = 0; begin < hidden; begin += results_at_once<T>(hidden)) {
      const int64_t count = std::min(results_at_once<T>(hidden), hidden - begin);
      U* dx = place(dx_row + begin, dx_room);
      if (call.dsum) {
        const T* dsum_block = static_cast<const T*>(call.dsum) + row * call.dsum_stride + begin;
        prefetch(dsum_block + call.dsum_stride, count);
        const U* dsum = unpacked(dsum_block, count, dsum_room);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) dx[i] = from_wide<U>(dx_at(begin + i) + to_wide(dsum[i]));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) dx[i] = from_wide<U>(dx_at(begin + i));
      }
      pack(dx, count, dx_row + begin);
    }
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
