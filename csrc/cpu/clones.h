// How one build runs well on every processor: functions marked as clones are compiled for several of them, and the
// loader picks the best one once. What a clone calls is inlined into it, or it would be compiled for the oldest
// processor.
#pragma once

#include <cstdint>

#define MEGATRON_RU_INLINE inline __attribute__((always_inline))
// Stands after the parameters of a lambda.
#define MEGATRON_RU_INLINE_LAMBDA __attribute__((always_inline))

// Picking at load time needs glibc; the names of the levels (v3: AVX2 and FMA, v4: AVX-512) need GCC 12 or Clang 17.
// GCC before 12 knows single features only, where avx512f brings FMA along and avx2 does not.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__clang__) && __clang_major__ >= 17
#define MEGATRON_RU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define MEGATRON_RU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 8
#define MEGATRON_RU_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MEGATRON_RU_CLONES
#endif
