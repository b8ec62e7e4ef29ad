#include "half.h"

#include "numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace megatron_ru {
namespace {

// Each converts as many of `count` numbers as fill its registers, and returns how many.
#if defined(__x86_64__)
__attribute__((target("avx512f"))) int64_t widen_with_avx512(const Half* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  }
  return i;
}

__attribute__((target("avx512f"))) int64_t narrow_with_avx512(const float* from, int64_t count, Half* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves);
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t widen_with_f16c(const Half* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t narrow_with_f16c(const float* from, int64_t count, Half* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}

int64_t widen_by_processor(const Half* from, int64_t count, float* to) {
  if (__builtin_cpu_supports("avx512f")) return widen_with_avx512(from, count, to);
  return __builtin_cpu_supports("avx2") ? widen_with_f16c(from, count, to) : 0;
}

int64_t narrow_by_processor(const float* from, int64_t count, Half* to) {
  if (__builtin_cpu_supports("avx512f")) return narrow_with_avx512(from, count, to);
  return __builtin_cpu_supports("avx2") ? narrow_with_f16c(from, count, to) : 0;
}
#else
int64_t widen_by_processor(const Half*, int64_t, float*) { return 0; }
int64_t narrow_by_processor(const float*, int64_t, Half*) { return 0; }
#endif

}  // namespace

void widen_halves(const Half* from, int64_t count, float* to) {
  for (int64_t i = widen_by_processor(from, count, to); i < count; ++i) to[i] = to_wide(from[i]);
}

void narrow_halves(const float* from, int64_t count, Half* to) {
  for (int64_t i = narrow_by_processor(from, count, to); i < count; ++i) to[i] = from_wide<Half>(from[i]);
}

}  // namespace megatron_ru
