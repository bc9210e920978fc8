// The backends this library was built with.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "backends/graphs.h"
#include "bundle/manifest.h"
#include "log.h"

namespace pid::core {

// How to load a bundle's graphs; see pid_decoder_params.
struct BackendOptions {
    std::string backend;
    std::string device;
    std::string provider_library;
    std::string engine_set;
    std::size_t threads;
    bool verify;
    // Of a backend whose graphs keep to one stream.
    void* cuda_stream;
    Log log;
};

// Names separated by commas.
const char* backend_names();

// A bundle's graphs, loaded. Refuses a backend that is not there.
std::unique_ptr<LoadedGraphs> load_graphs(const std::filesystem::path& bundle,
                                          const Manifest& manifest, const BackendOptions& options);

// The two that load_graphs() chooses from.
std::unique_ptr<LoadedGraphs> load_onnxruntime(const std::filesystem::path& bundle,
                                               const Manifest& manifest,
                                               const BackendOptions& options);
std::unique_ptr<LoadedGraphs> load_tensorrt(const std::filesystem::path& bundle,
                                            const Manifest& manifest,
                                            const BackendOptions& options);

// A device such as "cuda:1" as its name and number, 0 when it has none.
struct Device {
    std::string name;
    int ordinal;
};
Device parse_device(const std::string& device);

} // namespace pid::core
