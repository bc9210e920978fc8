// The backends this library was built with.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "manifest.h"
#include "session.h"

namespace pid::core {

// How to run a bundle; see pid_decoder_params.
struct BackendOptions {
    std::string backend;
    std::string device;
    std::string provider_library;
    std::string engine_set;
    std::size_t threads;
    bool verify;
    bool cuda_graphs;
    void* cuda_stream;
};

// Names separated by commas.
const char* backend_names();

// A backend with a bundle's graphs loaded. Refuses one that is not there.
std::unique_ptr<Session> open_session(const std::filesystem::path& bundle, const Manifest& manifest,
                                      const BackendOptions& options);

// The two that open_session() chooses from.
std::unique_ptr<Session> open_onnxruntime(const std::filesystem::path& bundle,
                                          const Manifest& manifest, const BackendOptions& options);
std::unique_ptr<Session> open_tensorrt(const std::filesystem::path& bundle,
                                       const Manifest& manifest, const BackendOptions& options);

// A device such as "cuda:1" as its name and number, 0 when it has none.
struct Device {
    std::string name;
    int ordinal;
};
Device parse_device(const std::string& device);

} // namespace pid::core
