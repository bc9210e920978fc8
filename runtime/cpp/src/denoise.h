// From noise to the image: for every step, for every tile, for every branch.
//
// A plain decode, of one tile and one branch, is the program's own: its update makes the next state
// in the arena. In tiles, with guidance or by a rule that looks back, the program's update gives
// the clean image x0 = x - t v of every call instead; these are blended, and the next state is
// mixed of them on the host. That is the same picture, as every rule is affine in the velocity and
// the weights of tiles, and those of branches, sum to one. pid_runtime/denoise.py is the same in
// Python, down to the order of its float32 arithmetic.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "interpreter.h"
#include "request.h"

namespace pid::core {

// Who follows a decode.
struct Listener {
    // Called once, before the first step.
    std::function<void()> prologue_done;
    // Called after every call of the network.
    std::function<void()> report;
};

// A plain decode: the last state is in the program's buffer "state".
void denoise_in_arena(Program& program, const Request& request, const Listener& listener);

// The state of a decode on the host, and how its steps are made of calls of the program.
class Canvas {
public:
    // program: bound to `request.program_sizes()`. Refers to both, but for the state and images.
    Canvas(Program& program, const Request& request);

    // Run all steps.
    void denoise(const Listener& listener);

    // [B, L, P * P, 3]: the picture's tokens, row by row those of the next step.
    const std::vector<float>& state() const { return state_; }
    Shape state_shape() const;

    // The state as images, float32 [B, 3, H, W], clamped to [-1, 1].
    void read_image(float* image) const;
    // The same as uint8 [B, H, W, 3].
    void read_image_bytes(std::uint8_t* image) const;

private:
    void take_in_latent(std::size_t down, std::size_t across);
    void take_in_captions(std::size_t first, std::size_t count);
    // Put the clean images that the network sees in a tile into `tiles_`.
    void run(std::size_t down, std::size_t across, std::size_t step);
    // Add one, weighted, to its row of tiles.
    void add(const float* clean, double weight, std::size_t down, std::size_t across);
    // Make the next state of the rows that no later tile touches.
    void update(std::size_t step, std::size_t down);
    // Get ready for rows of a draw of noise.
    void begin_draw(std::size_t draw);
    // Put a row of tokens of it, [B, Ws, P, P, 3], into `noise_`.
    void draw_row(std::size_t draw, std::size_t row);
    // Values of an input, which are put into `kept` if they lie on a device.
    const float* on_host(const Input& input, std::vector<float>& kept) const;
    // The height or width of a tile in tokens.
    std::size_t tokens(std::uint64_t length) const { return length * per_latent_; }

    Program& program_;
    const Request& request_;
    TileAxis rows_, columns_;
    std::size_t batch_, height_, width_; // of the picture, in tokens
    std::size_t patch_, per_latent_;
    std::size_t token_;                            // values of one
    std::vector<float> state_;                     // [B, Hs, Ws, P, P, 3]
    std::vector<float> before_;                    // the clean image of the step before, likewise
    std::vector<float> strip_;                     // a row of tiles, [B, hs, Ws, P, P, 3]
    std::vector<float> tiles_;                     // [B, hs, ws, P, P, 3], by branch of a group
    std::vector<std::vector<float>> down_weights_; // by row of tiles
    std::vector<std::vector<float>> across_weights_;
    std::vector<std::array<float, 4>> mixes_;
    std::vector<float> kept_latent_, kept_noise_; // of a device's
    const float* latent_;
    const float* given_noise_ = nullptr; // nullptr where seeds make it
    std::vector<float> noise_;
};

// Bytes on the host of a decode that is not plain: states, a row of tiles, and the image.
std::uint64_t kept_bytes(const Request& request);

} // namespace pid::core
