// Cross entropy with label smoothing (Szegedy et al., 2016, section 7) and z-loss (Chowdhery et al., PaLM, 2022,
// section 5). Rows are read block by block with a running maximum (Milakov and Gimelshein, Online normalizer
// calculation for softmax, 2018, algorithm 3), so that logits too many for the cache are fetched once per pass.
#include <algorithm>
#include <cmath>
#include <limits>

#include "numbers.h"
#include "vector_math.h"

namespace megatron_ru {
namespace {

constexpr int64_t kBlock = 1024;

template <class W>
constexpr W kNan = std::numeric_limits<W>::quiet_NaN();

template <class W>
constexpr W kInfinity = std::numeric_limits<W>::infinity();

// One row of `statistics`.
template <class W>
struct Statistics {
  W max, exponentials, target, total;
};

bool is_valid(const CrossEntropy& call, int64_t target) { return target >= 0 && target < call.vocab_total; }

// The column of `target` among those held here, or -1.
int64_t column_of(const CrossEntropy& call, int64_t target) {
  const int64_t column = target - call.first_column;
  return column >= 0 && column < call.columns ? column : -1;
}

// A NaN never becomes the maximum, yet stays in the sum of exponentials, and from there reaches loss and gradient.
template <class W>
MEGATRON_RU_INLINE Statistics<W> statistics_of(const CrossEntropy& call, const void* row, int64_t target) {
  Statistics<W> all = {-kInfinity<W>, 0, 0, 0};
  W room[kBlock];
  for (int64_t begin = 0; begin < call.columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, call.columns - begin);
    const W* x = widen(element(row, call.dtype, begin), call.dtype, count, room);
    W max = -kInfinity<W>;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < count; ++i) max = x[i] > max ? x[i] : max;
    if (max > all.max) {
      all.exponentials *= exponential(all.max - max);
      all.max = max;
    }
    // With nothing but -inf so far, subtracting it would give NaN where exp(-inf) = 0 is meant.
    const W reference = all.max == -kInfinity<W> ? 0 : all.max;
    W exponentials = 0;
#pragma omp simd reduction(+ : exponentials)
    for (int64_t i = 0; i < count; ++i) exponentials += exponential(x[i] - reference);
    all.exponentials += exponentials;
    if (call.label_smoothing > 0) {
      W total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < count; ++i) total += x[i];
      all.total += total;
    }
  }
  const int64_t column = column_of(call, target);
  if (column >= 0) all.target = *widen(element(row, call.dtype, column), call.dtype, 1, room);
  return all;
}

// The statistics of all parts of a row together.
template <class W>
MEGATRON_RU_INLINE Statistics<W> merged(const Statistics<W>* parts, int64_t count, int64_t stride) {
  Statistics<W> all = parts[0];
  for (int64_t i = 1; i < count; ++i) all.max = std::max(all.max, parts[i * stride].max);
  all.exponentials = 0, all.target = 0, all.total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Statistics<W>& part = parts[i * stride];
    all.exponentials += part.exponentials * exponential(part.max - all.max);
    all.target += part.target;
    all.total += part.total;
  }
  return all;
}

// Writes loss and, where it is asked for, lse of one row; returns lse. The large maximum is subtracted from what is
// near it before anything small is added: lse itself has lost the digits of log(exponentials) where logits are in the
// thousands.
template <class W>
MEGATRON_RU_INLINE W write_loss(const CrossEntropy& call, const Statistics<W>& all, int64_t row) {
  const int64_t target = call.target[row];
  const W log_sum = std::log(all.exponentials), lse = all.max + log_sum;
  const W smoothing = static_cast<W>(call.label_smoothing);
  W loss = (1 - smoothing) * (all.max - all.target + log_sum) + static_cast<W>(call.z_loss) * lse * lse;
  if (smoothing > 0) loss += smoothing * (all.max - all.total / call.vocab_total + log_sum);
  if (!is_valid(call, target)) loss = kNan<W>;
  static_cast<W*>(call.loss)[row] = target == call.ignore_index ? 0 : loss;
  if (call.lse != nullptr) static_cast<W*>(call.lse)[row] = lse;
  return lse;
}

// Writes the gradient of one row, where p = exp(x - reference) / exponentials; `gradient` may be the logits.
template <class W>
MEGATRON_RU_INLINE void write_gradient(const CrossEntropy& call, int64_t row, W reference, W exponentials, W lse) {
  const Dtype dtype = call.dtype;
  const void* logits = element(call.logits, dtype, row * call.logits_stride);
  void* gradient = element(call.gradient, dtype, row * call.gradient_stride);
  const int64_t target = call.target[row], target_column = column_of(call, target);
  if (target == call.ignore_index) {
    std::memset(gradient, 0, call.columns * bytes_of(dtype));
    return;
  }
  const W upstream =
      call.loss_gradient ? static_cast<const W*>(call.loss_gradient)[row * call.loss_gradient_stride] : 1;
  const W z_factor = 1 + 2 * static_cast<W>(call.z_loss) * lse;
  const W factor = is_valid(call, target) ? upstream * z_factor / exponentials : kNan<W>;
  const W everywhere = upstream * static_cast<W>(call.label_smoothing / call.vocab_total);
  const W at_target = upstream * static_cast<W>(1 - call.label_smoothing);
  W room[kBlock], result_room[kBlock];
  for (int64_t begin = 0; begin < call.columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, call.columns - begin);
    const W* x = widen(element(logits, dtype, begin), dtype, count, room);
    void* result_to = element(gradient, dtype, begin);
    W* result = room_for(result_to, dtype, result_room);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) result[i] = factor * exponential(x[i] - reference) - everywhere;
    if (target_column >= begin && target_column < begin + count) result[target_column - begin] -= at_target;
    narrow(result, count, dtype, result_to);
  }
}

template <class W>
MEGATRON_RU_INLINE void statistics(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const void* logits = element(call.logits, call.dtype, row * call.logits_stride);
    static_cast<Statistics<W>*>(call.statistics)[row] = statistics_of<W>(call, logits, call.target[row]);
  }
}

template <class W>
MEGATRON_RU_INLINE void merge(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  const Statistics<W>* parts = static_cast<const Statistics<W>*>(call.statistics);
  for (int64_t row = first_row; row < last_row; ++row) {
    write_loss(call, merged(parts + row, call.parts, call.rows), row);
  }
}

template <class W>
MEGATRON_RU_INLINE void backward(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const W lse = static_cast<const W*>(call.lse)[row];
    write_gradient<W>(call, row, lse, 1, lse);
  }
}

template <class W>
MEGATRON_RU_INLINE void one_pass(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const void* logits = element(call.logits, call.dtype, row * call.logits_stride);
    const Statistics<W> part = statistics_of<W>(call, logits, call.target[row]), all = merged(&part, 1, 1);
    const W lse = write_loss(call, all, row);
    write_gradient<W>(call, row, all.max, all.exponentials, lse);
  }
}

template <class W>
MEGATRON_RU_INLINE void rescale(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  const W* loss_gradient = static_cast<const W*>(call.loss_gradient);
  const W* expected_gradient = static_cast<const W*>(call.expected);
  W room[kBlock], result_room[kBlock];
  for (int64_t row = first_row; row < last_row; ++row) {
    const W wanted = loss_gradient ? loss_gradient[row * call.loss_gradient_stride] : 1;
    const W expected = expected_gradient ? expected_gradient[row * call.expected_stride] : 1;
    if (wanted == expected) continue;
    const W factor = wanted / expected;
    void* gradient = element(call.gradient, call.dtype, row * call.gradient_stride);
    for (int64_t begin = 0; begin < call.columns; begin += kBlock) {
      const int64_t count = std::min(kBlock, call.columns - begin);
      void* result_to = element(gradient, call.dtype, begin);
      const W* x = widen<W>(result_to, call.dtype, count, room);
      W* result = room_for(result_to, call.dtype, result_room);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) result[i] = x[i] * factor;
      narrow(result, count, call.dtype, result_to);
    }
  }
}

}  // namespace

MEGATRON_RU_CLONES void cross_entropy_statistics_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  if (call.dtype == Dtype::kFloat64) return statistics<double>(call, first_row, last_row);
  return statistics<float>(call, first_row, last_row);
}

MEGATRON_RU_CLONES void cross_entropy_merge_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  if (call.dtype == Dtype::kFloat64) return merge<double>(call, first_row, last_row);
  return merge<float>(call, first_row, last_row);
}

MEGATRON_RU_CLONES void cross_entropy_backward_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  if (call.dtype == Dtype::kFloat64) return backward<double>(call, first_row, last_row);
  return backward<float>(call, first_row, last_row);
}

MEGATRON_RU_CLONES void cross_entropy_one_pass_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  if (call.dtype == Dtype::kFloat64) return one_pass<double>(call, first_row, last_row);
  return one_pass<float>(call, first_row, last_row);
}

MEGATRON_RU_CLONES void cross_entropy_rescale_cpu(const CrossEntropy& call, int64_t first_row, int64_t last_row) {
  if (call.dtype == Dtype::kFloat64) return rescale<double>(call, first_row, last_row);
  return rescale<float>(call, first_row, last_row);
}

}  // namespace megatron_ru
