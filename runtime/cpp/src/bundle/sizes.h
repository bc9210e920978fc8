// Shapes, with symbols or without, and what the symbols stand for; "sizes" of
// docs/bundle-format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "bundle/dtypes.h"

namespace pid::core {

using Shape = std::vector<std::int64_t>;

// Number of values of an array; all sizes are positive and the product is known to fit.
std::size_t count_of(const Shape& shape);
// Such as "[1, 16, 4, 4]".
std::string text_of_shape(const Shape& shape);

// A number, or a symbol such as "L".
using Size = std::variant<std::uint64_t, std::string>;
using SymbolicShape = std::vector<Size>;

// Such as `["B", "L", 768]`.
std::string text_of(const SymbolicShape& shape);
bool has_symbol(const SymbolicShape& shape, const std::string& symbol);

// The first size of a buffer that holds no more than a slice: the tokens of a bucket's chunk.
constexpr const char* chunk_symbol = "C";

// Products and sums that stop at `too_much` in place of an overflow; everything allowed is smaller.
constexpr std::uint64_t too_much = std::uint64_t{1} << 62U;
std::uint64_t product(std::uint64_t a, std::uint64_t b);
std::uint64_t sum(std::uint64_t a, std::uint64_t b);

// Dimensions every reader needs.
struct Network {
    std::uint64_t patch_size;
    std::uint64_t text_max_length;
    std::uint64_t text_dim;
    std::uint64_t latent_channels;
    std::uint64_t tokens_per_latent;

    // Height of the image per height of the latent, and width likewise.
    std::uint64_t pixels_per_latent() const { return tokens_per_latent * patch_size; }
    // Patch tokens of a latent of one row and one column.
    std::uint64_t least_tokens() const { return product(tokens_per_latent, tokens_per_latent); }
};

// Values of the symbols of one decode; in a bucket there is that of `chunk_symbol` too.
class Sizes {
public:
    // The sizes of a decode of `batch` latents.
    static Sizes of_request(const Network& network, std::uint64_t batch,
                            std::uint64_t latent_height, std::uint64_t latent_width,
                            std::uint64_t text_tokens, std::uint64_t rows);

    // The sizes of the largest decode of one image within a budget of patch tokens, as one column,
    // or one row: every product of sizes is at its largest in one of these two.
    static Sizes of_column(const Network& network, std::uint64_t rows, std::uint64_t tokens);
    static Sizes of_row(const Network& network, std::uint64_t rows, std::uint64_t tokens);

    std::uint64_t value(const Size& size) const;
    // The product of a shape's sizes.
    std::uint64_t count(const SymbolicShape& shape) const;
    std::uint64_t bytes(DType dtype, const SymbolicShape& shape) const;
    Shape shape(const SymbolicShape& shape) const;
    // Flat index of the element at `start` (zeros when empty) of an array of `shape`.
    std::uint64_t index(const SymbolicShape& shape, const SymbolicShape& start) const;

    void set(const std::string& symbol, std::uint64_t value) { values_[symbol] = value; }
    // These sizes with a latent `height` x `width` instead.
    Sizes resized(std::uint64_t height, std::uint64_t width) const;
    // These sizes with the symbols of a graph added.
    Sizes extended(const std::map<std::string, std::string>& dims) const;
    bool operator==(const Sizes& other) const { return values_ == other.values_; }

private:
    std::map<std::string, std::uint64_t> values_;
};

} // namespace pid::core
