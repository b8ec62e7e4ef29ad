// Numbers in memory and numbers in arithmetic. Kernels compute in W, "wide": float, or double beside double. They take
// runs of numbers in through `widen` and hand them back through `narrow`, so that only this file knows the small types.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../include/launchers.h"
#include "clones.h"
#include "half.h"

namespace megatron_ru {

template <class To, class From>
MEGATRON_RU_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept one by one");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};

// IEEE binary16, in integer operations that vectorise everywhere. Whole runs go faster through half.h.
struct Half {
  uint16_t bits;
};

MEGATRON_RU_INLINE double to_wide(double number) { return number; }
MEGATRON_RU_INLINE float to_wide(float number) { return number; }
MEGATRON_RU_INLINE float to_wide(BFloat16 number) { return bits_as<float>(static_cast<uint32_t>(number.bits) << 16); }

MEGATRON_RU_INLINE float to_wide(Half number) {
  constexpr uint32_t kBiasDifference = 112u << 23, kOneHalf = 126u << 23;
  const uint32_t sign = static_cast<uint32_t>(number.bits & 0x8000) << 16;
  const uint32_t magnitude = number.bits & 0x7fff;
  const uint32_t special = magnitude >= 0x7c00 ? kBiasDifference : 0;  // infinity and NaN have all exponent bits set
  const uint32_t normal = (magnitude << 13) + kBiasDifference + special;
  // A subnormal is a count of 2^-24, which is the last bit of one half.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(kOneHalf | magnitude) - 0.5f);
  return bits_as<float>(sign | (magnitude < 0x0400 ? subnormal : normal));
}

// The number nearest to a wide one; T = W itself for the wide types.
template <class T, class W>
MEGATRON_RU_INLINE T from_wide(W number) {
  return number;
}

// Rounds to nearest, ties to even; adding to the bits of a NaN could make it an infinity or a zero.
template <>
MEGATRON_RU_INLINE BFloat16 from_wide<BFloat16>(float number) {
  const uint32_t bits = bits_as<uint32_t>(number);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(number != number ? 0x7fc0 : rounded)};
}

template <>
MEGATRON_RU_INLINE Half from_wide<Half>(float number) {
  constexpr uint32_t kBiasDifference = 112u << 23, kOneHalf = 126u << 23, kSmallestNormal = 113u << 23;
  const uint32_t bits = bits_as<uint32_t>(number);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t normal = (magnitude - kBiasDifference + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  normal = normal > 0x7c00 ? 0x7c00 : normal;
  // Adding one half leaves the rounded count of 2^-24 in the last bits.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - kOneHalf;
  const uint32_t finite = magnitude < kSmallestNormal ? subnormal : normal;
  const uint32_t half = number != number ? 0x7e00 : finite;
  return {static_cast<uint16_t>(((bits >> 16) & 0x8000) | half)};
}

MEGATRON_RU_INLINE int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

MEGATRON_RU_INLINE const void* element(const void* numbers, Dtype dtype, int64_t index) {
  return static_cast<const char*>(numbers) + index * bytes_of(dtype);
}

MEGATRON_RU_INLINE void* element(void* numbers, Dtype dtype, int64_t index) {
  return static_cast<char*>(numbers) + index * bytes_of(dtype);
}

template <class W>
constexpr Dtype kDtypeOf = sizeof(W) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

MEGATRON_RU_INLINE void widen_from(const Half* from, int64_t count, float* to) { widen_halves(from, count, to); }

template <class T, class W>
MEGATRON_RU_INLINE void widen_from(const T* from, int64_t count, W* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<W>(to_wide(from[i]));
}

// `count` numbers of `dtype` as W: they themselves where they are of that type already, else copies in `room`.
template <class W>
MEGATRON_RU_INLINE const W* widen(const void* numbers, Dtype dtype, int64_t count, W* room) {
  if (dtype == kDtypeOf<W>) return static_cast<const W*>(numbers);
  switch (dtype) {
    case Dtype::kFloat16: widen_from(static_cast<const Half*>(numbers), count, room); break;
    case Dtype::kBFloat16: widen_from(static_cast<const BFloat16*>(numbers), count, room); break;
    case Dtype::kFloat32: widen_from(static_cast<const float*>(numbers), count, room); break;
    case Dtype::kFloat64: widen_from(static_cast<const double*>(numbers), count, room); break;
  }
  return room;
}

MEGATRON_RU_INLINE void narrow_to(const float* from, int64_t count, Half* to) { narrow_halves(from, count, to); }

template <class W, class T>
MEGATRON_RU_INLINE void narrow_to(const W* from, int64_t count, T* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = from_wide<T>(static_cast<float>(from[i]));
}

// Where results for `out` are to be computed: `out` itself where it is of type W, else `room`, and `narrow` moves them.
template <class W>
MEGATRON_RU_INLINE W* room_for(void* out, Dtype dtype, W* room) {
  return dtype == kDtypeOf<W> ? static_cast<W*>(out) : room;
}

template <class W>
MEGATRON_RU_INLINE void narrow(const W* numbers, int64_t count, Dtype dtype, void* out) {
  if (dtype == Dtype::kFloat16) narrow_to(numbers, count, static_cast<Half*>(out));
  if (dtype == Dtype::kBFloat16) narrow_to(numbers, count, static_cast<BFloat16*>(out));
}

}  // namespace megatron_ru
