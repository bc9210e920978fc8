// How a picture is cut into tiles: equal in size, overlapping, blended by weights that sum to one.
//
// Every tile is run as an image of its own, within each step, on one state and one noise. All
// lengths here are in pixels of the latent unless they say otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bundle/manifest.h"
#include "pid/pid_runtime.h"

namespace pid::core {

// Of neighbours, in pixels of the latent.
constexpr std::uint64_t default_overlap = 8;
// Longest side of a picture that is decoded in tiles, in pixels of the result.
constexpr std::uint64_t largest_side = 16384;

// The tiles along one axis.
struct TileAxis {
    // Of the picture, and of every tile.
    std::uint64_t size;
    std::uint64_t tile;
    // Where each begins; the first at 0, the last where it ends with the picture.
    std::vector<std::uint64_t> starts;

    // What a tile counts for at each of its places, `tile * scale` of them. Over all tiles the
    // weights of a place sum to 1. They rise from a tile's edge over the overlap with its
    // neighbour, in a line.
    // scale: places per pixel of the latent.
    std::vector<float> weights(std::size_t index, std::uint64_t scale) const;

private:
    double height(std::size_t index, double place) const;
    // Of a tile with the one before.
    double overlap(std::size_t index) const;
};

// The tiles of a picture.
struct Tiling {
    TileAxis rows;
    TileAxis columns;
    // Why there are tiles, for people.
    std::string reason;

    // How many there are.
    std::uint64_t count() const { return rows.starts.size() * columns.starts.size(); }
};

// As few tiles as cover an axis, spread evenly. `overlap` is below `tile`.
TileAxis cut(std::uint64_t size, std::uint64_t tile, std::uint64_t overlap);

// Whether tiles may be chosen for the caller.
bool is_automatic(const pid_decode_params& params);

// The tiles of a decode of a latent `height` x `width`; none to decode it whole. Refuses tiles that
// cannot be.
std::optional<Tiling> tiling_of(const Manifest& manifest, std::uint64_t height, std::uint64_t width,
                                const pid_decode_params& params);

// The tiles that cost least: fewest tokens in all, then the largest tiles, then the squarest; none
// if there are none.
//
// Of sizes that the checkpoint was trained at, if it says, else of the picture cut evenly.
// most_tokens: of a tile, where buckets would hold more.
std::optional<Tiling> automatic(const Manifest& manifest, std::uint64_t height, std::uint64_t width,
                                std::uint64_t overlap, const std::string& reason,
                                std::uint64_t most_tokens);

// An overlap, in pixels of the latent. Refuses one that is no multiple of these.
std::uint64_t overlap_of(const Manifest& manifest, const pid_decode_params& params);

// For people, such as "4 tiles of 2176x2176, overlapping by 256 pixels or more".
// side: pixels of the result per pixel of the latent.
std::string described(const Tiling& tiling, std::uint64_t side);

} // namespace pid::core
