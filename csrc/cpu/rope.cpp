// Rotary position embedding (Su et al., RoFormer, 2021, equation 34), and positions of packed sequences.
#include <cstring>
#include <limits>

#include "numbers.h"

namespace megatron_ru {
namespace {

// Turns every pair of one head. Both channels of a pair are read before either is written, so `out` may be `in`.
template <bool kInterleaved, class T, class W>
MEGATRON_RU_INLINE void turn(const T* in, T* out, const W* cos, const W* sin, W direction, int64_t pairs) {
  constexpr int64_t kStep = kInterleaved ? 2 : 1;
  const int64_t partner = kInterleaved ? 1 : pairs;
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const W a = to_wide(in[kStep * i]), b = to_wide(in[kStep * i + partner]), s = direction * sin[i];
    out[kStep * i] = from_wide<T>(a * cos[i] - b * s);
    out[kStep * i + partner] = from_wide<T>(b * cos[i] + a * s);
  }
}

// The row of the table for one token, or -1 where the table has none.
MEGATRON_RU_INLINE int64_t table_row(const Rope& call, int64_t s, int64_t b) {
  const int64_t position =
      call.positions ? call.positions[s * call.positions_stride[0] + b * call.positions_stride[1]] : s;
  const int64_t row = call.offset + position;
  return row >= 0 && row < call.table_rows ? row : -1;
}

template <class T, class W>
MEGATRON_RU_INLINE void rope(const Rope& call, int64_t first_token, int64_t last_token) {
  const int64_t pairs = call.rotary / 2;
  const W direction = call.inverse ? -1 : 1;
  const T nan = from_wide<T>(std::numeric_limits<W>::quiet_NaN());

  for (int64_t token = first_token; token < last_token; ++token) {
    const int64_t s = token / call.batch, b = token % call.batch;
    const int64_t row = table_row(call, s, b);
    const W* cos = static_cast<const W*>(call.cos) + row * pairs;
    const W* sin = static_cast<const W*>(call.sin) + row * pairs;

    for (int tensor = 0; tensor < 2; ++tensor) {
      if (!call.in[tensor]) continue;
      const int64_t *in_stride = call.in_stride[tensor], *out_stride = call.out_stride[tensor];
      for (int64_t head = 0; head < call.heads[tensor]; ++head) {
        const T* in =
            static_cast<const T*>(call.in[tensor]) + s * in_stride[0] + b * in_stride[1] + head * in_stride[2];
        T* out = static_cast<T*>(call.out[tensor]) + s * out_stride[0] + b * out_stride[1] + head * out_stride[2];
        if (row < 0) {
          for (int64_t i = 0; i < call.rotary; ++i) out[i] = nan;
        } else if (call.interleaved) {
          turn<true>(in, out, cos, sin, direction, pairs);
        } else {
          turn<false>(in, out, cos, sin, direction, pairs);
        }
        if (in != out && call.rotary < call.head_dim) {
          std::memcpy(out + call.rotary, in + call.rotary, (call.head_dim - call.rotary) * sizeof(T));
        }
      }
    }
  }
}

template <class Offset>
void packed_positions(const PackedPositions& call) {
  const Offset* first = static_cast<const Offset*>(call.cu_seqlens);
  int64_t sequence = 0;
  for (int64_t token = 0; token < call.total; ++token) {
    while (sequence + 1 < call.sequences && first[sequence + 1] <= token) ++sequence;
    call.positions[token] = token - first[sequence];
  }
}

}  // namespace

MEGATRON_RU_CLONES void rope_cpu(const Rope& call, int64_t first_token, int64_t last_token) {
  switch (call.dtype) {
    case Dtype::kFloat64: return rope<double, double>(call, first_token, last_token);
    case Dtype::kFloat32: return rope<float, float>(call, first_token, last_token);
    case Dtype::kFloat16: return rope<Half, float>(call, first_token, last_token);
    case Dtype::kBFloat16: return rope<BFloat16, float>(call, first_token, last_token);
  }
}

void packed_positions_cpu(const PackedPositions& call) {
  return call.is_int32 ? packed_positions<int32_t>(call) : packed_positions<int64_t>(call);
}

}  // namespace megatron_ru
