// A decode's inputs, checked against a bundle before anything runs.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "bundle/manifest.h"
#include "bundle/sizes.h"
#include "pid/pid_runtime.h"
#include "schedule.h"
#include "tiles.h"

namespace pid::core {

// An input as float32. The caller's own memory if it is float32 already.
struct Input {
    const void* data = nullptr; // nullptr: not given
    pid_memory memory = PID_HOST;
    Shape shape;
    std::vector<float> converted;
};

// One of the runs of the network whose clean images are mixed at every step.
struct Branch {
    // [B, T, D], or [1, T, D] for every image
    Input caption;
    // Of all branches they sum to 1.
    double weight;
};

struct Request {
    // Of the whole picture.
    Sizes sizes;
    Schedule schedule;
    // [B, C, h, w]
    Input latent;
    // The caption's, after the negative caption's if there is guidance; of as many text tokens.
    std::vector<Branch> branches;
    bool has_caption;
    // [B]
    std::vector<float> sigmas;
    // B of them
    std::vector<std::uint64_t> seeds;
    // Noise images [B, 3, H, W], one before and one per step; not given where the seed makes it.
    std::vector<Input> noises;
    // None for the whole picture at once.
    std::optional<Tiling> tiling;
    // The least of tiles, in pixels of the latent.
    std::uint64_t overlap;
    // Whether the tiling, or that there is none, may be changed where memory is short.
    bool is_automatic;
    // Whether the program runs all branches as one batch, not one after another.
    bool branches_at_once = false;

    // How many branches the program runs at a time.
    std::size_t group() const { return branches_at_once ? branches.size() : 1; }
    // Of what the program runs at a time: the pictures, or a tile of each, of a group.
    Sizes program_sizes() const;
    // How often the network runs for an image, by itself or in a batch.
    std::int64_t calls() const;
    // Whether the program makes every step on its own.
    bool is_plain() const;
};

// What to decode, complete and checked. has_device: whether inputs may lie on a GPU.
// Refuses what does not fit the bundle. Values on the host are looked through for NaN.
Request check_request(const Manifest& manifest, const pid_decode_params& params, bool has_device);

// How much more of the caption than of the negative one; 1 for the caption alone. Refuses guidance
// that the bundle does not take, or that lacks a negative caption.
// guidance: none for what the bundle says.
double check_guidance(const Manifest& manifest, std::optional<double> guidance, bool has_negative);

// The sizes of the images of a decode, whose latent's shape and tiles are checked; the values are
// not looked at.
Sizes check_sizes(const Manifest& manifest, const pid_decode_params& params);

// The request of a decode to `height` x `width` pixels without its inputs, to plan by. Of params
// steps, times, rule, guidance, the tile and the overlap are looked at; guidance needs no negative.
// Refuses as check_request() does.
Request outline_request(const Manifest& manifest, std::int64_t height, std::int64_t width,
                        std::int64_t batch, const pid_decode_params& params);

// The tiles of the same decode in tiles of half as many tokens or fewer; none where there are none.
std::optional<Tiling> smaller_tiles(const Manifest& manifest, const Request& request);

} // namespace pid::core
