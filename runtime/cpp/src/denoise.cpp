#include "denoise.h"

#include <algorithm>
#include <cmath>

namespace pid::core {
namespace {

using Updates = std::vector<std::array<float, 3>>;

// Of a draw that are made, and used, at once.
constexpr std::size_t noise_values = std::size_t{1} << 20;

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

Canvas::Canvas(Program& program, const Request& request, bool on_host)
    : program_(program), request_(request),
      memory_(on_host ? Memory(nullptr, program.memory().threads()) : program.memory()),
      is_near_(!on_host), blending_(*memory_.blending()),
      rows_(request.tiling ? request.tiling->rows : whole(request.sizes.value("h"))),
      columns_(request.tiling ? request.tiling->columns : whole(request.sizes.value("w"))),
      batch_(request.sizes.value("B")), height_(request.sizes.value("Hs")),
      width_(request.sizes.value("Ws")), patch_(request.sizes.value("H") / height_),
      per_latent_(height_ / request.sizes.value("h")), token_(patch_ * patch_ * 3),
      state_(new_field(height_, width_)), before_(), ring_(new_field(tokens(rows_.tile), width_)),
      noise_(new_field(
          std::clamp<std::size_t>(noise_values / (batch_ * width_ * token_), 1, height_), width_)),
      aside_(), mixes_(request.schedule.mixes()),
      latent_(this->on_host(request.latent, kept_latent_)) {
    if (request.schedule.rule == PID_DPMPP_2M)
        before_ = new_field(height_, width_);
    if (!is_near_)
        aside_ = new_field(tokens(rows_.tile), tokens(columns_.tile));
    for (std::size_t down = 0; down < rows_.starts.size(); ++down)
        down_weights_.push_back(new_weights(rows_, down, 1));
    for (const Branch& branch : request.branches) {
        std::vector<Field>& across = across_weights_.emplace_back();
        for (std::size_t index = 0; index < columns_.starts.size(); ++index)
            across.push_back(new_weights(columns_, index, branch.weight));
    }
}

Canvas::Field Canvas::new_values(Shape shape) {
    Tensor whole{nullptr, DType::float32, std::move(shape)};
    Allocation memory = memory_.allocate(whole.bytes());
    whole.address = memory.get();
    return {std::move(memory), std::move(whole)};
}

Canvas::Field Canvas::new_field(std::size_t rows, std::size_t columns) {
    const auto length = [](std::size_t size) { return static_cast<std::int64_t>(size); };
    return new_values(
        {length(batch_), length(rows), length(columns), length(patch_), length(patch_), 3});
}

Canvas::Field Canvas::new_weights(const TileAxis& axis, std::size_t index, double factor) {
    std::vector<float> weights = axis.weights(index, per_latent_ * patch_);
    for (float& each : weights)
        each *= static_cast<float>(factor);
    Field field = new_values({static_cast<std::int64_t>(weights.size())});
    memory_.write(field.whole, weights.data(), PID_HOST);
    return field;
}

Tensor Canvas::part(const Field& field, std::size_t image, std::size_t row, std::size_t rows) {
    Shape shape = field.whole.shape;
    shape[0] = 1;
    shape[1] = static_cast<std::int64_t>(rows);
    auto* address = reinterpret_cast<std::byte*>(row_of(field.whole, image, row));
    return {address, DType::float32, std::move(shape)};
}

void Canvas::for_parts(std::size_t begin, std::size_t end,
                       const std::function<void(std::size_t, std::size_t)>& work) const {
    const std::size_t most = TokenLengths(noise_.whole).rows;
    for (std::size_t row = begin; row < end; row += most)
        work(row, std::min(most, end - row));
}

void Canvas::for_rows(const std::function<void(std::size_t, std::size_t, const float*)>& work) {
    std::vector<float> values;
    const std::size_t count = width_ * token_;
    for (std::size_t image = 0; image < batch_; ++image)
        for_parts(0, height_, [&](std::size_t begin, std::size_t rows) {
            values.resize(rows * count);
            memory_.read(part(state_, image, begin, rows), values.data(), PID_HOST);
            for (std::size_t row = 0; row < rows; ++row)
                work(image, begin + row, values.data() + row * count);
        });
}

Shape Canvas::state_shape() const {
    return {static_cast<std::int64_t>(batch_), static_cast<std::int64_t>(height_ * width_),
            static_cast<std::int64_t>(patch_ * patch_), 3};
}

bool Canvas::is_finite() {
    return memory_.is_finite(state_.whole);
}

void Canvas::read_state(float* values) {
    memory_.read(state_.whole, values, PID_HOST);
}

void Canvas::denoise(const Listener& listener) {
    const std::vector<Branch>& branches = request_.branches;
    const std::size_t group = request_.group();
    write_inputs(program_, request_, request_.schedule.predictions());
    compute_times(program_, request_.schedule);
    memory_.fill_zero(ring_.whole);
    begin_draw(0);
    for_parts(0, height_,
              [&](std::size_t row, std::size_t rows) { draw_rows(state_, row, 0, row, rows); });
    listener.prologue_done();
    for (std::size_t step = 0; step < request_.schedule.steps(); ++step) {
        if (mixes_[step][3] != 0)
            begin_draw(step + 1);
        for (std::size_t down = 0; down < rows_.starts.size(); ++down) {
            for (std::size_t across = 0; across < columns_.starts.size(); ++across) {
                const bool is_first = step == 0 && down == 0 && across == 0;
                if (step == 0 || request_.tiling)
                    take_in_latent(down, across);
                for (std::size_t index = 0; index < branches.size(); ++index) {
                    const std::size_t place = index % group;
                    if (place == 0) {
                        if (branches.size() > group || is_first)
                            take_in_captions(index, group);
                        run(down, across, step);
                    }
                    add(place, index, down, across);
                    if (across + 1 < columns_.starts.size() || index + 1 < branches.size())
                        listener.report();
                }
            }
            update(step, down);
            listener.report();
        }
    }
}

void Canvas::read_image(float* image) {
    const std::size_t columns = width_ * patch_, rows = height_ * patch_;
    for_rows([&](std::size_t b, std::size_t row, const float* value) {
        for (std::size_t column = 0; column < width_; ++column)
            for (std::size_t y = row * patch_; y < (row + 1) * patch_; ++y)
                for (std::size_t x = column * patch_; x < (column + 1) * patch_; ++x)
                    for (std::size_t channel = 0; channel < 3; ++channel)
                        image[((b * 3 + channel) * rows + y) * columns + x] = clamped(*value++);
    });
}

void Canvas::read_image_bytes(std::uint8_t* image) {
    const std::size_t columns = width_ * patch_, rows = height_ * patch_;
    for_rows([&](std::size_t b, std::size_t row, const float* value) {
        for (std::size_t column = 0; column < width_; ++column)
            for (std::size_t y = row * patch_; y < (row + 1) * patch_; ++y) {
                const std::size_t first = ((b * rows + y) * columns + column * patch_) * 3;
                for (std::size_t at = first; at < first + patch_ * 3; ++at)
                    image[at] = static_cast<std::uint8_t>(
                        std::nearbyint((clamped(*value++) + 1.0F) * 127.5F));
            }
    });
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

Tensor Canvas::tile_of(std::size_t place) const {
    Tensor tile = program_.image_part("state", place * batch_, batch_);
    tile.shape = state_.whole.shape;
    tile.shape[1] = static_cast<std::int64_t>(tokens(rows_.tile));
    tile.shape[2] = static_cast<std::int64_t>(tokens(columns_.tile));
    return tile;
}

void Canvas::run(std::size_t down, std::size_t across, std::size_t step) {
    const std::size_t top = tokens(rows_.starts[down]), left = tokens(columns_.starts[across]);
    Memory& memory = program_.memory();
    if (!is_near_)
        blending_.take(state_.whole, aside_.whole, top, left);
    for (std::size_t place = 0; place < request_.group(); ++place) {
        if (is_near_)
            blending_.take(state_.whole, tile_of(place), top, left);
        else
            memory.write(tile_of(place), aside_.whole.address, PID_HOST);
    }
    program_.run("step", request_.schedule.rows[step], step, [&](const BoundNoise& noise) {
        // Its factor is zero, but it must not hold a NaN.
        memory.fill_zero(program_.buffer(noise.instruction.target));
    });
}

void Canvas::add(std::size_t place, std::size_t branch, std::size_t down, std::size_t across) {
    Tensor tile = tile_of(place);
    if (!is_near_) {
        program_.memory().read(tile, aside_.whole.address, PID_HOST);
        tile = aside_.whole;
    }
    blending_.add(ring_.whole, tile, down_weights_[down].whole,
                  across_weights_[branch][across].whole, tokens(rows_.starts[down]),
                  tokens(columns_.starts[across]));
}

void Canvas::update(std::size_t step, std::size_t down) {
    const std::size_t begin = tokens(rows_.starts[down]);
    const std::size_t end =
        down + 1 == rows_.starts.size() ? height_ : tokens(rows_.starts[down + 1]);
    const bool has_noise = mixes_[step][3] != 0;
    for_parts(begin, end, [&](std::size_t row, std::size_t rows) {
        if (has_noise)
            draw_rows(noise_, 0, step + 1, row, rows);
        blending_.mix(state_.whole, ring_.whole, before_.memory ? &before_.whole : nullptr,
                      has_noise ? &noise_.whole : nullptr, mixes_[step], row, rows);
    });
}

void Canvas::begin_draw(std::size_t draw) {
    const Input& given = request_.noises[draw];
    given_noise_ = given.data == nullptr ? nullptr : on_host(given, kept_noise_);
}

void Canvas::draw_rows(const Field& field, std::size_t at, std::size_t draw, std::size_t row,
                       std::size_t rows) {
    const std::size_t columns = width_ * patch_, lines = height_ * patch_;
    std::vector<float> given;
    for (std::size_t image = 0; image < batch_; ++image) {
        const Tensor target = part(field, image, at, rows);
        if (given_noise_ == nullptr) {
            memory_.fill_normal(target, request_.seeds[image], static_cast<std::uint32_t>(draw),
                                row * width_ * token_);
            continue;
        }
        given.resize(rows * width_ * token_);
        float* value = given.data();
        for (std::size_t line = row; line < row + rows; ++line)
            for (std::size_t column = 0; column < width_; ++column)
                for (std::size_t y = line * patch_; y < (line + 1) * patch_; ++y)
                    for (std::size_t x = column * patch_; x < (column + 1) * patch_; ++x)
                        for (std::size_t channel = 0; channel < 3; ++channel)
                            *value++ =
                                given_noise_[((image * 3 + channel) * lines + y) * columns + x];
        memory_.write(target, given.data(), PID_HOST);
    }
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

std::uint64_t state_bytes(const Request& request) {
    const double states = request.schedule.rule == PID_DPMPP_2M ? 2 : 1;
    const double strip = static_cast<double>(request.program_sizes().value("H")) /
                         static_cast<double>(request.sizes.value("H"));
    return static_cast<std::uint64_t>(static_cast<double>(image_bytes(request)) * sizeof(float) *
                                      (states + strip));
}

std::uint64_t image_bytes(const Request& request) {
    const Sizes& sizes = request.sizes;
    return 3 * product(product(sizes.value("B"), sizes.value("H")), sizes.value("W"));
}

} // namespace pid::core
