#include "latents.h"

#include <cmath>
#include <cstdio>

#include "errors.h"

namespace pid::core {
namespace {

double standard_deviation(const float* values, std::size_t count) {
    double sum = 0, squares = 0;
    for (std::size_t i = 0; i < count; ++i)
        sum += static_cast<double>(values[i]);
    const double mean = sum / static_cast<double>(count);
    for (std::size_t i = 0; i < count; ++i)
        squares += std::pow(static_cast<double>(values[i]) - mean, 2);
    return std::sqrt(squares / static_cast<double>(count));
}

} // namespace

void Normalization::apply(std::vector<float>& z, const Shape& shape) const {
    const auto channels = static_cast<std::size_t>(shape[1]);
    const auto pixels = static_cast<std::size_t>(shape[2] * shape[3]);
    for (std::size_t i = 0; i < z.size(); ++i) {
        const std::size_t channel = i / pixels % channels;
        z[i] = (z[i] - shift[shift.size() == 1 ? 0 : channel]) *
               factor[factor.size() == 1 ? 0 : channel];
    }
}

std::string latents_of(const Model& model) {
    if (model.space.empty())
        return "latents of its own network";
    return model.space + " latents, " + model.latent_convention;
}

bool may_be_tokens(const Manifest& manifest, const Shape& shape) {
    const auto width = static_cast<std::int64_t>(manifest.model.token_width);
    return width > 0 && shape.size() == 3 && shape[2] == width;
}

std::string shape_hint(const Manifest& manifest, const Shape& shape) {
    const auto channels = static_cast<std::int64_t>(manifest.network.latent_channels);
    if (may_be_tokens(manifest, shape)) {
        if (shape[0] == channels)
            return text_of("save one latent as [1, ", channels,
                           ", h, w]; if these are tokens [B, n, ", shape[2],
                           "], unpack them to [B, ", channels, ", h, w] first");
        return text_of("these look like tokens [B, n, ", shape[2], "]: unpack them to [B, ",
                       channels,
                       ", h, w] first, as the pipeline that made them does before its VAE");
    }
    if (shape.size() == 5)
        return "choose one frame, and leave its axis out";
    if (shape.size() == 3 && shape[0] == channels)
        return "put an axis of images in front";
    return "this bundle takes " + latents_of(manifest.model);
}

std::string spread_warning(const Model& model, const float* values, std::size_t count) {
    if (!model.latent_spread)
        return "";
    const double deviation = standard_deviation(values, count);
    if (model.latent_spread->first <= deviation && deviation <= model.latent_spread->second)
        return "";
    char shown[64];
    std::snprintf(shown, sizeof shown, "%.2f", deviation);
    return text_of(
        "the latent's standard deviation is ", shown,
        ", but about 1 is expected; normalise it as this bundle takes it: ", latents_of(model));
}

} // namespace pid::core
