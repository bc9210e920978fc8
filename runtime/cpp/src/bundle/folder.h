// A bundle's folder: the manifest in it, its files, and the constants among its weights.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "bundle/manifest.h"

namespace pid::core {

// Read a bundle's manifest and check its files.
// verify: hash every file, on up to `threads` threads; otherwise only their sizes are compared.
// Refuses a missing, altered or newer bundle.
Manifest read_manifest(const std::filesystem::path& bundle, bool verify, std::size_t threads);

// Values of the buffers of kind "constant", by buffer. Refuses weights that lack one or hold it in
// another shape.
std::map<std::string, std::vector<float>> read_constants(const std::filesystem::path& bundle,
                                                         const Manifest& manifest);

} // namespace pid::core
