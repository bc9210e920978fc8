#include "advice.h"

#include <cmath>

#include "errors.h"

namespace pid::core {
namespace {

// Largest noise level the decoders were trained on.
constexpr float trained_sigma = 0.8F;
// Up to this many pixels the 2k decoders were trained; the 2kto4k ones are worse there.
constexpr std::int64_t largest_2k_area = 2688 * 1792;

std::string text_member(const Json& model, const char* name, const char* otherwise) {
    const auto found = model.find(name);
    return found != model.end() && found->is_string() ? found->get<std::string>() : otherwise;
}

// How far apart two sizes are, by the logarithms of width and height.
double distance(double width, double height, double other_width, double other_height) {
    return std::hypot(std::log(width / other_width), std::log(height / other_height));
}

// A warning about a size that is not among those trained; "" if it is, or none are known.
std::string about_trained_sizes(const Json& model, std::int64_t width, std::int64_t height) {
    const auto found = model.find("trained_sizes");
    if (found == model.end() || !found->is_array())
        return "";
    std::int64_t near_width = 0, near_height = 0;
    double nearest = INFINITY;
    for (const Json& size : *found) {
        if (!size.is_array() || size.size() != 2 || !size[0].is_number_unsigned() ||
            !size[1].is_number_unsigned() || size[0] == 0 || size[1] == 0)
            return "";
        const auto w = size[0].get<std::int64_t>(), h = size[1].get<std::int64_t>();
        const double far = distance(static_cast<double>(w), static_cast<double>(h),
                                    static_cast<double>(width), static_cast<double>(height));
        if (far < nearest) {
            nearest = far;
            near_width = w;
            near_height = h;
        }
    }
    if (near_width == 0 || (near_width == width && near_height == height))
        return "";
    return text_of(text_member(model, "name", "this decoder"), " was not trained at ", width, "x",
                   height, " and may give green or blocky artifacts; the nearest trained size is ",
                   near_width, "x", near_height);
}

} // namespace

bool wants_caption(const Json& model) {
    const auto found = model.find("captioned");
    return found == model.end() || *found != false;
}

std::vector<std::string> advice(const Json& model, std::int64_t width, std::int64_t height,
                                float largest_sigma, bool has_caption) {
    std::vector<std::string> lines;
    if (const auto found = model.find("distilled"); found != model.end() && *found == false)
        lines.push_back(text_member(model, "name", "this decoder") +
                        " is not distilled: a few steps give poor images; use a distilled "
                        "variant, or many steps by times");
    if (text_member(model, "variant", "").rfind("2kto4k", 0) == 0 &&
        width * height <= largest_2k_area)
        lines.push_back(text_of("at ", width, "x", height,
                                " a 2kto4k decoder is worse than a 2k one; use the 2k variant if "
                                "this latent space has one"));
    if (std::string line = about_trained_sizes(model, width, height); !line.empty())
        lines.push_back(std::move(line));
    if (largest_sigma > trained_sigma)
        lines.push_back(text_of("sigma ", largest_sigma, " is beyond ", trained_sigma,
                                ", the highest in training; denoise the latent further for a "
                                "faithful image"));
    if (!has_caption && wants_caption(model))
        lines.emplace_back("no caption was given: the empty embedding (zeros) costs quality; give "
                           "the prompt's Gemma-2-2b-it embedding");
    return lines;
}

} // namespace pid::core
