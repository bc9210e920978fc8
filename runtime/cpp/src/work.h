// How much a decode computes: 2 floating-point operations for every multiply-add of matrix
// products, convolutions and attention. pid_runtime/work.py is the same in Python.
#pragma once

#include <cstdint>
#include <string>

#include "bundle/manifest.h"
#include "bundle/sizes.h"

namespace pid::core {

// FLOP of a section of the program, for a batch of one image. Refuses a manifest that lacks a
// dimension of its network.
std::uint64_t section_flop(const Manifest& manifest, const std::string& section,
                           const Sizes& sizes);

// FLOP of what of the prologue depends on an input, for a batch of one image.
std::uint64_t refresh_flop(const Manifest& manifest, const std::string& input, const Sizes& sizes);

} // namespace pid::core
