// What a decode would take, before anything runs. pid_runtime/plan.py is the same in Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "bundle/manifest.h"
#include "request.h"

namespace pid::core {

struct Plan {
    // Of the image, in pixels.
    std::uint64_t width;
    std::uint64_t height;
    // What the picture, or a tile, is decoded in.
    std::string bucket;
    std::size_t steps;
    std::size_t tiles;
    // Of a tile in pixels; the image's where there is one.
    std::uint64_t tile_width;
    std::uint64_t tile_height;
    // 2 with guidance.
    std::size_t branches;
    // Of the network: steps, times tiles, times branches.
    std::int64_t calls;
    // 10^12 floating-point operations, 2 for every multiply-add.
    double tflop;
    // Weights, arena and the state where it lies there; what graphs work in comes on top.
    std::uint64_t device_bytes;
    // Image, and state, where the host has them; 0 where the device has all.
    std::uint64_t host_bytes;
    // Why there are tiles; none where there are none.
    std::optional<std::string> reason;
    // All of that for people.
    std::string text;
};

// The plan of a request. bucket: what a backend decodes such tiles in; nullptr for the bundle's
// own. state_on_device: where the state of decodes in tiles, or with guidance, is going to lie.
Plan plan_of(const Manifest& manifest, const Request& request, const Bucket* bucket = nullptr,
             bool state_on_device = false);

} // namespace pid::core
