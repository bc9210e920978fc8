// Typed views of memory, and memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace pid::core {

// Of buffers and graphs.
enum class DType { float32, float16, bfloat16, uint8 };

std::size_t item_bytes(DType dtype);
const char* name_of(DType dtype);
// Whether `name` is a dtype; if so it is put into `dtype`.
bool dtype_named(std::string_view name, DType& dtype);

using Shape = std::vector<std::int64_t>;

// Number of values of an array; all sizes are positive and the product is known to fit.
std::size_t count_of(const Shape& shape);
// Such as "[1, 16, 4, 4]".
std::string text_of_shape(const Shape& shape);

// A contiguous typed part of an allocation.
struct Tensor {
    std::byte* address;
    DType dtype;
    Shape shape;

    std::size_t bytes() const { return item_bytes(dtype) * count_of(shape); }
};

// One allocation, given back with its last copy.
using Allocation = std::shared_ptr<std::byte>;

// Values of other floats as float32.
float float_of_half(std::uint16_t half);
float float_of_bfloat16(std::uint16_t bits);

} // namespace pid::core
