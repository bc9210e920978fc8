// What the fake GPU of fake_cuda.cpp lets happen, and what has happened.
#pragma once

#include <cstddef>
#include <map>
#include <string>

struct FakeGpu {
    std::size_t free_bytes = std::size_t{1} << 30;
    // Whether the driver reads our kernels' PTX.
    bool takes_kernels = true;
    // By kernel.
    std::map<std::string, int> launches;
};

FakeGpu& fake_gpu();
