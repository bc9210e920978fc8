// The ONNX Runtime backend: graphs through IoBinding, on the CPU or another provider.
//
// All graphs share one scratch arena, so that thirty sessions cost no more memory than one. Each
// has its own threads, which sleep while it does not run. Decoders share the sessions, and bind
// them to their own memory.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backends/backends.h"
#include "backends/device.h"
#include "backends/graphs.h"
#include "backends/ort_environment.h"
#include "errors.h"
#include "log.h"
#include "parallel.h"

namespace pid::core {
namespace {

constexpr const char* cpu_provider = "CPUExecutionProvider";
constexpr const char* cuda_provider = "CUDAExecutionProvider";
constexpr const char* tensorrt_provider = "TensorrtExecutionProvider";
constexpr const char* rtx_provider = "NvTensorRTRTXExecutionProvider";

// The full name of a provider: short names are those of pid_decoder_params, others are full ones.
std::string full_name(const std::string& name) {
    static const std::map<std::string, std::string> short_names{{"cpu", cpu_provider},
                                                                {"cuda", cuda_provider},
                                                                {"tensorrt", tensorrt_provider},
                                                                {"nvtensorrtrtx", rtx_provider}};
    std::string lower = name;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](char c) {
        return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    });
    const auto found = short_names.find(lower);
    return found == short_names.end() ? name : found->second;
}

// Whether a provider takes addresses of a GPU's memory.
bool on_cuda(const std::string& provider) {
    return provider == cuda_provider || provider == tensorrt_provider || provider == rtx_provider;
}

// Load a plug-in library, once in a process.
void register_library(Ort::Env& environment, const std::string& path) {
#if ORT_API_VERSION >= 22
    static std::mutex mutex;
    static std::set<std::string> registered;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!registered.insert(path).second)
        return;
    try {
        const std::filesystem::path file(path);
        environment.RegisterExecutionProviderLibrary(path.c_str(), file.native());
    } catch (const Ort::Exception& error) {
        registered.erase(path);
        refuse("expected a library of an ONNX Runtime provider, but got ", path, ": ",
               first_line(error.what()));
    }
#else
    static_cast<void>(environment);
    refuse("expected a provider ONNX Runtime has built in, but got the library ", path,
           "; build this library with ONNX Runtime's headers of 1.22 or later");
#endif
}

#if ORT_API_VERSION >= 22

// The devices of a plug-in's provider; `ordinal` is which of them.
void append_plugin(Ort::Env& environment, Ort::SessionOptions& options, const std::string& provider,
                   int ordinal) {
    std::vector<Ort::ConstEpDevice> devices;
    std::string known;
    for (const Ort::ConstEpDevice& device : environment.GetEpDevices()) {
        known += (known.empty() ? "" : ", ") + std::string(device.EpName());
        if (device.EpName() == provider)
            devices.push_back(device);
    }
    if (devices.size() <= static_cast<std::size_t>(ordinal))
        refuse("expected a provider and device that this machine has (", known, "), but got ",
               provider, " ", ordinal);
    options.AppendExecutionProvider_V2(environment, {devices[static_cast<std::size_t>(ordinal)]},
                                       std::unordered_map<std::string, std::string>{});
}

#else

void append_plugin(Ort::Env&, Ort::SessionOptions&, const std::string&, int) {}

#endif

void append_cuda(Ort::SessionOptions& options, const CudaDevice& device) {
    const OrtApi& api = Ort::GetApi();
    OrtCUDAProviderOptionsV2* raw = nullptr;
    Ort::ThrowOnError(api.CreateCUDAProviderOptions(&raw));
    const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(api.ReleaseCUDAProviderOptions)> held(
        raw, api.ReleaseCUDAProviderOptions);
    const std::string ordinal = std::to_string(device.ordinal());
    const char* key = "device_id";
    const char* value = ordinal.c_str();
    Ort::ThrowOnError(api.UpdateCUDAProviderOptions(raw, &key, &value, 1));
    Ort::ThrowOnError(
        api.UpdateCUDAProviderOptionsWithValue(raw, "user_compute_stream", device.stream()));
    options.AppendExecutionProvider_CUDA_V2(*raw);
}

void append_tensorrt(Ort::SessionOptions& options, const CudaDevice& device) {
    const OrtApi& api = Ort::GetApi();
    OrtTensorRTProviderOptionsV2* raw = nullptr;
    Ort::ThrowOnError(api.CreateTensorRTProviderOptions(&raw));
    const std::unique_ptr<OrtTensorRTProviderOptionsV2,
                          decltype(api.ReleaseTensorRTProviderOptions)>
        held(raw, api.ReleaseTensorRTProviderOptions);
    const std::string ordinal = std::to_string(device.ordinal());
    const char* key = "device_id";
    const char* value = ordinal.c_str();
    Ort::ThrowOnError(api.UpdateTensorRTProviderOptions(raw, &key, &value, 1));
    Ort::ThrowOnError(
        api.UpdateTensorRTProviderOptionsWithValue(raw, "user_compute_stream", device.stream()));
    options.AppendExecutionProvider_TensorRT_V2(*raw);
}

// What SessionOptionsAppendExecutionProvider calls a provider.
std::string generic_name(const std::string& provider) {
    static const std::string end = "ExecutionProvider";
    if (provider == rtx_provider)
        return "NvTensorRtRtx";
    const std::size_t at = provider.rfind(end);
    return at != std::string::npos && at + end.size() == provider.size() ? provider.substr(0, at)
                                                                         : provider;
}

void append_provider(Ort::SessionOptions& options, const std::string& provider,
                     const CudaDevice* device) {
    if (provider == tensorrt_provider)
        append_tensorrt(options, *device);
    if (provider == tensorrt_provider || provider == cuda_provider)
        append_cuda(options, *device); // for what TensorRT does not take
    else
        options.AppendExecutionProvider(generic_name(provider));
}

ONNXTensorElementDataType onnx_type(DType dtype) {
    switch (dtype) {
    case DType::float32:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case DType::float16:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::bfloat16:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case DType::float8_e4m3fn:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN;
    default:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    }
}

// A provider of this ONNX Runtime, or one that a plug-in brought.
struct Provider {
    std::string name;
    bool is_plugin;
};

Provider find_provider(const std::string& name, bool has_library) {
    const std::string full = full_name(name);
    if (has_library && full != cpu_provider)
        return {full, true};
    const std::vector<std::string> available = Ort::GetAvailableProviders();
    if (std::find(available.begin(), available.end(), full) != available.end())
        return {full, false};
    refuse("expected one of this ONNX Runtime's providers (", joined(available), "), but got ",
           shown(name),
           "; GPU providers come with ONNX Runtime's GPU package, or as a provider library");
}

// A session for every graph.
class LoadedSessions : public LoadedGraphs {
public:
    LoadedSessions(const std::filesystem::path& bundle, const Manifest& manifest,
                   std::shared_ptr<OrtEnvironment> environment, const Provider& provider,
                   std::shared_ptr<CudaDevice> device, int ordinal, std::size_t threads)
        : environment_(std::move(environment)), manifest_(manifest), device_(std::move(device)),
          threads_(threads),
          memory_(device_ ? Ort::MemoryInfo("Cuda", OrtDeviceAllocator, device_->ordinal(),
                                            OrtMemTypeDefault)
                          : Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault)) {
        Ort::SessionOptions options;
        // On the host every error is thrown; a GPU's provider logs what it lacks.
        options.SetLogSeverityLevel(provider.name == cpu_provider ? ORT_LOGGING_LEVEL_FATAL
                                                                  : ORT_LOGGING_LEVEL_ERROR);
        options.SetIntraOpNumThreads(static_cast<int>(threads));
        options.AddConfigEntry("session.force_spinning_stop", "1");
        // Products of rounded matrices are computed as written: it would make integers of 8-bit
        // floats.
        options.AddConfigEntry("session.disable_quant_qdq", "1");
        OrtEnvironment::use_shared_arena(options);
        guarded(PID_ERROR_INPUT, provider.name + " cannot be used", [&] {
            if (provider.is_plugin)
                append_plugin(environment_->env(), options, provider.name, ordinal);
            else if (provider.name != cpu_provider)
                append_provider(options, provider.name, device_.get());
        });
        const bool contrib = provider.name == cpu_provider || provider.name == cuda_provider;
        std::vector<std::pair<std::string, const Graph*>> graphs;
        for (const auto& [name, graph] : manifest.graphs) {
            graphs.emplace_back(name, &graph);
            sessions_.emplace(name, Ort::Session(nullptr));
        }
        parallel_for(graphs.size(), threads, [&](std::size_t index) {
            const std::string& name = graphs[index].first;
            const Graph* graph = graphs[index].second;
            const bool own = contrib && !graph->contrib_file.empty();
            const std::string& file = own ? graph->contrib_file : graph->file;
            guarded(PID_ERROR_INPUT, provider.name + " cannot load " + file, [&] {
                sessions_.at(name) =
                    Ort::Session(environment_->env(), (bundle / file).c_str(), options);
            });
        });
    }

    LoadedSessions(const LoadedSessions&) = delete;
    LoadedSessions& operator=(const LoadedSessions&) = delete;

    ~LoadedSessions() override {
        sessions_.clear();
        give_back();
    }

    // Return the memory that no session works in now.
    void give_back() noexcept { environment_->give_back(); }

    Memory memory(const RunOptions& options) override {
        if (device_ && options.cuda_stream != nullptr && options.cuda_stream != device_->stream())
            refuse("expected decoders of a bundle in ONNX Runtime to use its stream, but got "
                   "another cuda_stream; give it when the bundle is opened");
        return {device_, threads_};
    }

    std::unique_ptr<Graphs> graphs(Memory&, const RunOptions&) override;

    const Manifest& manifest() const override { return manifest_; }
    bool on_host() const { return !device_; }

    Call bind(const std::string& graph, const Bindings& tensors) {
        const Graph& described = manifest_.graphs.at(graph);
        Ort::Session& session = sessions_.at(graph);
        const std::string what = "graph '" + graph + "' failed";
        return guarded(PID_ERROR_BACKEND, what, [&]() -> Call {
            // Shared, as a std::function is copied.
            const auto binding = std::make_shared<Ort::IoBinding>(session);
            for (const auto& [name, port] : described.inputs)
                binding->BindInput(name.c_str(), value_of(tensors.at(name)));
            for (const auto& [name, port] : described.outputs)
                binding->BindOutput(name.c_str(), value_of(tensors.at(name)));
            return [this, &session, binding, what] {
                std::unique_lock<std::mutex> lock(stream_, std::defer_lock);
                if (device_)
                    lock.lock();
                guarded(PID_ERROR_BACKEND, what, [&] { session.Run(Ort::RunOptions(), *binding); });
            };
        });
    }

private:
    Ort::Value value_of(const Tensor& tensor) const {
        return Ort::Value::CreateTensor(memory_, tensor.address, tensor.bytes(),
                                        tensor.shape.data(), tensor.shape.size(),
                                        onnx_type(tensor.dtype));
    }

    std::shared_ptr<OrtEnvironment> environment_; // outlives the sessions
    const Manifest& manifest_;
    std::shared_ptr<CudaDevice> device_;
    std::size_t threads_;
    Ort::MemoryInfo memory_;
    std::map<std::string, Ort::Session> sessions_;
    std::mutex stream_; // of a GPU, which the sessions share: one run at a time
};

// All a decoder has of its own is what its bindings hold.
class OnnxRuntimeGraphs : public Graphs {
public:
    explicit OnnxRuntimeGraphs(LoadedSessions& loaded) : loaded_(loaded) {}
    OnnxRuntimeGraphs(const OnnxRuntimeGraphs&) = delete;
    OnnxRuntimeGraphs& operator=(const OnnxRuntimeGraphs&) = delete;

    ~OnnxRuntimeGraphs() override { loaded_.give_back(); }

    bool whole_batches() const override { return true; }

    bool batches_gain() const override { return !loaded_.on_host(); }

    const Bucket& bucket_for(std::uint64_t tokens) const override {
        return loaded_.manifest().bucket_for(tokens).second;
    }

    Call bind(const std::string& graph, const Bindings& tensors, const Scratch&) override {
        return loaded_.bind(graph, tensors);
    }

private:
    LoadedSessions& loaded_;
};

std::unique_ptr<Graphs> LoadedSessions::graphs(Memory&, const RunOptions&) {
    return std::make_unique<OnnxRuntimeGraphs>(*this);
}

} // namespace

std::unique_ptr<LoadedGraphs> load_onnxruntime(const std::filesystem::path& bundle,
                                               const Manifest& manifest,
                                               const BackendOptions& options) {
    std::shared_ptr<OrtEnvironment> environment = OrtEnvironment::shared();
    if (!options.provider_library.empty())
        register_library(environment->env(), options.provider_library);
    const auto [name, ordinal] = parse_device(options.device.empty() ? "cpu" : options.device);
    const Provider provider = find_provider(name, !options.provider_library.empty());
    static const std::map<std::string, std::string> for_cpu{
        {"bf16", "fp32"}, {"fp8", "fp8-fp32"}, {"int8", "int8-fp32"}};
    const auto found = for_cpu.find(manifest.precision);
    if (provider.name == cpu_provider && found != for_cpu.end())
        refuse("ONNX Runtime's CPU provider has no bf16 kernels; export with --precision ",
               found->second, ", or decode on a GPU");
    std::shared_ptr<CudaDevice> device;
    if (on_cuda(provider.name))
        device = CudaDevice::open(ordinal, options.cuda_stream);
    auto graphs =
        std::make_unique<LoadedSessions>(bundle, manifest, std::move(environment), provider,
                                         std::move(device), ordinal, options.threads);
    note(options.log, "Loaded ", manifest.graphs.size(), " graphs with ONNX Runtime ",
         OrtGetApiBase()->GetVersionString(), ", ", provider.name, ", ", options.threads,
         " threads");
    return graphs;
}

} // namespace pid::core
