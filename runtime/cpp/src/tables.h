// Position tables: the only place where H and W enter a decode. Each is computed on the host, once
// per shape, as docs/bundle-format.md specifies.
#pragma once

#include <vector>

#include "bundle/json_reader.h"
#include "bundle/sizes.h"

namespace pid::core {

// The table a buffer's `source`, which was checked, describes.
std::vector<float> compute_table(const Json& source, const Sizes& sizes);

} // namespace pid::core
