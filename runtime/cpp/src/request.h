// A decode's inputs, checked against a bundle before anything runs.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "bundle/manifest.h"
#include "bundle/sizes.h"
#include "pid/pid_runtime.h"

namespace pid::core {

// The times a decode visits, as the program wants them.
struct Schedule {
    // Row of the modulation table, per step.
    std::vector<std::uint64_t> rows;
    // Factors of state, velocity and noise in the sampler's update, per step.
    std::vector<std::array<float, 3>> updates;
    // 1000 t of every step, for a bundle that takes any times; empty otherwise.
    std::vector<float> moments;
};

// An input as float32. The caller's own memory if it is float32 already.
struct Input {
    const void* data = nullptr; // nullptr: not given
    pid_memory memory = PID_HOST;
    Shape shape;
    std::vector<float> converted;
};

struct Request {
    Sizes sizes;
    Schedule schedule;
    // [B, C, h, w]
    Input latent;
    // [B, T, D], or [1, T, D] for every image
    Input caption;
    bool has_caption;
    // [B]
    std::vector<float> sigmas;
    // B of them
    std::vector<std::uint64_t> seeds;
    // Noise images [B, 3, H, W], one before and one per step; not given where the seed makes it.
    std::vector<Input> noises;
};

// What to decode, complete and checked. has_device: whether inputs may lie on a GPU.
// Refuses what does not fit the bundle. Values on the host are looked through for NaN.
Request check_request(const Manifest& manifest, const pid_decode_params& params, bool has_device);

// What a decode with these `steps`, `times` and `rule` visits. Refuses what the bundle does not
// know.
Schedule check_schedule(const Sampler& sampler, const pid_decode_params& params);

// The sizes of a decode of this latent, whose shape is checked; the values are not looked at.
Sizes check_sizes(const Manifest& manifest, const pid_tensor& latent);

} // namespace pid::core
