// The emulator's version of CUDA's header: the type and its conversions.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;  // sign, 5 bits of exponent, 10 bits of significand
};

// Rounded to nearest, ties to even.
inline __half __float2half_rn(float value) {
    constexpr uint16_t kInfinity = 0x7C00, kNan = 0x7FFF;
    constexpr float kOverflows = 65520.0f;  // halfway between the largest number and the next
    const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
    const float magnitude = std::fabs(value);
    if (value != value) return {kNan};
    if (magnitude >= kOverflows) return {static_cast<uint16_t>(sign | kInfinity)};
    // In units in the last place, 2^(exponent - 10), which is 2^-24 for all subnormal numbers.
    int exponent = magnitude == 0 ? -14 : std::ilogb(magnitude);
    exponent = exponent < -14 ? -14 : exponent;
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    // A significand that rounds up to 2^11 carries into the exponent, as it should.
    return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units))};
}

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, significand = value.bits & 1023;
    float magnitude;
    if (exponent == 31) {
        magnitude = significand == 0 ? INFINITY : NAN;
    } else if (exponent == 0) {
        magnitude = std::ldexp(static_cast<float>(significand), -24);
    } else {
        magnitude = std::ldexp(static_cast<float>(significand + 1024), exponent - 25);
    }
    return value.bits >> 15 ? -magnitude : magnitude;
}
