#include "bundle/dtypes.h"

#include <array>
#include <cmath>
#include <cstring>

namespace pid::core {
namespace {

struct Kind {
    const char* name;
    std::size_t bytes;
};

// In the order of DType.
constexpr std::array<Kind, 5> dtypes{
    {{"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"uint8", 1}, {"float8_e4m3fn", 1}}};

} // namespace

std::size_t item_bytes(DType dtype) {
    return dtypes[static_cast<std::size_t>(dtype)].bytes;
}

const char* name_of(DType dtype) {
    return dtypes[static_cast<std::size_t>(dtype)].name;
}

bool dtype_named(std::string_view name, DType& dtype) {
    for (std::size_t i = 0; i < dtypes.size(); ++i) {
        if (name == dtypes[i].name) {
            dtype = static_cast<DType>(i);
            return true;
        }
    }
    return false;
}

float float_of_half(std::uint16_t half) {
    const int exponent = (half >> 10) & 31;
    const int fraction = half & 1023;
    float value = 0;
    if (exponent == 31)
        value = fraction != 0 ? NAN : INFINITY;
    else if (exponent == 0)
        value = std::ldexp(static_cast<float>(fraction), -24);
    else
        value = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return (half & 0x8000U) != 0 ? -value : value;
}

float float_of_bfloat16(std::uint16_t bits) {
    const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16U;
    float value = 0;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

} // namespace pid::core
