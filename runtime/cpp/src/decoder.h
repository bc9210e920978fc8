// A bundle, opened, and decoders of it, which turn latents into images.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "backends/backends.h"
#include "backends/graphs.h"
#include "backends/memory.h"
#include "bundle/manifest.h"
#include "denoise.h"
#include "errors.h"
#include "interpreter.h"
#include "log.h"
#include "plan.h"
#include "request.h"

namespace pid::core {

// All that decoders share: what the bundle says, and its graphs with their weights. Serves any
// number of threads.
class Bundle {
public:
    Bundle(const std::filesystem::path& path, const BackendOptions& options);
    Bundle(const Bundle&) = delete;
    Bundle& operator=(const Bundle&) = delete;

    const Manifest& manifest() const { return manifest_; }
    const Constants& constants() const { return constants_; }
    LoadedGraphs& graphs() const { return *graphs_; }
    // How long it took to open.
    double open_ms() const { return open_ms_; }

private:
    Manifest manifest_;
    Constants constants_;
    std::unique_ptr<LoadedGraphs> graphs_;
    double open_ms_;
};

// How the log begins to tell of tiles that were chosen.
constexpr const char* tiles_note = "Decoding in ";

// Where a decode puts its images.
struct Target {
    void* data;
    pid_memory memory;
};

// Called after every call of the network with (calls done, calls); returns whether to go on.
using Progress = std::function<bool(std::int32_t, std::int32_t)>;

// Decodes latents with one bundle. Serves one thread at a time.
//
// The arena is allocated for the first shape decoded and kept: a shape that fits decodes in the
// same memory, a larger one replaces it, and only a change of shape rebinds the program.
class Decoder {
public:
    Decoder(std::shared_ptr<const Bundle> bundle, RunOptions options);
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    const Manifest& manifest() const { return bundle_->manifest(); }
    // That with the program that the backend runs.
    const Manifest& as_run() const { return bundle_->graphs().manifest(); }
    Memory& memory() { return memory_; }
    const Memory& memory() const { return memory_; }

    // The shape of the images of a checked latent's sizes.
    static Shape image_shape(const Sizes& sizes, pid_dtype output);

    // Decode a request into `target`, which takes images of `output`.
    // timed: measure it, for timings(); on a GPU this waits for it between sections.
    void decode(Request request, pid_dtype output, const Target& target, const Progress& progress,
                bool timed = false);

    // What a decode to `height` x `width` pixels would take; see outline_request().
    Plan plan(std::int64_t height, std::int64_t width, std::int64_t batch,
              const pid_decode_params& params) const;

    // The shape of the state after the last step that ran, float32 [B, L, P * P, 3], and its values
    // on the host. Refuse before the first decode; of one that is not plain it is there until it
    // ends.
    Shape state_shape() const;
    void read_state(float* values);

    // Of the last decode. Refuses unless it was timed.
    pid_timings timings() const;

    // Set by any thread to stop the decode that runs; stays until it is cleared.
    std::atomic<bool>& cancelled() { return graphs_->cancelled; }

private:
    void run(const Request& request, pid_dtype output, const Target& target,
             const Progress& progress, bool timed);
    // Let a request run its branches as one batch, where that may gain.
    void take_together(Request& request) const;
    // Let a request that memory does not suffice for run its branches one after another, or in
    // smaller tiles. Throws what there is to say if it may not choose them, or there are none.
    void take_less(Request& request, const char* reason);
    Failure too_large(const Request& request, const std::optional<Tiling>& smaller,
                      const char* reason) const;
    void tell_tiles(const Request& request) const;
    Program& bind(const Sizes& sizes);
    // From the inputs to the state after the last step; `prologue_done` is called on the way.
    void denoise(Program& program, const Request& request, const Progress& progress,
                 const std::function<void()>& prologue_done);
    // Which step gave NaN or infinity first: decodes again, looking at every step.
    std::size_t first_not_finite(Program& program, const Request& request);
    // Whether the state has neither NaN nor infinity.
    bool is_finite();
    void give_images(Program& program, pid_dtype output, const Target& target);
    void advise(const Request& request) const;

    std::shared_ptr<const Bundle> bundle_; // outlives what refers to it
    Log log_;
    Memory memory_;
    std::unique_ptr<Graphs> graphs_;
    Allocation arena_;
    std::uint64_t arena_bytes_ = 0;
    std::optional<Program> program_;
    std::optional<Canvas> canvas_; // while a decode runs that is not plain
    bool state_on_host_ = false;   // its state
    bool state_in_arena_ = false;
    std::optional<pid_timings> timings_;
};

} // namespace pid::core
