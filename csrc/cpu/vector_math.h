// Functions that vectorise inside a loop: no calls, no branches, no tables. Those of double are the standard library's,
// for gradients are checked against differences there. Polynomials are minimax fits in relative error (Remez exchange).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "numbers.h"

namespace megatron_ru {

MEGATRON_RU_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) for x <= 88, within 1.1 ulp (1.4 without FMA); below -87.7 it is 0, and NaN stays NaN. All callers subtract a
// maximum or negate a magnitude first, so larger x do not occur, and 2^n is a float of its own.
//
// x = n ln 2 + r (Cody and Waite, Software Manual for the Elementary Functions, 1980, chapter 6), exp(r) = 1 + r q(r).
MEGATRON_RU_INLINE float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // high has 10 bits
  constexpr float kLowest = -88.0296919f;           // -127 ln 2, whose 2^n below is 0
  constexpr float kRounder = 12582912 + 127;        // 1.5 * 2^23 rounds to a whole number; 127 is the bias of exponents
  const float bounded = kLowest > x ? kLowest : x;  // comparisons with NaN are false
  const float shifted = bounded * kLog2E + kRounder;
  const float power = bits_as<float>(bits_as<uint32_t>(shifted) << 23);
  const float n = shifted - kRounder;
  const float r = (bounded - n * kLn2High) - n * kLn2Low;
  float q = 1.38436451e-3f;  // error 2.0e-9 on |r| <= ln(2) / 2
  q = q * r + 8.37416338e-3f;
  q = q * r + 4.16680026e-2f;
  q = q * r + 1.66664312e-1f;
  q = q * r + 4.99999942e-1f;
  q = q * r + 1.00000003f;
  return (q * r + 1.0f) * power;
}

// 1 / (1 + exp(-x))
template <class W>
MEGATRON_RU_INLINE W sigmoid(W x) {
  const W small = exponential(-std::abs(x));  // never overflows
  return (x < 0 ? small : W(1)) / (1 + small);
}

// The standard normal distribution: its density at x and the probability of values below x.
template <class W>
struct Normal {
  W probability, density;
};

MEGATRON_RU_INLINE Normal<double> normal_at(double x) {
  return {0.5 * std::erfc(-x * 0.70710678118654752440), 0.39894228040143267794 * std::exp(-0.5 * x * x)};
}

// P(value > x) = exp(-x^2 / 2) t p(t) with t = 1 / (1 + 0.3 x), for x >= 0: the shape of Hastings, Approximations for
// Digital Computers, 1955, sheet 45, refitted on 0 <= x <= 14. One exponential serves both results.
MEGATRON_RU_INLINE Normal<float> normal_at(float x) {
  const float distance = std::abs(x);
  const float bell = exponential(-0.5f * x * x);
  const float t = 1.0f / (1.0f + 0.3f * distance);
  float p = 3.567476627e-2f;  // error 1.5e-7
  p = p * t - 1.572030495e-1f;
  p = p * t + 2.063534490e-1f;
  p = p * t - 5.368359191e-2f;
  p = p * t + 1.285615996e-1f;
  p = p * t + 9.991350000e-2f;
  p = p * t + 1.207539548e-1f;
  p = p * t + 1.196292989e-1f;
  const float tail = bell * t * p;
  return {x < 0.0f ? tail : 1.0f - tail, 0.39894228f * bell};
}

}  // namespace megatron_ru
