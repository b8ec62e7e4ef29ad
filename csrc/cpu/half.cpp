#include "half.h"

#include "numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace megatron_ru {
namespace {

#if defined(__x86_64__)
__attribute__((target("avx,f16c"))) int64_t widen_by_processor(const Half* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t narrow_by_processor(const float* from, int64_t count, Half* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    const __m128i high = _mm256_cvtps_ph(_mm256_loadu_ps(from + i + 8), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_set_m128i(high, low));
  }
  return i;
}

bool processor_converts() { return __builtin_cpu_supports("avx2"); }
#else
int64_t widen_by_processor(const Half*, int64_t, float*) { return 0; }
int64_t narrow_by_processor(const float*, int64_t, Half*) { return 0; }
bool processor_converts() { return false; }
#endif

}  // namespace

void widen_halves(const Half* from, int64_t count, float* to) {
  for (int64_t i = processor_converts() ? widen_by_processor(from, count, to) : 0; i < count; ++i) {
    to[i] = to_wide(from[i]);
  }
}

void narrow_halves(const float* from, int64_t count, Half* to) {
  for (int64_t i = processor_converts() ? narrow_by_processor(from, count, to) : 0; i < count; ++i) {
    to[i] = from_wide<Half>(from[i]);
  }
}

}  // namespace megatron_ru
