// Checks of the vector primitives against plain loops: a program without torch (its headers are needed, its
// libraries are not), for any compiler, and for processors that run in an emulator. ATEN_CPU_CAPABILITY
// chooses the CPU target. Prints what failed, then how many checks there were; exits with 1 where one failed.

#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>

#include "adamw_step.h"
#include "cpu/deferred_adamw_rows.h"

namespace at {

std::string get_cpu_capability() {
    const char* chosen = std::getenv("ATEN_CPU_CAPABILITY");
    std::string name = chosen != nullptr ? chosen : "default";
    for (char& letter : name) letter = static_cast<char>(std::toupper(letter));
    return name;
}

}  // namespace at

namespace bigramx::cpu {

inline int64_t checks, failures;

inline void check(bool holds, const char* name, double at) {
    ++checks;
    if (holds) return;
    if (++failures <= 20) std::printf("%s: wrong at %g\n", name, at);
}

// Floats of all magnitudes and signs, subnormal numbers, infinities and NaNs among them.
constexpr uint32_t kSamples = 1 << 16;

inline float sample(uint32_t k) {
    const uint32_t ends[] = {0x00000000, 0x80000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF,
                             0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F800000, 0xC2CFF1B5};
    const uint32_t bits = k < std::size(ends) ? ends[k] : k * 65521u;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// From -88 to 88, ascending.
inline float moderate_sample(uint32_t k) {
    return 176 * (static_cast<float>(k) / static_cast<float>(kSamples) - 0.5f);
}

inline bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// The distance from an exact result, in units of the last place.
inline double ulps(float value, double exact) {
    const float rounded = static_cast<float>(exact);
    if (same(value, rounded)) return 0;
    const float size = std::abs(rounded);
    return std::abs(value - exact) / (std::nextafter(size, INFINITY) - static_cast<double>(size));
}

}  // namespace bigramx::cpu

#define BIGRAMX_KERNELS "tests/trust/simd_checks.h"
#include "cpu/base/foreach_target.h"

int main() {
    BIGRAMX_DISPATCH_TARGET(check_all_kernel)();
    std::printf("%lld checks, %lld failed\n", static_cast<long long>(bigramx::cpu::checks),
                static_cast<long long>(bigramx::cpu::failures));
    return bigramx::cpu::failures == 0 ? 0 : 1;
}
