#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <utility>
#include <vector>

#include "advice.h"
#include "bundle/folder.h"
#include "errors.h"
#include "latents.h"

namespace pid::core {
namespace {

using Clock = std::chrono::steady_clock;

double ms_between(Clock::time_point begin, Clock::time_point end) {
    return std::chrono::duration<double, std::milli>(end - begin).count();
}

Failure too_large_to_open(const std::filesystem::path& path, const Manifest& manifest,
                          const char* reason) {
    std::uint64_t bytes = 0;
    for (const auto& [name, file] : manifest.files)
        bytes += file.bytes;
    return {PID_ERROR_MEMORY, text_of("expected enough memory to open ", path.string(),
                                      ", whose weights are ", gigabytes(bytes), ", but got ",
                                      reason, "; end other programs, or take a machine with more")};
}

} // namespace

Bundle::Bundle(const std::filesystem::path& path, const BackendOptions& options) {
    const auto begin = Clock::now();
    manifest_ = read_manifest(path, options.verify, options.threads);
    try {
        graphs_ = load_graphs(path, manifest_, options);
        constants_ = read_constants(path, graphs_->manifest());
    } catch (const Shortage& shortage) {
        throw too_large_to_open(path, manifest_, shortage.what());
    } catch (const std::bad_alloc&) {
        throw too_large_to_open(path, manifest_, "too little");
    }
    open_ms_ = ms_between(begin, Clock::now());
}

Decoder::Decoder(std::shared_ptr<const Bundle> bundle, RunOptions options)
    : bundle_(std::move(bundle)), log_(options.log), memory_(bundle_->graphs().memory(options)),
      graphs_(bundle_->graphs().graphs(memory_, options)) {}

Shape Decoder::image_shape(const Sizes& sizes, pid_dtype output) {
    if (output == PID_FLOAT32)
        return sizes.shape({"B", std::uint64_t{3}, "H", "W"});
    if (output == PID_UINT8)
        return sizes.shape({"B", "H", "W", std::uint64_t{3}});
    refuse("expected output float32 or uint8, but got another");
}

void Decoder::decode(Request request, pid_dtype output, const Target& target,
                     const Progress& progress, bool timed) {
    if (log_)
        advise(request);
    take_together(request);
    state_on_host_ = memory_.blending() == nullptr;
    while (true) {
        tell_tiles(request);
        try {
            run(request, output, target, progress, timed);
            canvas_.reset();
            return;
        } catch (const Shortage& shortage) {
            take_less(request, shortage.what());
        } catch (const std::bad_alloc&) {
            take_less(request, "too little");
        } catch (...) {
            canvas_.reset(); // it refers to the request
            throw;
        }
    }
}

void Decoder::take_together(Request& request) const {
    // Not in tiles: each is work enough, and every step would look at its latent twice.
    if (graphs_->batches_gain() && !request.tiling && request.branches.size() > 1)
        request.branches_at_once = true;
}

void Decoder::take_less(Request& request, const char* reason) {
    canvas_.reset();
    program_.reset();
    arena_.reset();
    arena_bytes_ = 0;
    if (request.branches_at_once) {
        request.branches_at_once = false;
        return;
    }
    if (!request.is_plain() && !state_on_host_ && memory_.device()) {
        note(log_, "Keeping the state on the host: the device has ", reason);
        state_on_host_ = true;
        return;
    }
    std::optional<Tiling> smaller = smaller_tiles(manifest(), request);
    if (!smaller || !request.is_automatic)
        throw too_large(request, smaller, reason);
    request.tiling = std::move(smaller);
}

// What was chosen, and why.
void Decoder::tell_tiles(const Request& request) const {
    if (request.is_automatic && request.tiling)
        note(log_, tiles_note, described(*request.tiling, manifest().network.pixels_per_latent()),
             ": ", request.tiling->reason);
}

// What to say of a shape that memory does not suffice for.
Failure Decoder::too_large(const Request& request, const std::optional<Tiling>& smaller_tiling,
                           const char* reason) const {
    const Sizes sizes = request.program_sizes();
    const std::uint64_t tokens = sizes.value("L"), batch = sizes.value("B");
    const Bucket& bucket = graphs_->bucket_for(tokens);
    const std::pair<const std::string, Bucket>* smaller = nullptr;
    for (const auto& each : manifest().buckets)
        if (each.second.max_tokens < bucket.max_tokens &&
            (smaller == nullptr || each.second.max_tokens > smaller->second.max_tokens))
            smaller = &each;
    std::vector<std::string> cures;
    if (batch > 1)
        cures.emplace_back("a smaller batch");
    if (smaller != nullptr)
        cures.push_back("at most " + manifest().megapixels(smaller->second.max_tokens) +
                        ": bucket " + smaller->first);
    if (smaller_tiling) {
        const std::uint64_t side = manifest().network.pixels_per_latent();
        cures.push_back(text_of("in tiles, of ", smaller_tiling->columns.tile * side, "x",
                                smaller_tiling->rows.tile * side, " for example"));
    }
    if (cures.empty())
        cures.emplace_back("a smaller shape");
    return {PID_ERROR_MEMORY,
            text_of("expected enough memory for ", batch, " x ", manifest().megapixels(tokens),
                    " (", gigabytes(Program::arena_bytes(bucket, sizes)),
                    " for the arena, and what the graphs work in), but got ", reason, "; decode ",
                    joined(cures, " or "))};
}

void Decoder::run(const Request& request, pid_dtype output, const Target& target,
                  const Progress& progress, bool timed) {
    timings_.reset();
    pid_timings timings{};
    auto last = Clock::now();
    const auto end_of = [&](double& section_ms) {
        if (!timed)
            return;
        memory_.synchronize();
        const auto now = Clock::now();
        section_ms = ms_between(last, now);
        last = now;
    };
    state_in_arena_ = false;
    Program& program = bind(request.program_sizes());
    if (!request.is_plain())
        canvas_.emplace(program, request, state_on_host_);
    state_in_arena_ = !canvas_;
    end_of(timings.prepare_ms);
    denoise(program, request, progress, [&] { end_of(timings.prologue_ms); });
    end_of(timings.steps_ms);
    if (!is_finite())
        refuse("expected a finite image, but step ", first_not_finite(program, request), " of ",
               request.schedule.steps(), " gave NaN or infinity; ",
               manifest().precision == "fp16"
                   ? "float16 may have overflowed: export with --precision bf16, or "
                   : "",
               "check the bundle with pid-verify");
    give_images(program, output, target);
    end_of(timings.image_ms);
    if (!timed)
        return;
    timings.open_ms = bundle_->open_ms();
    timings.total_ms =
        timings.prepare_ms + timings.prologue_ms + timings.steps_ms + timings.image_ms;
    timings_ = timings;
}

void Decoder::denoise(Program& program, const Request& request, const Progress& progress,
                      const std::function<void()>& prologue_done) {
    const auto calls = static_cast<std::int32_t>(request.calls());
    std::int32_t done = 0;
    const Listener listener{prologue_done, [&] {
                                if (progress || canvas_)
                                    memory_.synchronize(); // or all would be on the stream at once
                                if (progress && !progress(++done, calls))
                                    graphs_->cancelled = true;
                                graphs_->throw_if_cancelled();
                            }};
    if (canvas_)
        canvas_->denoise(listener);
    else
        denoise_in_arena(program, request, listener);
}

bool Decoder::is_finite() {
    return canvas_ ? canvas_->is_finite() : memory_.is_finite(program_->buffer("state"));
}

std::size_t Decoder::first_not_finite(Program& program, const Request& request) {
    const std::size_t steps = request.schedule.steps();
    std::size_t bad = 0;
    const auto look = [&](std::int32_t done, std::int32_t calls) {
        const auto call = static_cast<std::size_t>(done), all = static_cast<std::size_t>(calls);
        if (bad == 0 && call % (all / steps) == 0 && !is_finite())
            bad = call / (all / steps);
        return true;
    };
    denoise(program, request, look, [] {});
    return bad == 0 ? steps : bad;
}

// The images of the last state.
void Decoder::give_images(Program& program, pid_dtype output, const Target& target) {
    const char* image = output == PID_UINT8 ? "image_bytes" : "image";
    if (!canvas_) {
        program.run(image, 0, 0, nullptr);
        memory_.read(program.buffer(image), target.data, target.memory);
        return;
    }
    const auto fill = [&](void* data) {
        if (output == PID_UINT8)
            canvas_->read_image_bytes(static_cast<std::uint8_t*>(data));
        else
            canvas_->read_image(static_cast<float*>(data));
    };
    if (target.memory == PID_HOST) {
        fill(target.data);
        return;
    }
    const std::uint64_t count = count_of(canvas_->state_shape());
    const DType dtype = output == PID_UINT8 ? DType::uint8 : DType::float32;
    const Tensor on_device{
        static_cast<std::byte*>(target.data), dtype, {static_cast<std::int64_t>(count)}};
    std::vector<std::byte> pixels(on_device.bytes());
    fill(pixels.data());
    memory_.write(on_device, pixels.data(), PID_HOST);
    memory_.synchronize();
}

Plan Decoder::plan(std::int64_t height, std::int64_t width, std::int64_t batch,
                   const pid_decode_params& params) const {
    Request request = outline_request(manifest(), height, width, batch, params);
    take_together(request);
    const std::uint64_t tokens = request.program_sizes().value("L");
    const bool on_device = memory_.device() && memory_.blending() != nullptr;
    return plan_of(as_run(), request, &graphs_->bucket_for(tokens), on_device);
}

pid_timings Decoder::timings() const {
    if (!timings_)
        refuse("expected a decode that was timed, but the last one was not, or did not end; set "
               "`timed` of its parameters");
    return *timings_;
}

// Tell what runs but not as well as it could.
void Decoder::advise(const Request& request) const {
    const Shape shape = image_shape(request.sizes, PID_FLOAT32);
    const float sigma = *std::max_element(request.sigmas.begin(), request.sigmas.end());
    for (const std::string& line :
         advice(manifest().model, shape[3], shape[2], sigma, request.has_caption))
        log_(PID_LOG_WARNING, line);
    if (request.latent.memory != PID_HOST)
        return;
    const auto* latent = static_cast<const float*>(request.latent.data);
    const std::string spread =
        spread_warning(manifest().model, latent, count_of(request.latent.shape));
    if (!spread.empty())
        log_(PID_LOG_WARNING, spread);
}

Shape Decoder::state_shape() const {
    if (canvas_)
        return canvas_->state_shape();
    if (!program_ || !state_in_arena_)
        refuse("expected a decode before its state is read",
               program_ ? ", but the last one was in tiles or with guidance and has ended; read it "
                          "in a progress callback"
                        : "");
    const Shape shape = program_->buffer("state").shape;
    return {shape[0], shape[1], shape[2] / 3, 3};
}

void Decoder::read_state(float* values) {
    if (canvas_)
        canvas_->read_state(values);
    else
        memory_.read(program_->buffer("state"), values, PID_HOST);
}

// The program at these sizes: the one of the last decode if they have not changed.
Program& Decoder::bind(const Sizes& sizes) {
    if (program_ && program_->sizes() == sizes)
        return *program_;
    const Bucket& bucket = graphs_->bucket_for(sizes.value("L"));
    const std::uint64_t needed = Program::arena_bytes(bucket, sizes);
    memory_.synchronize();
    program_.reset();
    const bool fits = arena_ && needed <= arena_bytes_;
    if (!fits) {
        arena_.reset(); // give the old arena back before asking for the new one
        arena_bytes_ = 0;
    }
    graphs_->prepare(planned_calls(as_run(), bucket, sizes), fits ? 0 : needed, sizes.value("B"));
    if (!fits) {
        arena_ = memory_.allocate(needed);
        arena_bytes_ = needed;
        note(log_, "Arena of ", gigabytes(needed), " for a batch of ", sizes.value("B"), " at ",
             sizes.value("W"), "x", sizes.value("H"));
    }
    program_.emplace(as_run(), memory_, *graphs_, bucket, sizes, arena_, bundle_->constants());
    return *program_;
}

} // namespace pid::core
