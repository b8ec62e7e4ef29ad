// Looks for NaN and infinities: the numbers whose exponent bits are all set.
#include <algorithm>

#include "numbers.h"

namespace megatron_ru {
namespace {

// Blocks are long enough to stream and short enough to stop early.
constexpr int64_t kBlock = 16384;

template <class Bits>
MEGATRON_RU_INLINE bool holds_exponent(const void* tensor, int64_t size, Bits exponent) {
  const Bits* bits = static_cast<const Bits*>(tensor);
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, size);
    Bits found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = begin; i < end; ++i) found |= (bits[i] & exponent) == exponent ? 1 : 0;
    if (found) return true;
  }
  return false;
}

}  // namespace

MEGATRON_RU_CLONES bool holds_nonfinite_cpu(const void* tensor, int64_t size, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return holds_exponent<uint64_t>(tensor, size, 0x7ff0000000000000);
    case Dtype::kFloat32: return holds_exponent<uint32_t>(tensor, size, 0x7f800000);
    case Dtype::kFloat16: return holds_exponent<uint16_t>(tensor, size, 0x7c00);
    case Dtype::kBFloat16: return holds_exponent<uint16_t>(tensor, size, 0x7f80);
  }
  return false;
}

}  // namespace megatron_ru
