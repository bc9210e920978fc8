#include "backends/backends.h"

#include <algorithm>

#include "errors.h"

namespace pid::core {

const char* backend_names() {
#if defined(PID_WITH_ONNXRUNTIME) && defined(PID_WITH_TENSORRT)
    return "onnxruntime,tensorrt";
#elif defined(PID_WITH_ONNXRUNTIME)
    return "onnxruntime";
#elif defined(PID_WITH_TENSORRT)
    return "tensorrt";
#else
    return "";
#endif
}

std::unique_ptr<LoadedGraphs> load_graphs(const std::filesystem::path& bundle,
                                          const Manifest& manifest, const BackendOptions& options) {
    const bool has_engines = options.backend == "tensorrt" || options.backend == "tensorrt-rtx";
    if (!options.engine_set.empty() && !has_engines)
        refuse("expected the tensorrt backend to run engines ", shown(options.engine_set),
               ", but got ", shown(options.backend));
#ifdef PID_WITH_ONNXRUNTIME
    if (options.backend == "onnxruntime")
        return load_onnxruntime(bundle, manifest, options);
#endif
#ifdef PID_WITH_TENSORRT
    if (has_engines)
        return load_tensorrt(bundle, manifest, options);
#endif
    if (options.backend == "onnxruntime" || has_engines)
        refuse("expected a backend this library was built with (", backend_names(), "), but got '",
               options.backend, "'; build it with PID_WITH_ONNXRUNTIME or PID_WITH_TENSORRT on");
    static_cast<void>(bundle);
    static_cast<void>(manifest);
    refuse("expected a backend of onnxruntime, tensorrt, tensorrt-rtx, but got ",
           shown(options.backend), "; choose one of these");
}

Device parse_device(const std::string& device) {
    const std::size_t colon = device.find(':');
    if (colon == std::string::npos)
        return {device, 0};
    const std::string digits = device.substr(colon + 1);
    if (digits.empty() || digits.size() > 3 ||
        !std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; }))
        refuse("expected a device such as cuda:0, but got ", shown(device));
    return {device.substr(0, colon), std::stoi(digits)};
}

} // namespace pid::core
