#include "denoise.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "noise.h"

namespace pid::core {
namespace {

using Updates = std::vector<std::array<float, 3>>;

// Write rows of a buffer; those below are zero.
void write_padded(const Program& program, const char* name, const void* values, std::size_t bytes) {
    const Tensor buffer = program.buffer(name);
    std::vector<std::byte> padded(buffer.bytes());
    std::copy_n(static_cast<const std::byte*>(values), bytes, padded.begin());
    program.memory().write(buffer, padded.data(), PID_HOST);
}

// Write what is the same for every branch of a group, [B, ..].
void write_for_group(const Program& program, const Request& request, const char* name,
                     const float* values) {
    const std::uint64_t batch = request.sizes.value("B");
    for (std::size_t branch = 0; branch < request.group(); ++branch)
        program.memory().write(program.image_part(name, branch * batch, batch), values, PID_HOST);
}

// Put what is the same for every tile and branch into the arena.
void write_inputs(const Program& program, const Request& request, const Updates& updates) {
    write_for_group(program, request, "sigma", request.sigmas.data());
    write_padded(program, "update", updates.data(), updates.size() * sizeof updates[0]);
    const std::vector<float>& moments = request.schedule.moments;
    if (!moments.empty())
        write_padded(program, "timestep", moments.data(), moments.size() * sizeof moments[0]);
}

// A caption may be one for all images.
void write_caption(const Program& program, const Input& caption, std::uint64_t first,
                   std::uint64_t batch) {
    const auto count = static_cast<std::uint64_t>(caption.shape[0]);
    for (std::uint64_t image = first; image < first + batch; image += count)
        program.memory().write(program.image_part("caption", image, count), caption.data,
                               caption.memory);
}

void compute_times(Program& program, const Schedule& schedule) {
    if (!schedule.moments.empty())
        for (const std::uint64_t row : schedule.rows)
            program.run("timestep", row, row, nullptr);
}

// Fill a noise instruction's target with one draw.
void fill_noise(Program& program, const Request& request, const Updates& updates,
                const BoundNoise& noise, std::size_t draw) {
    const std::string& target = noise.instruction.target;
    const Input& given = request.noises[draw];
    Memory& memory = program.memory();
    if (draw > 0 && updates[draw - 1][2] == 0) {
        memory.fill_zero(program.buffer(target)); // not used, but must not hold a NaN
    } else if (given.data != nullptr) {
        program.load_noise(noise, given.data, given.memory);
    } else {
        for (std::size_t image = 0; image < request.seeds.size(); ++image)
            memory.fill_normal(program.image_part(target, image), request.seeds[image],
                               static_cast<std::uint32_t>(draw));
    }
}

TileAxis whole(std::uint64_t size) {
    return {size, size, {0}};
}

std::vector<std::vector<float>> weights_of(const TileAxis& axis, std::size_t scale) {
    std::vector<std::vector<float>> weights;
    for (std::size_t index = 0; index < axis.starts.size(); ++index)
        weights.push_back(axis.weights(index, scale));
    return weights;
}

float clamped(float value) {
    return std::min(std::max(value, -1.0F), 1.0F);
}

} // namespace

void denoise_in_arena(Program& program, const Request& request, const Listener& listener) {
    const Schedule& schedule = request.schedule;
    const Updates updates = schedule.updates();
    write_inputs(program, request, updates);
    write_caption(program, request.branches[0].caption, 0, request.sizes.value("B"));
    program.memory().write(program.buffer("latent"), request.latent.data, request.latent.memory);
    program.run("prologue", 0, 0,
                [&](const BoundNoise& noise) { fill_noise(program, request, updates, noise, 0); });
    compute_times(program, schedule);
    listener.prologue_done();
    for (std::size_t step = 0; step < schedule.steps(); ++step) {
        program.run("step", schedule.rows[step], step, [&](const BoundNoise& noise) {
            fill_noise(program, request, updates, noise, step + 1);
        });
        listener.report();
    }
}

Canvas::Canvas(Program& program, const Request& request)
    : program_(program), request_(request),
      rows_(request.tiling ? request.tiling->rows : whole(request.sizes.value("h"))),
      columns_(request.tiling ? request.tiling->columns : whole(request.sizes.value("w"))),
      batch_(request.sizes.value("B")), height_(request.sizes.value("Hs")),
      width_(request.sizes.value("Ws")), patch_(request.sizes.value("H") / height_),
      per_latent_(height_ / request.sizes.value("h")), token_(patch_ * patch_ * 3),
      state_(batch_ * height_ * width_ * token_),
      before_(request.schedule.rule == PID_DPMPP_2M ? state_.size() : 0),
      strip_(batch_ * tokens(rows_.tile) * width_ * token_),
      tiles_(request.group() * batch_ * tokens(rows_.tile) * tokens(columns_.tile) * token_),
      down_weights_(weights_of(rows_, per_latent_ * patch_)),
      across_weights_(weights_of(columns_, per_latent_ * patch_)), mixes_(request.schedule.mixes()),
      latent_(on_host(request.latent, kept_latent_)), noise_(batch_ * width_ * token_) {}

Shape Canvas::state_shape() const {
    return {static_cast<std::int64_t>(batch_), static_cast<std::int64_t>(height_ * width_),
            static_cast<std::int64_t>(patch_ * patch_), 3};
}

void Canvas::denoise(const Listener& listener) {
    const std::vector<Branch>& branches = request_.branches;
    const std::size_t group = request_.group();
    write_inputs(program_, request_, request_.schedule.predictions());
    compute_times(program_, request_.schedule);
    begin_draw(0);
    for (std::size_t row = 0; row < height_; ++row) {
        draw_row(0, row);
        const std::size_t count = width_ * token_;
        for (std::size_t image = 0; image < batch_; ++image)
            std::copy_n(noise_.data() + image * count, count,
                        state_.data() + (image * height_ + row) * count);
    }
    listener.prologue_done();
    for (std::size_t step = 0; step < request_.schedule.steps(); ++step) {
        std::fill(strip_.begin(), strip_.end(), 0.0F);
        if (mixes_[step][3] != 0)
            begin_draw(step + 1);
        for (std::size_t down = 0; down < rows_.starts.size(); ++down) {
            for (std::size_t across = 0; across < columns_.starts.size(); ++across) {
                const bool is_first = step == 0 && down == 0 && across == 0;
                if (step == 0 || request_.tiling)
                    take_in_latent(down, across);
                for (std::size_t index = 0; index < branches.size(); ++index) {
                    const std::size_t at = index % group;
                    if (at == 0) {
                        if (branches.size() > group || is_first)
                            take_in_captions(index, group);
                        run(down, across, step);
                    }
                    add(tiles_.data() + at * tiles_.size() / group, branches[index].weight, down,
                        across);
                    if (across + 1 < columns_.starts.size() || index + 1 < branches.size())
                        listener.report();
                }
            }
            update(step, down);
            listener.report();
        }
    }
}

void Canvas::read_image(float* image) const {
    const std::size_t columns = width_ * patch_, rows = height_ * patch_;
    const float* value = state_.data();
    for (std::size_t b = 0; b < batch_; ++b)
        for (std::size_t row = 0; row < height_; ++row)
            for (std::size_t column = 0; column < width_; ++column)
                for (std::size_t y = row * patch_; y < (row + 1) * patch_; ++y)
                    for (std::size_t x = column * patch_; x < (column + 1) * patch_; ++x)
                        for (std::size_t channel = 0; channel < 3; ++channel)
                            image[((b * 3 + channel) * rows + y) * columns + x] = clamped(*value++);
}

void Canvas::read_image_bytes(std::uint8_t* image) const {
    const std::size_t columns = width_ * patch_, rows = height_ * patch_;
    const float* value = state_.data();
    for (std::size_t b = 0; b < batch_; ++b)
        for (std::size_t row = 0; row < height_; ++row)
            for (std::size_t column = 0; column < width_; ++column)
                for (std::size_t y = row * patch_; y < (row + 1) * patch_; ++y) {
                    const std::size_t first = ((b * rows + y) * columns + column * patch_) * 3;
                    for (std::size_t at = first; at < first + patch_ * 3; ++at)
                        image[at] = static_cast<std::uint8_t>(
                            std::nearbyint((clamped(*value++) + 1.0F) * 127.5F));
                }
}

// The part of the latent under a tile.
void Canvas::take_in_latent(std::size_t down, std::size_t across) {
    const Shape& shape = request_.latent.shape; // [B, C, h, w]
    const auto planes = static_cast<std::size_t>(shape[0] * shape[1]);
    const std::size_t height = rows_.tile, width = columns_.tile;
    std::vector<float> part(planes * height * width);
    for (std::size_t plane = 0; plane < planes; ++plane)
        for (std::size_t row = 0; row < height; ++row)
            std::copy_n(latent_ + (plane * rows_.size + rows_.starts[down] + row) * columns_.size +
                            columns_.starts[across],
                        width, part.data() + (plane * height + row) * width);
    write_for_group(program_, request_, "latent", part.data());
    program_.refresh("latent");
}

void Canvas::take_in_captions(std::size_t first, std::size_t count) {
    for (std::size_t index = 0; index < count; ++index)
        write_caption(program_, request_.branches[first + index].caption, index * batch_, batch_);
    program_.refresh("caption");
}

void Canvas::run(std::size_t down, std::size_t across, std::size_t step) {
    const std::size_t top = tokens(rows_.starts[down]), left = tokens(columns_.starts[across]);
    const std::size_t height = tokens(rows_.tile), count = tokens(columns_.tile) * token_;
    for (std::size_t image = 0; image < batch_; ++image)
        for (std::size_t row = 0; row < height; ++row)
            std::copy_n(state_.data() + ((image * height_ + top + row) * width_ + left) * token_,
                        count, tiles_.data() + (image * height + row) * count);
    Memory& memory = program_.memory();
    write_for_group(program_, request_, "state", tiles_.data());
    program_.run("step", request_.schedule.rows[step], step, [&](const BoundNoise& noise) {
        // Its factor is zero, but it must not hold a NaN.
        memory.fill_zero(program_.buffer(noise.instruction.target));
    });
    memory.read(program_.buffer("state"), tiles_.data(), PID_HOST);
}

void Canvas::add(const float* clean, double weight, std::size_t down, std::size_t across) {
    const std::size_t height = tokens(rows_.tile), width = tokens(columns_.tile);
    const std::size_t left = tokens(columns_.starts[across]);
    std::vector<float> horizontal = across_weights_[across];
    for (float& each : horizontal)
        each *= static_cast<float>(weight);
    for (std::size_t image = 0; image < batch_; ++image)
        for (std::size_t row = 0; row < height; ++row) {
            float* sum = strip_.data() + ((image * height + row) * width_ + left) * token_;
            for (std::size_t column = 0; column < width; ++column)
                for (std::size_t y = 0; y < patch_; ++y) {
                    const float vertical = down_weights_[down][row * patch_ + y];
                    for (std::size_t x = 0; x < patch_; ++x)
                        for (std::size_t channel = 0; channel < 3; ++channel)
                            *sum++ += *clean++ * vertical * horizontal[column * patch_ + x];
                }
        }
}

void Canvas::update(std::size_t step, std::size_t down) {
    const std::size_t height = tokens(rows_.tile), count = width_ * token_;
    const std::size_t begin = tokens(rows_.starts[down]);
    const std::size_t end =
        down + 1 == rows_.starts.size() ? height_ : tokens(rows_.starts[down + 1]);
    const auto [of_state, of_clean, of_before, of_noise] = mixes_[step];
    for (std::size_t row = begin; row < end; ++row) {
        if (of_noise != 0)
            draw_row(step + 1, row);
        for (std::size_t image = 0; image < batch_; ++image) {
            const std::size_t at = (image * height_ + row) * count;
            float* state = state_.data() + at;
            const float* clean = strip_.data() + (image * height + row - begin) * count;
            float* before = before_.empty() ? nullptr : before_.data() + at;
            const float* noise = noise_.data() + image * count;
            for (std::size_t i = 0; i < count; ++i) {
                float mixed = of_state * state[i] + of_clean * clean[i];
                if (before != nullptr) {
                    if (of_before != 0)
                        mixed += of_before * before[i];
                    before[i] = clean[i];
                }
                if (of_noise != 0)
                    mixed += of_noise * noise[i];
                state[i] = mixed;
            }
        }
    }
    // What is left of the strip is the top of the next one.
    const std::size_t done = (end - begin) * count, all = height * count;
    for (std::size_t image = 0; image < batch_; ++image) {
        float* strip = strip_.data() + image * all;
        std::memmove(strip, strip + done, (all - done) * sizeof(float));
        std::fill(strip + (all - done), strip + all, 0.0F);
    }
}

void Canvas::begin_draw(std::size_t draw) {
    const Input& given = request_.noises[draw];
    given_noise_ = given.data == nullptr ? nullptr : on_host(given, kept_noise_);
}

void Canvas::draw_row(std::size_t draw, std::size_t row) {
    const std::size_t count = width_ * token_;
    if (given_noise_ == nullptr) {
        for (std::size_t image = 0; image < batch_; ++image)
            standard_normal(request_.seeds[image], static_cast<std::uint32_t>(draw), row * count,
                            count, noise_.data() + image * count, program_.memory().threads());
        return;
    }
    const std::size_t columns = width_ * patch_, rows = height_ * patch_;
    float* value = noise_.data();
    for (std::size_t image = 0; image < batch_; ++image)
        for (std::size_t column = 0; column < width_; ++column)
            for (std::size_t y = row * patch_; y < (row + 1) * patch_; ++y)
                for (std::size_t x = column * patch_; x < (column + 1) * patch_; ++x)
                    for (std::size_t channel = 0; channel < 3; ++channel)
                        *value++ = given_noise_[((image * 3 + channel) * rows + y) * columns + x];
}

const float* Canvas::on_host(const Input& input, std::vector<float>& kept) const {
    if (input.memory == PID_HOST)
        return static_cast<const float*>(input.data);
    kept.resize(count_of(input.shape));
    // Not written: a tensor may be either.
    auto* address = static_cast<std::byte*>(const_cast<void*>(input.data)); // NOLINT
    program_.memory().read({address, DType::float32, input.shape}, kept.data(), PID_HOST);
    return kept.data();
}

std::uint64_t kept_bytes(const Request& request) {
    const Sizes& sizes = request.sizes;
    const std::uint64_t values =
        3 * product(product(sizes.value("B"), sizes.value("H")), sizes.value("W"));
    const double states = request.schedule.rule == PID_DPMPP_2M ? 2 : 1;
    const double strip = static_cast<double>(request.program_sizes().value("H")) /
                         static_cast<double>(sizes.value("H"));
    return static_cast<std::uint64_t>(static_cast<double>(values) * (4 * (states + strip) + 1));
}

} // namespace pid::core
