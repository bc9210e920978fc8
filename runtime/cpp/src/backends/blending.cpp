#include "backends/blending.h"

#include <algorithm>

namespace pid::core {

std::vector<RingPart> ring_parts(std::size_t row, std::size_t rows, std::size_t ring_rows) {
    std::vector<RingPart> parts;
    for (std::size_t done = 0; done < rows; done += parts.back().count) {
        const std::size_t at = (row + done) % ring_rows;
        parts.push_back({done, at, std::min(rows - done, ring_rows - at)});
    }
    return parts;
}

TokenLengths::TokenLengths(const Tensor& tensor) {
    const auto length = [&](std::size_t axis) {
        return static_cast<std::size_t>(tensor.shape[axis]);
    };
    batch = length(0);
    rows = length(1);
    columns = length(2);
    patch = length(3);
    token = patch * patch * 3;
    row = columns * token;
    image = rows * row;
}

float* row_of(const Tensor& tensor, std::size_t image, std::size_t row) {
    const TokenLengths lengths(tensor);
    return reinterpret_cast<float*>(tensor.address) + image * lengths.image + row * lengths.row;
}

void HostBlending::take(const Tensor& state, const Tensor& tile, std::size_t row,
                        std::size_t column) const {
    const TokenLengths part(tile);
    for (std::size_t image = 0; image < part.batch; ++image)
        for (std::size_t down = 0; down < part.rows; ++down)
            std::copy_n(row_of(state, image, row + down) + column * part.token, part.row,
                        row_of(tile, image, down));
}

void HostBlending::add(const Tensor& ring, const Tensor& tile, const Tensor& down,
                       const Tensor& across, std::size_t row, std::size_t column) const {
    const TokenLengths part(tile);
    const std::size_t ring_rows = TokenLengths(ring).rows, patch = part.patch;
    const auto* vertical = reinterpret_cast<const float*>(down.address);
    const auto* horizontal = reinterpret_cast<const float*>(across.address);
    for (std::size_t image = 0; image < part.batch; ++image)
        for (std::size_t at = 0; at < part.rows; ++at) {
            float* sum = row_of(ring, image, (row + at) % ring_rows) + column * part.token;
            const float* value = row_of(tile, image, at);
            for (std::size_t token = 0; token < part.columns; ++token)
                for (std::size_t y = 0; y < patch; ++y)
                    for (std::size_t x = 0; x < patch; ++x)
                        for (std::size_t channel = 0; channel < 3; ++channel)
                            *sum++ +=
                                *value++ * vertical[at * patch + y] * horizontal[token * patch + x];
        }
}

void HostBlending::mix(const Tensor& state, const Tensor& ring, const Tensor* before,
                       const Tensor* noise, const std::array<float, 4>& factors, std::size_t row,
                       std::size_t rows) const {
    const TokenLengths whole(state);
    const std::size_t ring_rows = TokenLengths(ring).rows;
    const auto [of_state, of_clean, of_before, of_noise] = factors;
    for (std::size_t image = 0; image < whole.batch; ++image)
        for (std::size_t each = row; each < row + rows; ++each) {
            float* value = row_of(state, image, each);
            float* clean = row_of(ring, image, each % ring_rows);
            float* last = before == nullptr ? nullptr : row_of(*before, image, each);
            const float* fresh = noise == nullptr ? nullptr : row_of(*noise, image, each - row);
            for (std::size_t i = 0; i < whole.row; ++i) {
                float mixed = of_state * value[i] + of_clean * clean[i];
                if (last != nullptr) {
                    if (of_before != 0)
                        mixed += of_before * last[i];
                    last[i] = clean[i];
                }
                if (fresh != nullptr)
                    mixed += of_noise * fresh[i];
                value[i] = mixed;
                clean[i] = 0;
            }
        }
}

} // namespace pid::core
