#include "advice.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "errors.h"

namespace pid::core {
namespace {

// Largest noise level the decoders were trained on.
constexpr float trained_sigma = 0.8F;
// Up to this many pixels the 2k decoders were trained; the 2kto4k ones are worse there.
constexpr std::int64_t largest_2k_area = 2688 * 1792;
// Aspect ratios this near are the same, by their logarithms: sides are multiples of 64.
constexpr double same_ratio = 0.03;
// Sizes beyond their training that the release itself shows 2kto4k decoders at.
constexpr std::array<std::pair<std::int64_t, std::int64_t>, 3> demonstrated{
    {{4096, 4096}, {4096, 3072}, {3072, 4096}}};

std::string name_of(const Model& model) {
    return model.name.empty() ? "this decoder" : model.name;
}

using Sides = std::pair<std::int64_t, std::int64_t>;

// How far apart two sizes are in aspect ratio, by its logarithm.
double ratio_between(const Sides& a, const Sides& b) {
    return std::abs(std::log(static_cast<double>(a.first) / static_cast<double>(a.second)) -
                    std::log(static_cast<double>(b.first) / static_cast<double>(b.second)));
}

// How far apart they are in area, likewise.
double area_between(const Sides& a, const Sides& b) {
    return std::abs(std::log(static_cast<double>(a.first) * static_cast<double>(a.second)) -
                    std::log(static_cast<double>(b.first) * static_cast<double>(b.second)));
}

// The size nearest in area among those about as near as any in aspect ratio.
Sides nearest_size(const Sides& size, const std::vector<Sides>& trained) {
    double most = std::numeric_limits<double>::infinity();
    for (const Sides& each : trained)
        most = std::min(most, ratio_between(size, each) + same_ratio);
    const Sides* nearest = nullptr;
    for (const Sides& each : trained)
        if (ratio_between(size, each) <= most &&
            (nearest == nullptr || area_between(size, each) < area_between(size, *nearest)))
            nearest = &each;
    return *nearest;
}

// A warning about a size that is not among those trained; "" if it is, or none are known.
std::string about_trained_sizes(const Model& model, const Sides& size) {
    const auto& trained = model.trained_sizes;
    if (trained.empty() || std::find(trained.begin(), trained.end(), size) != trained.end())
        return "";
    const Sides near = nearest_size(size, trained);
    std::string wanted = text_of(near.first, "x", near.second);
    if (const auto scale = static_cast<std::int64_t>(model.scale); scale > 0)
        wanted += text_of(", from the latent of an image of ", near.first / scale, "x",
                          near.second / scale);
    if (is_4k(model) && is_demonstrated(size.first, size.second))
        return text_of("the release shows ", size.first, "x", size.second,
                       ", but training stopped at ", wanted,
                       "; prefer that size if the image shows artifacts");
    return text_of(name_of(model), " was not trained at ", size.first, "x", size.second,
                   " and may give green or blocky artifacts; the nearest trained size is ", wanted);
}

// A warning about a size that is too small for a decoder to 4K; "" if none is.
std::string about_variants(const Model& model, const Sides& size) {
    if (!is_4k(model) || size.first * size.second > largest_2k_area)
        return "";
    const auto& known = model.variants;
    if (known && std::find(known->begin(), known->end(), "2k") == known->end())
        return "";
    return text_of("at ", size.first, "x", size.second,
                   " a 2kto4k decoder is worse than a 2k one; use the 2k variant",
                   known ? "" : " if this latent space has one");
}

} // namespace

bool is_4k(const Model& model) {
    return model.variant.rfind("2kto4k", 0) == 0;
}

bool is_demonstrated(std::int64_t width, std::int64_t height) {
    return std::find(demonstrated.begin(), demonstrated.end(), Sides(width, height)) !=
           demonstrated.end();
}

std::vector<std::string> advice(const Model& model, std::int64_t width, std::int64_t height,
                                float largest_sigma, bool has_caption) {
    std::vector<std::string> lines;
    for (std::string line :
         {about_variants(model, {width, height}), about_trained_sizes(model, {width, height})})
        if (!line.empty())
            lines.push_back(std::move(line));
    if (largest_sigma > trained_sigma)
        lines.push_back(text_of("sigma ", largest_sigma, " is beyond ", trained_sigma,
                                ", the highest in training; denoise the latent further for a "
                                "faithful image"));
    if (!has_caption && model.captioned)
        lines.emplace_back("no caption was given: the empty embedding (zeros) costs quality; give "
                           "the prompt's, made by pid-caption");
    return lines;
}

} // namespace pid::core
