// The types of numbers that buffers and files hold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace pid::core {

// Of buffers and graphs.
enum class DType { float32, float16, bfloat16, uint8, float8_e4m3fn };

std::size_t item_bytes(DType dtype);
const char* name_of(DType dtype);
// Whether `name` is a dtype; if so it is put into `dtype`.
bool dtype_named(std::string_view name, DType& dtype);

// Values of other floats as float32.
float float_of_half(std::uint16_t half);
float float_of_bfloat16(std::uint16_t bits);

} // namespace pid::core
