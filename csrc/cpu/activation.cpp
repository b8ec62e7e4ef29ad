// Pointwise and gated activations. GELU: Hendrycks and Gimpel, 2016; gated forms: Shazeer, GLU Variants, 2020.
#include <algorithm>

#include "numbers.h"
#include "vector_math.h"

namespace megatron_ru {
namespace {

// So many columns at a time stay in the first cache, whatever becomes of them.
constexpr int64_t kBlock = 512;

// How many columns are taken at a time: a whole row where nothing passes through a room.
template <class W>
MEGATRON_RU_INLINE int64_t block_of(Dtype dtype, bool has_bias, int64_t columns) {
  return dtype == kDtypeOf<W> && !has_bias ? columns : kBlock;
}

template <class W>
struct Pair {
  W value, slope;
};

// Each function gives its value and its slope; the compiler drops what a caller leaves aside. Comparisons are written
// so that NaN goes through.
struct Relu {
  template <class W>
  static MEGATRON_RU_INLINE Pair<W> at(W x) {
    return {x <= 0 ? W(0) : x, x <= 0 ? W(0) : W(1)};
  }
};

struct Gelu {
  template <class W>
  static MEGATRON_RU_INLINE Pair<W> at(W x) {
    const Normal<W> normal = normal_at(x);
    return {x * normal.probability, normal.probability + x * normal.density};
  }
};

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), written as x sigmoid(2u).
struct GeluTanh {
  template <class W>
  static MEGATRON_RU_INLINE Pair<W> at(W x) {
    constexpr W kTwice = W(1.59576912160573071176), kCubic = W(0.044715);  // 2 sqrt(2 / pi)
    const W square = x * x;
    const W share = sigmoid(kTwice * (x + kCubic * square * x));
    return {x * share, share + x * share * (1 - share) * kTwice * (1 + 3 * kCubic * square)};
  }
};

struct Swish {
  template <class W>
  static MEGATRON_RU_INLINE Pair<W> at(W x) {
    const W share = sigmoid(x);
    return {x * share, share * (1 + x * (1 - share))};
  }
};

// `count` numbers from `column` on, with the bias added where there is one.
template <class W>
MEGATRON_RU_INLINE const W* biased(const void* row, const void* bias, Dtype dtype, int64_t column, int64_t count,
                                   W* room) {
  const W* x = widen(element(row, dtype, column), dtype, count, room);
  if (!bias) return x;
  W bias_room[kBlock];
  const W* b = widen(element(bias, dtype, column), dtype, count, bias_room);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) room[i] = x[i] + b[i];
  return room;
}

template <class Function, class W>
MEGATRON_RU_INLINE void forward(const ActivationForward& call, int64_t first_row, int64_t last_row) {
  const Dtype dtype = call.dtype;
  const int64_t block = block_of<W>(dtype, call.gate_bias || call.up_bias, call.columns);
  W gate_room[kBlock], up_room[kBlock], out_room[kBlock];
  for (int64_t row = first_row; row < last_row; ++row) {
    const void* gate_row = element(call.gate, dtype, row * call.gate_stride);
    const void* up_row = call.up ? element(call.up, dtype, row * call.up_stride) : nullptr;
    for (int64_t column = 0; column < call.columns; column += block) {
      const int64_t count = std::min(block, call.columns - column);
      const W* gate = biased(gate_row, call.gate_bias, dtype, column, count, gate_room);
      void* out_to = element(call.out, dtype, row * call.out_stride + column);
      W* out = room_for(out_to, dtype, out_room);
      if (up_row) {
        const W* up = biased(up_row, call.up_bias, dtype, column, count, up_room);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = Function::at(gate[i]).value * up[i];
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = Function::at(gate[i]).value;
      }
      narrow(out, count, dtype, out_to);
    }
  }
}

// Every block is read before it is written, so the gradients may stand where the inputs stood.
template <class Function, class W>
MEGATRON_RU_INLINE void backward(const ActivationBackward& call, int64_t first_row, int64_t last_row) {
  const Dtype dtype = call.dtype;
  const int64_t block = block_of<W>(dtype, call.gate_bias || call.up_bias, call.columns);
  W dy_room[kBlock], gate_room[kBlock], up_room[kBlock], dgate_room[kBlock], dup_room[kBlock];
  for (int64_t row = first_row; row < last_row; ++row) {
    const void* gate_row = element(call.gate, dtype, row * call.gate_stride);
    const void* up_row = call.up ? element(call.up, dtype, row * call.up_stride) : nullptr;
    for (int64_t column = 0; column < call.columns; column += block) {
      const int64_t count = std::min(block, call.columns - column);
      const W* dy = widen(element(call.dy, dtype, row * call.dy_stride + column), dtype, count, dy_room);
      const W* gate = biased(gate_row, call.gate_bias, dtype, column, count, gate_room);
      void* dgate_to = element(call.dgate, dtype, row * call.dgate_stride + column);
      W* dgate = room_for(dgate_to, dtype, dgate_room);
      if (up_row) {
        const W* up = biased(up_row, call.up_bias, dtype, column, count, up_room);
        void* dup_to = element(call.dup, dtype, row * call.dup_stride + column);
        W* dup = room_for(dup_to, dtype, dup_room);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const Pair<W> pair = Function::at(gate[i]);
          const W dvalue = dy[i] * up[i];
          dup[i] = dy[i] * pair.value;
          dgate[i] = dvalue * pair.slope;
        }
        narrow(dup, count, dtype, dup_to);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) dgate[i] = dy[i] * Function::at(gate[i]).slope;
      }
      narrow(dgate, count, dtype, dgate_to);
    }
  }
}

template <class W>
MEGATRON_RU_INLINE void forward_of_any(const ActivationForward& call, int64_t first_row, int64_t last_row) {
  switch (call.function) {
    case Pointwise::kRelu: return forward<Relu, W>(call, first_row, last_row);
    case Pointwise::kGelu: return forward<Gelu, W>(call, first_row, last_row);
    case Pointwise::kGeluTanh: return forward<GeluTanh, W>(call, first_row, last_row);
    case Pointwise::kSwish: return forward<Swish, W>(call, first_row, last_row);
  }
}

template <class W>
MEGATRON_RU_INLINE void backward_of_any(const ActivationBackward& call, int64_t first_row, int64_t last_row) {
  switch (call.function) {
    case Pointwise::kRelu: return backward<Relu, W>(call, first_row, last_row);
    case Pointwise::kGelu: return backward<Gelu, W>(call, first_row, last_row);
    case Pointwise::kGeluTanh: return backward<GeluTanh, W>(call, first_row, last_row);
    case Pointwise::kSwish: return backward<Swish, W>(call, first_row, last_row);
  }
}

}  // namespace

MEGATRON_RU_CLONES void activation_forward_cpu(const ActivationForward& call, int64_t first_row, int64_t last_row) {
  if (call.dtype == Dtype::kFloat64) return forward_of_any<double>(call, first_row, last_row);
  return forward_of_any<float>(call, first_row, last_row);
}

MEGATRON_RU_CLONES void activation_backward_cpu(const ActivationBackward& call, int64_t first_row, int64_t last_row) {
  if (call.dtype == Dtype::kFloat64) return backward_of_any<double>(call, first_row, last_row);
  return backward_of_any<float>(call, first_row, last_row);
}

}  // namespace megatron_ru
