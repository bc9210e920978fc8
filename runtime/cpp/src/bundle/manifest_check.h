// "Checks" of docs/bundle-format.md.
#pragma once

#include <cstdint>
#include <string>

#include "bundle/manifest.h"

namespace pid::core {

// What a manifest must keep to before anything is allocated. Refuses one that contradicts itself
// or promises the impossible.
void check_manifest(const Manifest& manifest);

// Refuse a bucket whose plan does not hold the manifest's buffers.
// scratch_bytes: what the arena has room for besides.
void check_bucket(const Manifest& manifest, const std::string& name, const Bucket& bucket,
                  std::uint64_t scratch_bytes = 0);

} // namespace pid::core
