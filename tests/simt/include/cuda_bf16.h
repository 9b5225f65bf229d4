// The emulator's version of CUDA's header: the type and its conversions.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

// The upper half of a float, rounded to nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    constexpr uint16_t kNan = 0x7FFF;
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if (value != value) return {kNan};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float widened;
    memcpy(&widened, &bits, sizeof(widened));
    return widened;
}
