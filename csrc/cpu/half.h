// Runs of binary16 numbers, converted by the processor where it can (F16C is in all that have AVX2; AVX-512 converts
// twice as many at once): no compiler finds those instructions in a loop over integers.
#pragma once

#include <cstdint>

namespace megatron_ru {

struct Half;

void widen_halves(const Half* from, int64_t count, float* to);
void narrow_halves(const float* from, int64_t count, Half* to);

}  // namespace megatron_ru
