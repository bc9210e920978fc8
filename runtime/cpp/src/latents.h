// What a bundle says about its latents, and what latents of another kind look like.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle/manifest.h"
#include "bundle/sizes.h"

namespace pid::core {

// Raw latent pixels of FLUX.2 along a side of one of the space.
constexpr std::int64_t raw_patch = 2;

// Latents [B, C, height, width] of tokens [B, n, C patch^2], as generators pack them: `patch` x
// `patch` latent pixels of each, channel by channel; tokens lie row by row.
std::vector<float> unpacked(const std::vector<float>& tokens, const Shape& latent,
                            std::int64_t patch);

// Raw latents of FLUX.2, [B, c, 2 h, 2 w], as [B, 4 c, h, w]: channel by channel, then row by row
// of a block. latent: the shape they come into.
std::vector<float> in_blocks(const std::vector<float>& raw, const Shape& latent);

// The rule of raw latents by FLUX.2's statistics [C]: (z - mean) / sqrt(variance + eps).
Normalization batch_normalization(const std::vector<float>& mean,
                                  const std::vector<float>& variance, float eps);

// What the latents of this bundle are, in words.
std::string latents_of(const Model& model);

// Whether latents of this shape may be packed tokens [B, n, width], as generators have.
bool may_be_tokens(const Manifest& manifest, const Shape& shape);

// What to do about latents that are not [B, C, h, w].
std::string shape_hint(const Manifest& manifest, const Shape& shape);

// What to say of a latent whose values are too large or too small to be normalised ones; "" if
// they are not, or nobody knows.
std::string spread_warning(const Model& model, const float* values, std::size_t count);

} // namespace pid::core
