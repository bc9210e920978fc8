// What to tell a user about a decode that will run, but not as well as it could.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle/manifest.h"

namespace pid::core {

// Warnings, one line each, about a decode to `width` x `height` pixels; empty if all is well.
// model: what the manifest says the decoder is; a network of one's own promises nothing.
// largest_sigma: the highest noise level among the latents.
std::vector<std::string> advice(const Model& model, std::int64_t width, std::int64_t height,
                                float largest_sigma, bool has_caption);

// Whether it is one of the decoders to 4K.
bool is_4k(const Model& model);

// Whether a size is one beyond their training that the release itself shows these at.
bool is_demonstrated(std::int64_t width, std::int64_t height);

} // namespace pid::core
