#include "advice.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "errors.h"

namespace pid::core {
namespace {

// Largest noise level the decoders were trained on.
constexpr float trained_sigma = 0.8F;
// Up to this many pixels the 2k decoders were trained; the 2kto4k ones are worse there.
constexpr std::int64_t largest_2k_area = 2688 * 1792;
// Sizes beyond their training that the release itself shows 2kto4k decoders at.
constexpr std::array<std::pair<std::int64_t, std::int64_t>, 3> demonstrated{
    {{4096, 4096}, {4096, 3072}, {3072, 4096}}};

bool is_4k(const Model& model) {
    return model.variant.rfind("2kto4k", 0) == 0;
}

std::string name_of(const Model& model) {
    return model.name.empty() ? "this decoder" : model.name;
}

// How far apart two sizes are, by the logarithms of width and height.
double distance(double width, double height, double other_width, double other_height) {
    return std::hypot(std::log(width / other_width), std::log(height / other_height));
}

// A warning about a size that is not among those trained; "" if it is, or none are known.
std::string about_trained_sizes(const Model& model, std::int64_t width, std::int64_t height) {
    const auto far = [&](const std::pair<std::int64_t, std::int64_t>& size) {
        return distance(static_cast<double>(size.first), static_cast<double>(size.second),
                        static_cast<double>(width), static_cast<double>(height));
    };
    const auto nearest =
        std::min_element(model.trained_sizes.begin(), model.trained_sizes.end(),
                         [&](const auto& a, const auto& b) { return far(a) < far(b); });
    if (nearest == model.trained_sizes.end() || *nearest == std::make_pair(width, height))
        return "";
    const auto size = std::make_pair(width, height);
    if (is_4k(model) &&
        std::find(demonstrated.begin(), demonstrated.end(), size) != demonstrated.end())
        return text_of("the release shows ", width, "x", height, ", but training stopped at ",
                       nearest->first, "x", nearest->second,
                       "; prefer that size if the image shows artifacts");
    return text_of(name_of(model), " was not trained at ", width, "x", height,
                   " and may give green or blocky artifacts; the nearest trained size is ",
                   nearest->first, "x", nearest->second);
}

} // namespace

std::vector<std::string> advice(const Model& model, std::int64_t width, std::int64_t height,
                                float largest_sigma, bool has_caption) {
    std::vector<std::string> lines;
    if (!model.distilled)
        lines.push_back(name_of(model) +
                        " is not distilled: a few steps give poor images; use a distilled "
                        "variant, or many steps by times");
    if (is_4k(model) && width * height <= largest_2k_area)
        lines.push_back(text_of("at ", width, "x", height,
                                " a 2kto4k decoder is worse than a 2k one; use the 2k variant if "
                                "this latent space has one"));
    if (std::string line = about_trained_sizes(model, width, height); !line.empty())
        lines.push_back(std::move(line));
    if (largest_sigma > trained_sigma)
        lines.push_back(text_of("sigma ", largest_sigma, " is beyond ", trained_sigma,
                                ", the highest in training; denoise the latent further for a "
                                "faithful image"));
    if (!has_caption && model.captioned)
        lines.emplace_back("no caption was given: the empty embedding (zeros) costs quality; give "
                           "the prompt's Gemma-2-2b-it embedding");
    return lines;
}

} // namespace pid::core
