#include "tables.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>

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

// Angles of the 2-D rotary embedding, [L, head_dim / 2]: pair 2j turns by x, pair 2j + 1 by y.
Values rope_2d(const Json& source, const Sizes& sizes) {
    const auto head_dim = source["head_dim"].get<std::size_t>();
    const auto axis = [&](const char* symbol) {
        return rope_2d_axis(sizes.value(symbol), head_dim, source["reference"].get<double>(),
                            source["extent"].get<double>(), source["theta"].get<double>());
    };
    const Values columns = axis("Ws"), rows = axis("Hs");
    const std::size_t width = sizes.value("Ws"), height = sizes.value("Hs"), pairs = head_dim / 4;
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
    return angles;
}

// Angles of the text's rotary embedding, [T, head_dim / 2].
Values rope_1d(const Json& source, const Sizes& sizes) {
    const auto head_dim = source["head_dim"].get<std::size_t>();
    const auto theta = static_cast<float>(source["theta"].get<double>());
    Values angles;
    for (std::size_t i = 0; i < sizes.value("T"); ++i) {
        for (std::size_t j = 0; j < head_dim / 2; ++j) {
            const float exponent = static_cast<float>(2 * j) / static_cast<float>(head_dim);
            angles.push_back(static_cast<float>(i) * (1.0F / power(theta, exponent)));
        }
    }
    return angles;
}

// What each pixel column (or row) of a patch adds, [L, P, size / 2]: sines, then cosines.
Values pixel_axis(const Json& source, const Sizes& sizes) {
    const bool is_column = source["axis"] == "column";
    const auto quarter = source["size"].get<std::size_t>() / 4;
    const auto patch = source["patch_size"].get<std::size_t>();
    const auto theta = source["theta"].get<double>();
    const std::size_t width = sizes.value("Ws"), height = sizes.value("Hs");
    const std::size_t positions = (is_column ? width : height) * patch;
    Values line(positions * 2 * quarter);
    for (std::size_t x = 0; x < positions; ++x) {
        for (std::size_t k = 0; k < quarter; ++k) {
            const double frequency =
                std::pow(theta, -static_cast<double>(k) / static_cast<double>(quarter));
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

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() &&
           text.compare(text.size() - end.size(), end.size(), end) == 0;
}

} // namespace

std::vector<float> compute_table(const Json& source, const Sizes& sizes) {
    const auto table = source["table"].get<std::string>();
    if (table == "pixel_axis")
        return pixel_axis(source, sizes);
    Values angles =
        table.rfind("rope_1d", 0) == 0 ? rope_1d(source, sizes) : rope_2d(source, sizes);
    std::transform(angles.begin(), angles.end(), angles.begin(),
                   ends_with(table, "_cos") ? cosine : sine);
    return angles;
}

} // namespace pid::core
