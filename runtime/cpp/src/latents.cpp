#include "latents.h"

#include <algorithm>
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

bool Normalization::is_identity() const {
    const auto are = [](const std::vector<float>& values, float wanted) {
        return std::count(values.begin(), values.end(), wanted) ==
               static_cast<std::ptrdiff_t>(values.size());
    };
    return are(factor, 1) && are(shift, 0);
}

void Normalization::apply(std::vector<float>& z, const Shape& shape) const {
    const auto channels = static_cast<std::size_t>(shape[1]);
    const auto pixels = static_cast<std::size_t>(shape[2] * shape[3]);
    for (std::size_t i = 0; i < z.size(); ++i) {
        const std::size_t channel = i / pixels % channels;
        z[i] = (z[i] - shift[shift.size() == 1 ? 0 : channel]) *
               factor[factor.size() == 1 ? 0 : channel];
    }
}

std::vector<float> unpacked(const std::vector<float>& tokens, const Shape& latent,
                            std::int64_t patch) {
    const std::int64_t channels = latent[1], height = latent[2], width = latent[3];
    std::vector<float> values(tokens.size());
    float* to = values.data();
    for (std::int64_t image = 0; image < latent[0]; ++image)
        for (std::int64_t channel = 0; channel < channels; ++channel)
            for (std::int64_t y = 0; y < height; ++y)
                for (std::int64_t x = 0; x < width; ++x) {
                    const std::int64_t row = image * (height / patch) + y / patch;
                    const std::int64_t token = row * (width / patch) + x / patch;
                    const std::int64_t part = (channel * patch + y % patch) * patch + x % patch;
                    *to++ =
                        tokens[static_cast<std::size_t>(token * channels * patch * patch + part)];
                }
    return values;
}

std::vector<float> in_blocks(const std::vector<float>& raw, const Shape& latent) {
    const std::int64_t channels = latent[1], height = latent[2], width = latent[3];
    const std::int64_t parts = raw_patch * raw_patch;
    std::vector<float> values(raw.size());
    float* to = values.data();
    for (std::int64_t image = 0; image < latent[0]; ++image)
        for (std::int64_t channel = 0; channel < channels; ++channel)
            for (std::int64_t y = 0; y < height; ++y)
                for (std::int64_t x = 0; x < width; ++x) {
                    const std::int64_t plane = image * channels / parts + channel / parts;
                    const std::int64_t row = y * raw_patch + channel % parts / raw_patch;
                    const std::int64_t column = x * raw_patch + channel % raw_patch;
                    *to++ = raw[static_cast<std::size_t>(
                        (plane * height * raw_patch + row) * width * raw_patch + column)];
                }
    return values;
}

Normalization batch_normalization(const std::vector<float>& mean,
                                  const std::vector<float>& variance, float eps) {
    Normalization rule{{}, mean};
    for (const float each : variance)
        rule.factor.push_back(1 / std::sqrt(each + eps));
    return rule;
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
