// What a bundle says about its latents, and what latents of another kind look like.
#pragma once

#include <string>

#include "bundle/manifest.h"
#include "bundle/sizes.h"

namespace pid::core {

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
