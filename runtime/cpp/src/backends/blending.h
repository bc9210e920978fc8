// What a decode in tiles, or with guidance, does with its state, in the memory where that lies.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "backends/tensor.h"

namespace pid::core {

// Operations on states of one memory. All give the same numbers, to the bit.
//
// A state is float32 [B, rows, columns, P, P, 3], tokens of P x P pixels. So is a tile, of fewer
// rows and columns, and a ring, which holds as many rows as a tile has: row n of the picture lies
// at n modulo these.
class Blending {
public:
    Blending() = default;
    Blending(const Blending&) = delete;
    Blending& operator=(const Blending&) = delete;
    virtual ~Blending() = default;

    // Copy a tile out of a state, from a row and column of tokens on.
    virtual void take(const Tensor& state, const Tensor& tile, std::size_t row,
                      std::size_t column) const = 0;

    // Add a tile to a ring, weighted; the tile's values are of no use afterwards.
    // down, across: weights of the tile's pixels along each axis, [tokens, P]. row, column: tokens
    // of the picture at which the tile begins.
    virtual void add(const Tensor& ring, const Tensor& tile, const Tensor& down,
                     const Tensor& across, std::size_t row, std::size_t column) const = 0;

    // Make rows of the next state: of state, ring, before and noise, times these factors. The
    // ring's rows become zero, once they are in `before` (of the state's shape) if there is one,
    // which is read where its factor is not zero. noise: [B, .., columns, P, P, 3], of these rows.
    virtual void mix(const Tensor& state, const Tensor& ring, const Tensor* before,
                     const Tensor* noise, const std::array<float, 4>& factors, std::size_t row,
                     std::size_t rows) const = 0;
};

// In the host's memory.
class HostBlending : public Blending {
public:
    void take(const Tensor& state, const Tensor& tile, std::size_t row,
              std::size_t column) const override;
    void add(const Tensor& ring, const Tensor& tile, const Tensor& down, const Tensor& across,
             std::size_t row, std::size_t column) const override;
    void mix(const Tensor& state, const Tensor& ring, const Tensor* before, const Tensor* noise,
             const std::array<float, 4>& factors, std::size_t row, std::size_t rows) const override;
};

// Rows of a picture that lie together in a ring.
struct RingPart {
    // How many of the picture's come before.
    std::size_t first;
    // Where these begin in the ring, and how many they are.
    std::size_t at, count;
};

// Where rows of a picture lie in a ring.
std::vector<RingPart> ring_parts(std::size_t row, std::size_t rows, std::size_t ring_rows);

// Lengths of a state, a tile or a ring of [B, rows, columns, P, P, 3].
struct TokenLengths {
    explicit TokenLengths(const Tensor& tensor);

    std::size_t batch, rows, columns, patch;
    std::size_t token; // values of one
    std::size_t row;   // values of one
    std::size_t image; // values of one
};

// Where a row of an image begins, in tokens' rows.
float* row_of(const Tensor& tensor, std::size_t image, std::size_t row);

} // namespace pid::core
