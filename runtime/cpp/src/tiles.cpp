#include "tiles.h"

#include <algorithm>
#include <limits>
#include <set>
#include <tuple>
#include <utility>

#include "advice.h"
#include "errors.h"

namespace pid::core {
namespace {

// Height and width.
using Lengths = std::pair<std::uint64_t, std::uint64_t>;

std::uint64_t divided_up(std::uint64_t number, std::uint64_t by) {
    return (number + by - 1) / by;
}

std::uint64_t tokens_of(const Manifest& manifest, std::uint64_t height, std::uint64_t width) {
    return product(product(height, width), manifest.network.least_tokens());
}

bool has_tile(const pid_decode_params& params) {
    return params.tile_width != 0 || params.tile_height != 0;
}

// Tiles of a picture cut into 1, 2, 3 .. along each axis.
std::set<Lengths> even(std::uint64_t height, std::uint64_t width, std::uint64_t overlap,
                       std::uint64_t most) {
    const auto lengths = [&](std::uint64_t size) {
        std::set<std::uint64_t> found;
        const std::uint64_t most_tiles = // more would be all overlap
            std::max<std::uint64_t>(1, size / std::max<std::uint64_t>(overlap, 1));
        for (std::uint64_t count = 1; count <= most_tiles; ++count)
            found.insert(divided_up(size + (count - 1) * overlap, count));
        return found;
    };
    std::set<Lengths> found;
    const std::set<std::uint64_t> across = lengths(width);
    for (const std::uint64_t rows : lengths(height))
        for (const std::uint64_t columns : across)
            if (product(rows, columns) <= most)
                found.emplace(rows, columns);
    return found;
}

// Sizes that the checkpoint was trained at, as far as they fit into the picture.
std::set<Lengths> trained(const Manifest& manifest, std::uint64_t height, std::uint64_t width) {
    const std::uint64_t side = manifest.network.pixels_per_latent();
    std::set<Lengths> found;
    for (const auto& [w, h] : manifest.model.trained_sizes) {
        const auto across = static_cast<std::uint64_t>(w), down = static_cast<std::uint64_t>(h);
        if (across % side == 0 && down % side == 0)
            found.emplace(std::min(down / side, height), std::min(across / side, width));
    }
    return found;
}

// Why a picture has to be decoded in tiles; "" if it has not.
std::string need(const Manifest& manifest, std::uint64_t height, std::uint64_t width) {
    if (tokens_of(manifest, height, width) > most_tokens(manifest.buckets))
        return "no bucket holds the whole picture";
    const std::uint64_t side = manifest.network.pixels_per_latent();
    const Model& model = manifest.model;
    std::uint64_t largest = 0;
    for (const auto& [w, h] : model.trained_sizes)
        largest = std::max(largest,
                           product(static_cast<std::uint64_t>(w), static_cast<std::uint64_t>(h)));
    const std::uint64_t across = width * side, down = height * side;
    const bool shown_by_release = is_4k(model) && is_demonstrated(static_cast<std::int64_t>(across),
                                                                  static_cast<std::int64_t>(down));
    if (largest == 0 || across * down <= largest || shown_by_release)
        return "";
    return "the picture is larger than the decoder was trained for";
}

// Height and width of a tile that is given.
Lengths tile_of(const pid_decode_params& params, std::uint64_t side) {
    const auto good = [&](std::int64_t length) {
        return length > 0 && static_cast<std::uint64_t>(length) % side == 0;
    };
    if (!good(params.tile_width) || !good(params.tile_height))
        refuse("expected a tile as auto, or width and height in multiples of ", side,
               " pixels, but got ",
               text_of(params.tile_width, "x", params.tile_height).substr(0, 40), "; ", side,
               " pixels are one of the latent");
    return {static_cast<std::uint64_t>(params.tile_height) / side,
            static_cast<std::uint64_t>(params.tile_width) / side};
}

} // namespace

std::vector<float> TileAxis::weights(std::size_t index, std::uint64_t scale) const {
    std::vector<float> weights;
    const auto apart = [&](std::size_t other) {
        return std::max(starts[index], starts[other]) - std::min(starts[index], starts[other]);
    };
    std::size_t first = index, last = index; // of those that overlap with it
    while (first > 0 && apart(first - 1) < tile)
        --first;
    while (last + 1 < starts.size() && apart(last + 1) < tile)
        ++last;
    for (std::uint64_t at = 0; at < tile * scale; ++at) {
        const double place = (static_cast<double>(at) + 0.5) / static_cast<double>(scale) +
                             static_cast<double>(starts[index]);
        double heights = 0;
        for (std::size_t each = first; each <= last; ++each)
            heights += height(each, place);
        weights.push_back(static_cast<float>(height(index, place) / heights));
    }
    return weights;
}

double TileAxis::height(std::size_t index, double place) const {
    const auto begin = static_cast<double>(starts[index]);
    const auto end = begin + static_cast<double>(tile);
    if (place <= begin || place >= end)
        return 0;
    double height = 1;
    if (const double shared = index > 0 ? overlap(index) : 0; shared > 0)
        height *= std::min((place - begin) / shared, 1.0);
    if (const double shared = index + 1 < starts.size() ? overlap(index + 1) : 0; shared > 0)
        height *= std::min((end - place) / shared, 1.0);
    return height;
}

double TileAxis::overlap(std::size_t index) const {
    return static_cast<double>(starts[index - 1]) + static_cast<double>(tile) -
           static_cast<double>(starts[index]);
}

TileAxis cut(std::uint64_t size, std::uint64_t tile, std::uint64_t overlap) {
    const std::uint64_t count = tile >= size ? 1 : divided_up(size - overlap, tile - overlap);
    TileAxis axis{size, tile, {}};
    for (std::uint64_t index = 0; index < count; ++index)
        axis.starts.push_back(index == 0 ? 0 : index * (size - tile) / (count - 1));
    return axis;
}

bool is_automatic(const pid_decode_params& params) {
    return params.tile_width == PID_TILE_AUTO && params.tile_height == PID_TILE_AUTO;
}

std::uint64_t overlap_of(const Manifest& manifest, const pid_decode_params& params) {
    const std::uint64_t side = manifest.network.pixels_per_latent();
    if (params.overlap == -1)
        return default_overlap;
    if (params.overlap < 0 || static_cast<std::uint64_t>(params.overlap) % side != 0)
        refuse("expected an overlap in multiples of ", side, " pixels, but got '", params.overlap,
               "'; ", side, " pixels are one of the latent");
    return static_cast<std::uint64_t>(params.overlap) / side;
}

std::optional<Tiling> tiling_of(const Manifest& manifest, std::uint64_t height, std::uint64_t width,
                                const pid_decode_params& params) {
    const std::uint64_t side = manifest.network.pixels_per_latent();
    const std::uint64_t overlap = overlap_of(manifest, params);
    const std::uint64_t most = most_tokens(manifest.buckets);
    if (!has_tile(params)) {
        if (params.overlap != -1)
            refuse("expected a tile with the overlap, but got none; give one, or auto");
        return std::nullopt;
    }
    if (product(std::max(height, width), side) > largest_side)
        refuse("expected sides of at most ", largest_side, " pixels, but got ",
               product(side, width), "x", product(side, height), "; decode a smaller latent");
    if (is_automatic(params)) {
        const std::string reason = need(manifest, height, width);
        if (reason.empty())
            return std::nullopt;
        auto tiling = automatic(manifest, height, width, overlap, reason, most);
        if (!tiling) {
            const std::uint64_t least = manifest.network.least_tokens();
            refuse("expected tiles of at most ", manifest.megapixels(most / least * least),
                   " with an overlap of ", product(overlap, side),
                   " pixels, but there are none; give a smaller overlap");
        }
        return tiling;
    }
    const auto [rows, columns] = tile_of(params, side);
    const std::string given = text_of(params.tile_width, "x", params.tile_height);
    if (rows > height || columns > width)
        refuse("expected a tile no larger than the picture, ", side * width, "x", side * height,
               ", but got ", given, "; give a smaller one, or auto");
    if (tokens_of(manifest, rows, columns) > most)
        refuse("expected a tile of at most ", manifest.megapixels(most),
               ", the largest bucket of this bundle, but got ", given,
               "; give a smaller one, or auto");
    for (const auto& [length, whole] : {Lengths{rows, height}, Lengths{columns, width}})
        if (length < whole && product(2, overlap) >= length)
            refuse("expected an overlap below half of the tile, ", given, ", but got ",
                   product(overlap, side), "; give a smaller overlap or a larger tile");
    Tiling asked{cut(height, rows, overlap), cut(width, columns, overlap), "as asked for"};
    if (asked.count() == 1)
        return std::nullopt;
    return asked;
}

std::optional<Tiling> automatic(const Manifest& manifest, std::uint64_t height, std::uint64_t width,
                                std::uint64_t overlap, const std::string& reason,
                                std::uint64_t most_tokens) {
    const std::uint64_t most = most_tokens / manifest.network.least_tokens();
    const auto cost = [](const Tiling& tiling) {
        const std::uint64_t rows = tiling.rows.tile, columns = tiling.columns.tile;
        return std::make_tuple(tiling.count() * rows * columns, tiling.count(),
                               std::max(rows, columns), rows);
    };
    for (const std::set<Lengths>& candidates :
         {trained(manifest, height, width), even(height, width, overlap, most)}) {
        std::optional<Tiling> best;
        for (const auto& [rows, columns] : candidates) {
            if (product(rows, columns) > most || (rows < height && product(2, overlap) >= rows) ||
                (columns < width && product(2, overlap) >= columns))
                continue;
            Tiling tiling{cut(height, rows, overlap), cut(width, columns, overlap), reason};
            if (!best || cost(tiling) < cost(*best))
                best = std::move(tiling);
        }
        if (best)
            return best;
    }
    return std::nullopt;
}

std::string described(const Tiling& tiling, std::uint64_t side) {
    std::uint64_t least = std::numeric_limits<std::uint64_t>::max();
    for (const TileAxis* axis : {&tiling.rows, &tiling.columns})
        for (std::size_t index = 1; index < axis->starts.size(); ++index)
            least = std::min(least, axis->starts[index - 1] + axis->tile - axis->starts[index]);
    return text_of(tiling.count(), " tiles of ", tiling.columns.tile * side, "x",
                   tiling.rows.tile * side, ", overlapping by ", least * side, " pixels or more");
}

} // namespace pid::core
