// Typed views of memory, and memory.
#pragma once

#include <cstddef>
#include <memory>

#include "bundle/dtypes.h"
#include "bundle/sizes.h"

namespace pid::core {

// A contiguous typed part of an allocation.
struct Tensor {
    std::byte* address;
    DType dtype;
    Shape shape;

    std::size_t bytes() const { return item_bytes(dtype) * count_of(shape); }
};

// One allocation, given back with its last copy.
using Allocation = std::shared_ptr<std::byte>;

} // namespace pid::core
