// Position tables: the only place where H and W enter a decode. Each is computed on the host, once
// per shape, as docs/bundle-format.md specifies.
#pragma once

#include <vector>

#include "bundle/manifest.h"
#include "bundle/sizes.h"

namespace pid::core {

std::vector<float> compute_table(const Table& table, const Sizes& sizes);

} // namespace pid::core
