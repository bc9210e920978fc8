// A bundle, opened, turning latents into images.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "backends.h"
#include "interpreter.h"
#include "manifest.h"
#include "request.h"
#include "session.h"

namespace pid::core {

// Where a decode puts its images, and how it reports.
struct Target {
    void* data;
    pid_memory memory;
};

// Called after every step with (steps done, steps); returns whether to go on.
using Progress = std::function<bool(std::int32_t, std::int32_t)>;
using Warning = std::function<void(const std::string&)>;

// Decodes latents with one bundle on one backend.
//
// The arena is allocated for the first shape decoded and kept: a shape that fits decodes in the
// same memory, a larger one replaces it, and only a change of shape rebinds the program.
class Decoder {
public:
    Decoder(const std::filesystem::path& bundle, const BackendOptions& options, Warning warning);

    const Manifest& manifest() const { return manifest_; }
    Session& session() { return *session_; }
    const Session& session() const { return *session_; }

    // The shape of the images of a checked latent's sizes.
    static Shape image_shape(const Sizes& sizes, pid_dtype output);

    // Decode a request into `target`, which takes images of `output`.
    void decode(const Request& request, pid_dtype output, const Target& target,
                const Progress& progress);

    // The state after the last step that ran. Refuses before the first decode.
    Tensor state() const;

private:
    Program& bind(const Sizes& sizes);
    void write_inputs(const Program& program, const Request& request);
    void fill_noise(Program& program, const Request& request, const BoundNoise& noise,
                    std::size_t draw);

    Manifest manifest_;
    Constants constants_;
    std::unique_ptr<Session> session_;
    Warning warning_;
    Allocation arena_;
    std::uint64_t arena_bytes_ = 0;
    std::optional<Program> program_;
};

} // namespace pid::core
