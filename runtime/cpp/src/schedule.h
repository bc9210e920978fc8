// The times a decode visits, and the sampler's update at each, as factors.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bundle/manifest.h"
#include "pid/pid_runtime.h"

namespace pid::core {

// The times a decode visits, as the program wants them.
struct Schedule {
    // Descending, the last one 0: one more than steps.
    std::vector<double> times;
    // Row of the modulation table, per step.
    std::vector<std::uint64_t> rows;
    // Not PID_DEFAULT_RULE.
    pid_rule rule;
    // 1000 t of every step, for a bundle that takes any times; empty otherwise.
    std::vector<float> moments;

    // How often the state is updated.
    std::size_t steps() const { return rows.size(); }
    // Factors of state, velocity and noise in the program's update, per step; only of rules that
    // need no earlier step.
    std::vector<std::array<float, 3>> updates() const;
    // Factors with which the program's update gives the clean image x0 = x - t v, per step.
    std::vector<std::array<float, 3>> predictions() const;
    // Factors of state, x0, the x0 of the step before, and noise in an update, per step.
    std::vector<std::array<float, 4>> mixes() const;
};

// Width and height of an image in pixels.
struct ImageSize {
    std::uint64_t width;
    std::uint64_t height;
};

// The `steps + 1` times of an undistilled decode to an image, the last one 0.
//
// s_i = 0.999 (1 - i / steps), t = f s / (1 + (f - 1) s), f = shift sqrt(sqrt(height width) /
// base): the shift of Esser et al., arXiv 2403.03206, section 5.3.2, that grows with the image.
std::vector<double> shifted_times(std::size_t steps, const ImageSize& image,
                                  const FlowShift& shift);

// The rule when the caller does not say.
pid_rule default_rule(const Sampler& sampler);

// What a decode with these `steps`, `times` and `rule` visits. Refuses what the bundle does not
// know.
// image: by which the times of undistilled bundles shift; nullptr where only the number of steps is
// asked for.
Schedule check_schedule(const Sampler& sampler, const pid_decode_params& params,
                        const ImageSize* image = nullptr);

} // namespace pid::core
