// AdamW (Loshchilov and Hutter, 2019, algorithm 2) over one range of one tensor.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "numbers.h"

namespace megatron_ru {
namespace {

// Blocks are computed whole, the last one in room of its own. The compiler may fuse a multiplication and an addition in
// one copy of a loop and not in another, so that a shorter loop for a rest would make bits depend on where a range
// ends.
constexpr int64_t kBlock = 256;

// `count` numbers as a whole block: where they are if they are one, else copied to `room`.
template <class W>
MEGATRON_RU_INLINE W* block_of(W* numbers, int64_t count, std::remove_const_t<W>* room) {
  if (count == kBlock) return numbers;
  std::copy_n(numbers, count, room);
  return room;
}

template <class W>
MEGATRON_RU_INLINE void put_back(const W* block, int64_t count, W* numbers) {
  if (block != numbers) std::copy_n(block, count, numbers);
}

template <class W>
MEGATRON_RU_INLINE void update(const AdamW& call, int64_t tensor, int64_t first, int64_t last) {
  if (call.found_inf && *call.found_inf != 0) return;
  // What all elements share is computed in double and rounded once.
  const double lr = call.lr_on_device ? *call.lr_on_device : call.lr, step = *call.step;
  const double scale = call.gradient_scale ? *call.gradient_scale : 1.0;
  const W divisor = static_cast<W>(call.maximize ? -scale : scale);
  const W decay = static_cast<W>(1 - lr * call.weight_decay), eps = static_cast<W>(call.eps);
  const W beta1 = static_cast<W>(call.beta1), rest1 = static_cast<W>(1 - call.beta1);
  const W beta2 = static_cast<W>(call.beta2), rest2 = static_cast<W>(1 - call.beta2);
  const W step_size = static_cast<W>(lr / (1 - std::pow(call.beta1, step)));
  const W deviation_scale = static_cast<W>(1 / std::sqrt(1 - std::pow(call.beta2, step)));

  W gradient_room[kBlock] = {}, wide_room[kBlock], p_room[kBlock] = {}, m_room[kBlock] = {}, v_room[kBlock] = {};
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t count = std::min(kBlock, last - begin);
    const void* gradient_from = element(call.gradients[tensor], call.gradient_dtype, begin);
    W* p_from = static_cast<W*>(call.parameters[tensor]) + begin;
    W* m_from = static_cast<W*>(call.first_moments[tensor]) + begin;
    W* v_from = static_cast<W*>(call.second_moments[tensor]) + begin;

    const W* wide_gradient = widen(gradient_from, call.gradient_dtype, count, wide_room);
    const W* gradient = block_of(wide_gradient, count, gradient_room);
    W* p = block_of(p_from, count, p_room);
    W* m = block_of(m_from, count, m_room);
    W* v = block_of(v_from, count, v_room);
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      const W g = gradient[i] / divisor;
      m[i] = beta1 * m[i] + rest1 * g;
      v[i] = beta2 * v[i] + rest2 * g * g;
      p[i] = p[i] * decay - step_size * m[i] / (std::sqrt(v[i]) * deviation_scale + eps);
    }
    if (call.copies) narrow(p, count, call.copy_dtype, element(call.copies[tensor], call.copy_dtype, begin));
    put_back(p, count, p_from);
    put_back(m, count, m_from);
    put_back(v, count, v_from);
  }
}

}  // namespace

MEGATRON_RU_CLONES void adamw_cpu(const AdamW& call, int64_t tensor, int64_t first, int64_t last) {
  if (call.dtype == Dtype::kFloat64) return update<double>(call, tensor, first, last);
  return update<float>(call, tensor, first, last);
}

}  // namespace megatron_ru
