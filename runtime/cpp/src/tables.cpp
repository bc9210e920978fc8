#include "tables.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <variant>

namespace pid::core {
namespace {

using Values = std::vector<float>;

// Evaluated in float64 and rounded once, as the format says: every good C library then gives the
// same number.
float power(float base, float exponent) {
    return static_cast<float>(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
}

float cosine(float angle) {
    return static_cast<float>(std::cos(static_cast<double>(angle)));
}

float sine(float angle) {
    return static_cast<float>(std::sin(static_cast<double>(angle)));
}

Values applied(Function function, Values angles) {
    std::transform(angles.begin(), angles.end(), angles.begin(),
                   function == Function::cos ? cosine : sine);
    return angles;
}

// Angles of one axis of `count` tokens, [count, head_dim / 4]: NTK-aware scaling as in PiD
// (arXiv 2605.23902).
Values rope_2d_axis(std::size_t count, std::size_t head_dim, double reference, double extent,
                    double theta) {
    const auto n = static_cast<double>(count);
    const double a = static_cast<double>(head_dim / 2);
    const auto scaled = static_cast<float>(theta * std::pow(n / reference, a / (a - 2)));
    Values angles;
    angles.reserve(count * (head_dim / 4));
    for (std::size_t i = 0; i < count; ++i) {
        double position = 0;
        if (count > 1 && i == count - 1)
            position = extent;
        else if (count > 1)
            position = static_cast<double>(i) * (extent / (n - 1));
        for (std::size_t j = 0; j < head_dim / 4; ++j) {
            const float exponent = static_cast<float>(4 * j) / static_cast<float>(head_dim);
            angles.push_back(static_cast<float>(position) * (1.0F / power(scaled, exponent)));
        }
    }
    return angles;
}

// [L, head_dim / 2] of the 2-D rotary embedding: pair 2j turns by x, pair 2j + 1 by y.
Values values_of(const Rope2d& rope, const Sizes& sizes) {
    const auto axis = [&](const char* symbol) {
        return rope_2d_axis(sizes.value(symbol), rope.head_dim, rope.reference, rope.extent,
                            rope.theta);
    };
    const Values columns = axis("Ws"), rows = axis("Hs");
    const std::size_t width = sizes.value("Ws"), height = sizes.value("Hs");
    const std::size_t pairs = rope.head_dim / 4;
    Values angles;
    angles.reserve(height * width * pairs * 2);
    for (std::size_t row = 0; row < height; ++row) {
        for (std::size_t column = 0; column < width; ++column) {
            for (std::size_t j = 0; j < pairs; ++j) {
                angles.push_back(columns[column * pairs + j]);
                angles.push_back(rows[row * pairs + j]);
            }
        }
    }
    return applied(rope.function, std::move(angles));
}

// [T, head_dim / 2] of the text's rotary embedding.
Values values_of(const Rope1d& rope, const Sizes& sizes) {
    const auto theta = static_cast<float>(rope.theta);
    Values angles;
    for (std::size_t i = 0; i < sizes.value("T"); ++i) {
        for (std::size_t j = 0; j < rope.head_dim / 2; ++j) {
            const float exponent = static_cast<float>(2 * j) / static_cast<float>(rope.head_dim);
            angles.push_back(static_cast<float>(i) * (1.0F / power(theta, exponent)));
        }
    }
    return applied(rope.function, std::move(angles));
}

// What each pixel column (or row) of a patch adds, [L, P, size / 2]: sines, then cosines.
Values values_of(const PixelAxis& pixels, const Sizes& sizes) {
    const bool is_column = pixels.axis == Axis::column;
    const std::size_t quarter = pixels.size / 4, patch = pixels.patch_size;
    const std::size_t width = sizes.value("Ws"), height = sizes.value("Hs");
    const std::size_t positions = (is_column ? width : height) * patch;
    Values line(positions * 2 * quarter);
    for (std::size_t x = 0; x < positions; ++x) {
        for (std::size_t k = 0; k < quarter; ++k) {
            const double frequency =
                std::pow(pixels.theta, -static_cast<double>(k) / static_cast<double>(quarter));
            const double angle = static_cast<double>(x) * frequency;
            line[2 * quarter * x + k] = static_cast<float>(std::sin(angle));
            line[2 * quarter * x + quarter + k] = static_cast<float>(std::cos(angle));
        }
    }
    const std::size_t part = patch * 2 * quarter;
    Values table;
    table.reserve(height * width * part);
    for (std::size_t row = 0; row < height; ++row) {
        for (std::size_t column = 0; column < width; ++column) {
            const float* begin = line.data() + (is_column ? column : row) * part;
            table.insert(table.end(), begin, begin + part);
        }
    }
    return table;
}

} // namespace

std::vector<float> compute_table(const Table& table, const Sizes& sizes) {
    return std::visit([&](const auto& each) { return values_of(each, sizes); }, table);
}

} // namespace pid::core
