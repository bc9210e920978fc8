// The command line of pid-decode-cpp.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "pid/pid_runtime.h"

namespace pid::cli {

using Path = std::filesystem::path;

// What latents in files are, as somebody who knows says.
struct LatentForm {
    // "auto": what the file says; "normalised", "raw" or "packed".
    std::string kind = "auto";
    // Of packed ones width and height in pixels of the picture that they are of; none for one that
    // is square.
    std::optional<std::pair<std::int64_t, std::int64_t>> size;
    // Of raw ones the safetensors file of their autoencoder, whose statistics normalise them as
    // FLUX.2's do; empty for the rule of the bundle.
    Path statistics;
};

struct Arguments {
    Path bundle;
    // A latent file, or a folder of them if `many`.
    Path latents;
    bool many = false;
    Path output;
    // A caption file for all, or a folder of captions; empty paths if not given.
    Path caption;
    Path captions;
    // Names of tensors; empty to find them.
    std::string latent_key;
    std::string caption_key;
    LatentForm latent_form;
    std::optional<float> sigma;
    std::uint64_t seed = 0;
    // 0 for what the bundle says.
    int steps = 0;
    std::vector<double> times;
    pid_rule rule = PID_DEFAULT_RULE;
    // A caption file, "" for none.
    Path negative;
    std::optional<double> guidance;
    // As of pid_decode_params.
    std::int64_t tile_width = 0;
    std::int64_t tile_height = 0;
    std::int64_t overlap = -1;
    // Say what decoding would take, and stop; there may be no output then.
    bool plan = false;
    bool overwrite = false;
    bool skip_existing = false;
    bool metadata = true;
    std::string backend = "onnxruntime";
    // "" for the backend's own default.
    std::string device;
    // onnxruntime: file of a plug-in provider; tensorrt: name of an engine set. "" for none.
    std::string provider_library;
    std::string engine_set;
    // 0 for all.
    std::size_t threads = 0;
    bool verify = true;
    bool cuda_graphs = true;
    bool quiet = false;
    bool json = false;
};

// What the user asked for; nothing if that was `--help` or `--version`, which are then printed.
// Refuses arguments that are wrong, missing or contradict each other.
std::optional<Arguments> parse_arguments(const std::vector<std::string>& words);

} // namespace pid::cli
