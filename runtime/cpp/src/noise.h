// The decoder's noise: the same numbers for a seed on every backend and in every runtime; "noise"
// of docs/bundle-format.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace pid::core {

// Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC'11).
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                    std::array<std::uint32_t, 2> key);

// Values `start` to `start + count` of one draw of one image, into `out`.
// draw: 0 for the initial noise, k for the noise after step k. threads: at most so many work on
// large counts; the values do not depend on that.
void standard_normal(std::uint64_t seed, std::uint32_t draw, std::uint64_t start, std::size_t count,
                     float* out, std::size_t threads);

} // namespace pid::core
