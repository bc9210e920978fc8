// From noise to the image: for every step, for every tile, for every branch.
//
// A plain decode, of one tile and one branch, is the program's own: its update makes the next state
// in the arena. In tiles, with guidance or by a rule that looks back, the program's update gives
// the clean image x0 = x - t v of every call instead; these are blended, and the next state is
// mixed of them (`Blending`). That is the same picture, as every rule is affine in the velocity and
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

// The state of a decode, and how its steps are made of calls of the program. It lies in the
// program's memory, or on the host.
class Canvas {
public:
    // program: bound to `request.program_sizes()`. Refers to both, but for the state and images.
    // on_host: keep the state on the host, as for memory that cannot blend.
    Canvas(Program& program, const Request& request, bool on_host);

    // Run all steps.
    void denoise(const Listener& listener);

    // Whether the state has neither NaN nor infinity.
    bool is_finite();

    // [B, L, P * P, 3]: the picture's tokens, row by row those of the next step.
    void read_state(float* values);
    Shape state_shape() const;

    // The state as images, float32 [B, 3, H, W], clamped to [-1, 1].
    void read_image(float* image);
    // The same as uint8 [B, H, W, 3].
    void read_image_bytes(std::uint8_t* image);

private:
    // Float32 values: of tokens [B, rows, columns, P, P, 3].
    struct Field {
        Allocation memory;
        Tensor whole;
    };

    Field new_values(Shape shape);
    Field new_field(std::size_t rows, std::size_t columns);
    Field new_weights(const TileAxis& axis, std::size_t index, double factor);
    // Rows of an image, [1, rows, columns, P, P, 3].
    static Tensor part(const Field& field, std::size_t image, std::size_t row, std::size_t rows);
    // Rows of tokens that are worked on at once: calls `work` with where they begin, and how many
    // they are.
    void for_parts(std::size_t begin, std::size_t end,
                   const std::function<void(std::size_t, std::size_t)>& work) const;
    // Calls `work` with image, row and values [Ws, P, P, 3] of every row of tokens of the state.
    void for_rows(const std::function<void(std::size_t, std::size_t, const float*)>& work);
    void take_in_latent(std::size_t down, std::size_t across);
    void take_in_captions(std::size_t first, std::size_t count);
    // The program's state as a tile, for one branch of a group.
    Tensor tile_of(std::size_t place) const;
    // Let the program's state be the clean images that the network sees in a tile.
    void run(std::size_t down, std::size_t across, std::size_t step);
    // Add what the program made of a branch of a group, weighted, to its row of tiles.
    void add(std::size_t place, std::size_t branch, std::size_t down, std::size_t across);
    // Make the next state of the rows that no later tile touches.
    void update(std::size_t step, std::size_t down);
    // Get ready for rows of a draw of noise.
    void begin_draw(std::size_t draw);
    // Put rows of it into a field, from its row `at` on.
    void draw_rows(const Field& field, std::size_t at, std::size_t draw, std::size_t row,
                   std::size_t rows);
    // Values of an input, which are put into `kept` if they lie on a device.
    const float* on_host(const Input& input, std::vector<float>& kept) const;
    // The height or width of a tile in tokens.
    std::size_t tokens(std::uint64_t length) const { return length * per_latent_; }

    Program& program_;
    const Request& request_;
    Memory memory_; // the state's
    bool is_near_;  // that is the program's
    const Blending& blending_;
    TileAxis rows_, columns_;
    std::size_t batch_, height_, width_; // of the picture, in tokens
    std::size_t patch_, per_latent_;
    std::size_t token_; // values of one
    Field state_;
    Field before_; // the clean image of the step before; empty where no step looks back
    Field ring_;   // a row of tiles
    Field noise_;  // of rows that are worked on at once
    Field aside_;  // a tile; empty where the program's state serves
    std::vector<Field> down_weights_;                // by row of tiles
    std::vector<std::vector<Field>> across_weights_; // by branch, and column of tiles
    std::vector<std::array<float, 4>> mixes_;
    std::vector<float> kept_latent_, kept_noise_; // of a device's
    const float* latent_;
    const float* given_noise_ = nullptr; // nullptr where seeds make it
};

// Bytes of a decode that is not plain, wherever its state lies: states, and a row of tiles.
std::uint64_t state_bytes(const Request& request);
// Bytes of a decode's image in 8 bits, on the host.
std::uint64_t image_bytes(const Request& request);

} // namespace pid::core
