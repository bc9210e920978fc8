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
        constants_ = read_constants(path, manifest_);
        graphs_ = load_graphs(path, manifest_, options);
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

void Decoder::decode(const Request& request, pid_dtype output, const Target& target,
                     const Progress& progress, bool timed) {
    try {
        run(request, output, target, progress, timed);
    } catch (const Shortage& shortage) {
        throw too_large(request.sizes, shortage.what());
    } catch (const std::bad_alloc&) {
        throw too_large(request.sizes, "too little");
    }
}

// Give the arena back, and say what memory does not suffice for.
Failure Decoder::too_large(const Sizes& sizes, const char* reason) {
    program_.reset();
    arena_.reset();
    arena_bytes_ = 0;
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
    const Schedule& schedule = request.schedule;
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
    if (log_)
        advise(request);
    Program& program = bind(request.sizes);
    end_of(timings.prepare_ms);
    denoise(program, request, progress, [&] { end_of(timings.prologue_ms); });
    end_of(timings.steps_ms);
    if (!memory_.is_finite(state()))
        refuse("expected a finite image, but step ", first_not_finite(program, request), " of ",
               schedule.rows.size(), " gave NaN or infinity; ",
               manifest().precision == "fp16"
                   ? "float16 may have overflowed: export with --precision bf16, or "
                   : "",
               "check the bundle with pid-verify");
    const char* image = output == PID_UINT8 ? "image_bytes" : "image";
    program.run(image, 0, 0, nullptr);
    memory_.read(program.buffer(image), target.data, target.memory);
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
    const Schedule& schedule = request.schedule;
    write_inputs(program, request);
    program.run("prologue", 0, 0,
                [&](const BoundNoise& noise) { fill_noise(program, request, noise, 0); });
    if (!schedule.moments.empty())
        for (const std::uint64_t row : schedule.rows)
            program.run("timestep", row, row, nullptr);
    prologue_done();
    const auto steps = static_cast<std::int32_t>(schedule.rows.size());
    for (std::size_t step = 0; step < schedule.rows.size(); ++step) {
        program.run("step", schedule.rows[step], step, [&](const BoundNoise& noise) {
            fill_noise(program, request, noise, step + 1);
        });
        if (progress && !progress(static_cast<std::int32_t>(step) + 1, steps))
            graphs_->cancelled = true;
        graphs_->throw_if_cancelled();
    }
}

std::int32_t Decoder::first_not_finite(Program& program, const Request& request) {
    std::int32_t bad = 0;
    const auto look = [&](std::int32_t step, std::int32_t) {
        if (bad == 0 && !memory_.is_finite(state()))
            bad = step;
        return true;
    };
    denoise(program, request, look, [] {});
    return bad == 0 ? static_cast<std::int32_t>(request.schedule.rows.size()) : bad;
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

Tensor Decoder::state() const {
    if (!program_)
        refuse("expected a decode before its state is read");
    Tensor state = program_->buffer("state");
    state.shape = {state.shape[0], state.shape[1], state.shape[2] / 3, 3};
    return state;
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
    graphs_->prepare(planned_calls(manifest(), bucket, sizes), fits ? 0 : needed, sizes.value("B"));
    if (!fits) {
        arena_ = memory_.allocate(needed);
        arena_bytes_ = needed;
        note(log_, "Arena of ", gigabytes(needed), " for a batch of ", sizes.value("B"), " at ",
             sizes.value("W"), "x", sizes.value("H"));
    }
    program_.emplace(manifest(), memory_, *graphs_, bucket, sizes, arena_, bundle_->constants());
    return *program_;
}

// Put a decode's inputs into the arena.
void Decoder::write_inputs(const Program& program, const Request& request) {
    const auto write_padded = [&](const char* name, const void* values, std::size_t bytes) {
        const Tensor buffer = program.buffer(name);
        std::vector<std::byte> padded(buffer.bytes()); // unused rows are zero
        std::copy_n(static_cast<const std::byte*>(values), bytes, padded.begin());
        memory_.write(buffer, padded.data(), PID_HOST);
    };
    const std::uint64_t batch = request.sizes.value("B");
    memory_.write(program.buffer("latent"), request.latent.data, request.latent.memory);
    if (static_cast<std::uint64_t>(request.caption.shape[0]) == batch)
        memory_.write(program.buffer("caption"), request.caption.data, request.caption.memory);
    else
        for (std::uint64_t image = 0; image < batch; ++image)
            memory_.write(program.image_part("caption", image), request.caption.data,
                          request.caption.memory);
    memory_.write(program.buffer("sigma"), request.sigmas.data(), PID_HOST);
    const Schedule& schedule = request.schedule;
    write_padded("update", schedule.updates.data(),
                 schedule.updates.size() * sizeof schedule.updates[0]);
    if (!schedule.moments.empty())
        write_padded("timestep", schedule.moments.data(),
                     schedule.moments.size() * sizeof schedule.moments[0]);
}

// Fill a noise instruction's target with one draw.
void Decoder::fill_noise(Program& program, const Request& request, const BoundNoise& noise,
                         std::size_t draw) {
    const std::string& target = noise.instruction.target;
    const Input& given = request.noises[draw];
    if (draw > 0 && request.schedule.updates[draw - 1][2] == 0) {
        memory_.fill_zero(program.buffer(target)); // not used, but must not hold a NaN
    } else if (given.data != nullptr) {
        program.load_noise(noise, given.data, given.memory);
    } else {
        for (std::size_t image = 0; image < request.seeds.size(); ++image)
            memory_.fill_normal(program.image_part(target, image), request.seeds[image],
                                static_cast<std::uint32_t>(draw));
    }
}

} // namespace pid::core
