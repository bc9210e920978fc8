#include "noise.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace pid::core {
namespace {

constexpr int rounds = 10;
constexpr std::uint64_t chunk_blocks = 1U << 14U; // work for one thread at a time
constexpr double two_pi = 6.283185307179586476925286766559;

double uniform(std::uint32_t word) {
    return (static_cast<double>(word) + 0.5) * 0x1p-32;
}

// The four lanes of a block (Box-Muller).
std::array<float, 4> normals(std::uint64_t seed, std::uint32_t draw, std::uint64_t block) {
    const auto words = philox(
        {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32U), draw, 0},
        {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U)});
    std::array<float, 4> lanes{};
    for (std::size_t pair = 0; pair < 4; pair += 2) {
        const double radius = std::sqrt(-2 * std::log(uniform(words[pair])));
        const double angle = two_pi * uniform(words[pair + 1]);
        lanes[pair] = static_cast<float>(radius * std::cos(angle));
        lanes[pair + 1] = static_cast<float>(radius * std::sin(angle));
    }
    return lanes;
}

} // namespace

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> c,
                                    std::array<std::uint32_t, 2> k) {
    for (int round = 0; round < rounds; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53} * c[0];
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * c[2];
        c = {static_cast<std::uint32_t>(product1 >> 32U) ^ c[1] ^ k[0],
             static_cast<std::uint32_t>(product1),
             static_cast<std::uint32_t>(product0 >> 32U) ^ c[3] ^ k[1],
             static_cast<std::uint32_t>(product0)};
        k = {k[0] + 0x9E3779B9U, k[1] + 0xBB67AE85U};
    }
    return c;
}

void standard_normal(std::uint64_t seed, std::uint32_t draw, std::uint64_t start, std::size_t count,
                     float* out, std::size_t threads) {
    if (count == 0)
        return;
    const std::uint64_t end = start + count, first = start / 4, last = (end + 3) / 4;
    const std::size_t chunks = (last - first + chunk_blocks - 1) / chunk_blocks;
    parallel_for(chunks, threads, [&](std::size_t chunk) {
        const std::uint64_t begin_block = first + chunk * chunk_blocks;
        const std::uint64_t end_block = std::min(begin_block + chunk_blocks, last);
        for (std::uint64_t block = begin_block; block < end_block; ++block) {
            const std::array<float, 4> lanes = normals(seed, draw, block);
            const std::uint64_t begin_value = std::max(start, 4 * block);
            const std::uint64_t end_value = std::min(end, 4 * block + 4);
            for (std::uint64_t i = begin_value; i < end_value; ++i)
                out[i - start] = lanes[i % 4];
        }
    });
}

} // namespace pid::core
