// The TensorRT backend: a bundle's engines, in TensorRT 11 or TensorRT for RTX, whichever this was
// built with.
//
// Memory on the GPU is the engines' weights, which decoders share, and each decoder's arena. Its
// engines run one after the other on its stream, and each works in a part of the arena where no
// buffer is in use by then, as planned when they were built; those that ask for more than they did
// then share a block of the decoder's own. The first decode in a shape runs call by call; the
// second one records what lies between two draws of noise as a CUDA graph, and later ones replay
// it.
#include <algorithm>
#include <cstddef>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <NvInferRuntime.h>

#include "backends/backends.h"
#include "backends/device.h"
#include "backends/graphs.h"
#include "bundle/engines.h"
#include "errors.h"
#include "log.h"

namespace pid::core {
namespace {

static_assert(std::string_view(PID_TENSORRT_FLAVOR) == "tensorrt" ||
                  std::string_view(PID_TENSORRT_FLAVOR) == "tensorrt-rtx",
              "engine sets have no other flavors");

// Remembers the last error, for the messages.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR)
            return;
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            last_ = first_line(message);
        } catch (...) { // no memory for a message
        }
    }

    std::string last() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return last_;
    }

private:
    std::mutex mutex_;
    std::string last_ = "nothing";
};

std::string library_version() {
    return text_of(getInferLibMajorVersion(), ".", getInferLibMinorVersion(), ".",
                   getInferLibPatchVersion(), ".", getInferLibBuildVersion());
}

std::vector<char> read_file(const std::filesystem::path& path, std::uint64_t bytes) {
    std::vector<char> blob(bytes);
    std::ifstream file(path, std::ios::binary);
    if (!file.read(blob.data(), static_cast<std::streamsize>(blob.size())))
        refuse("cannot read ", path.string());
    return blob;
}

nvinfer1::Dims dims_of(const Shape& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    for (std::size_t axis = 0; axis < shape.size(); ++axis)
        dims.d[axis] = shape[axis];
    return dims;
}

using Execution = std::unique_ptr<nvinfer1::IExecutionContext>;

// The engines of a set: each is loaded when a decoder first needs it, once for all of them.
class LoadedEngines : public LoadedGraphs {
public:
    LoadedEngines(std::filesystem::path bundle, const Manifest& manifest, EngineSet set,
                  std::shared_ptr<CudaDevice> device, std::size_t threads)
        : bundle_(std::move(bundle)), manifest_(set.run_by(manifest)), set_(std::move(set)),
          device_(std::move(device)), threads_(threads) {
        device_->make_current();
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_)
            refuse("expected TensorRT to start on cuda:", device_->ordinal(),
                   ", but it says: ", logger_.last(), "; update the NVIDIA driver");
        if (set_.version_compatible)
            runtime_->setEngineHostCodeAllowed(true);
    }

    ~LoadedEngines() override {
        try {
            device_->make_current();
        } catch (const Failure&) { // a GPU that is lost has no memory to give back
        }
    }

    Memory memory(const RunOptions& options) override {
        return {CudaDevice::open(device_->ordinal(), options.cuda_stream), threads_};
    }

    std::unique_ptr<Graphs> graphs(Memory& memory, const RunOptions& options) override;

    const Manifest& manifest() const override { return manifest_; }
    const EngineSet& set() const { return set_; }
    std::string last_error() { return logger_.last(); }

    // A context of an engine, which is loaded first if it is not. The device must be current.
    Execution make_context(const Engine& engine) {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::unique_ptr<nvinfer1::ICudaEngine>& loaded = engines_[engine.file];
        if (!loaded) {
            const std::vector<char> blob =
                read_file(engine_folder(bundle_, set_.name) / engine.file, engine.bytes);
            loaded.reset(runtime_->deserializeCudaEngine(blob.data(), blob.size()));
        }
        Execution execution;
        if (loaded)
            execution.reset(loaded->createExecutionContext(
                nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (!execution)
            refuse_engine(engine);
        return execution;
    }

    bool is_loaded(const Engine& engine) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = engines_.find(engine.file);
        return found != engines_.end() && found->second != nullptr;
    }

    [[noreturn]] void refuse_engine(const Engine& engine) {
        refuse("expected ", engine.file, " to run on cuda:", device_->ordinal(),
               ", but TensorRT says: ", logger_.last(),
               "; build it again: ", set_.build_command(bundle_));
    }

private:
    std::filesystem::path bundle_;
    Manifest manifest_; // as the set runs it
    EngineSet set_;
    std::shared_ptr<CudaDevice> device_; // keeps the GPU's context, which decoders use too
    std::size_t threads_;
    Logger logger_; // outlives what logs to it
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::map<std::string, std::unique_ptr<nvinfer1::ICudaEngine>> engines_;
    std::mutex mutex_; // of the engines
};

// The engines with a decoder's own contexts.
class TensorRtGraphs : public Graphs {
public:
    TensorRtGraphs(LoadedEngines& loaded, Memory& memory, const RunOptions& options)
        : loaded_(loaded), manifest_(loaded.manifest()), set_(loaded.set()), memory_(memory),
          log_(options.log), cuda_graphs_(options.cuda_graphs) {}

    ~TensorRtGraphs() override {
        try {
            memory_.synchronize();
        } catch (const Failure&) { // a GPU that is lost has nothing left to wait for
        }
    }

    bool whole_batches() const override { return false; }

    const Bucket& bucket_for(std::uint64_t tokens) const override {
        const auto* smallest = smallest_bucket(set_.buckets, tokens);
        if (smallest == nullptr)
            refuse("expected an image of at most ", manifest_.megapixels(most_tokens(set_.buckets)),
                   ", as these engines were built for, but got ", manifest_.megapixels(tokens),
                   "; build a larger bucket with pid-build --buckets, or decode a smaller latent");
        return smallest->second;
    }

    void prepare(const std::vector<PlannedCall>& calls, std::uint64_t needed_bytes,
                 std::uint64_t batch) override {
        std::vector<EngineUse> uses;
        for (const PlannedCall& call : calls)
            uses.push_back(engine_for(set_, call.graph, call.sizes));
        check_memory(uses, needed_bytes, batch);
        for (const EngineUse& use : uses)
            context_for(use);
        fit_scratch();
    }

    Call bind(const std::string& graph, const Bindings& tensors, const Scratch& scratch) override {
        const Graph& described = manifest_.graphs.at(graph);
        Context* context = &context_for(engine_for(set_, graph, sizes_of(described, tensors)));
        if (scratch.address == nullptr || context->scratch_bytes > as_signed(scratch.bytes))
            context->planned = false;
        fit_scratch();
        std::vector<std::pair<std::string, nvinfer1::Dims>> shapes;
        for (const auto& [name, port] : described.inputs)
            shapes.emplace_back(name, dims_of(tensors.at(name).shape));
        std::vector<std::pair<std::string, std::byte*>> addresses;
        for (const auto& [name, tensor] : tensors)
            addresses.emplace_back(name, tensor.address);
        return [this, graph, context, planned = scratch.address, shapes, addresses] {
            nvinfer1::IExecutionContext& execution = *context->execution;
            execution.setDeviceMemoryV2(context->planned ? planned : scratch_.get(),
                                        context->scratch_bytes);
            bool done = true;
            for (const auto& [name, dims] : shapes)
                done = done && execution.setInputShape(name.c_str(), dims);
            for (const auto& [name, address] : addresses)
                done = done && execution.setTensorAddress(name.c_str(), address);
            if (!done ||
                !execution.enqueueV3(static_cast<cudaStream_t>(memory_.device()->stream())))
                throw Failure(PID_ERROR_BACKEND, "the engine of graph '" + graph +
                                                     "' failed: " + loaded_.last_error());
        };
    }

    Call sequence(std::vector<Call> calls) override {
        // Shared, as a std::function is copied.
        struct Recording {
            Call one_by_one;
            Call replay;
            bool has_run = false;
            const std::byte* scratch = nullptr;
        };
        const auto recording = std::make_shared<Recording>();
        recording->one_by_one = Graphs::sequence(std::move(calls));
        return [this, recording] {
            if (recording->scratch != scratch_.get())
                recording->replay = nullptr; // it would work in memory that was given back
            if (!recording->replay && recording->has_run && cuda_graphs_) {
                try {
                    recording->replay = memory_.device()->capture(recording->one_by_one);
                } catch (const Failure& failure) {
                    if (failure.status() == PID_ERROR_CANCELLED)
                        throw;
                    cuda_graphs_ = false;
                    note(log_, "Running without CUDA graphs: ", failure.what());
                }
            }
            recording->scratch = scratch_.get();
            (recording->replay ? recording->replay : recording->one_by_one)();
            recording->has_run = true;
        };
    }

private:
    struct Context {
        Execution execution;
        std::int64_t scratch_bytes;
        // Whether the arena has place for its scratch; else it works in the decoder's own block.
        bool planned;
    };

    static std::int64_t as_signed(std::uint64_t bytes) { return static_cast<std::int64_t>(bytes); }

    // What the symbols of a graph's ports stand for in a call.
    static Sizes sizes_of(const Graph& graph, const Bindings& tensors) {
        Sizes sizes;
        for (const auto* ports : {&graph.inputs, &graph.outputs})
            for (const auto& [name, port] : *ports)
                for (std::size_t axis = 0; axis < port.shape.size(); ++axis)
                    if (const auto* symbol = std::get_if<std::string>(&port.shape[axis]))
                        sizes.set(*symbol,
                                  static_cast<std::uint64_t>(tensors.at(name).shape[axis]));
        return sizes;
    }

    // Refuse unless what a shape needs is free, by what the builder said.
    void check_memory(const std::vector<EngineUse>& uses, std::uint64_t needed_bytes,
                      std::uint64_t batch) const {
        std::map<std::string, std::uint64_t> missing, loaded; // weights by file
        for (const EngineUse& use : uses)
            if (!loaded_.is_loaded(*use.engine))
                missing[use.engine->file] = use.engine->weights_bytes;
        std::uint64_t needed = needed_bytes;
        for (const auto& [file, bytes] : missing)
            needed = sum(needed, bytes);
        const std::uint64_t free = memory_.device()->free_bytes();
        if (needed <= free)
            return;
        for (const auto& [graph, engines] : set_.graphs)
            for (const Engine& engine : engines)
                if (loaded_.is_loaded(engine))
                    loaded[engine.file] = engine.weights_bytes;
        std::uint64_t available = free;
        for (const auto& [file, bytes] : loaded)
            available = sum(available, bytes);
        const std::pair<const std::string, EngineBucket>* fitting = nullptr;
        for (const auto& each : set_.buckets)
            if (each.second.peak_device_bytes <= available &&
                (fitting == nullptr || each.second.max_tokens >= fitting->second.max_tokens))
                fitting = &each;
        std::string advice = "free memory on the GPU";
        if (fitting != nullptr)
            advice = text_of("decode ", batch > 1 ? "one image at a time, " : "", "at most ",
                             manifest_.megapixels(fitting->second.max_tokens), ": bucket ",
                             fitting->first, " takes ",
                             gigabytes(fitting->second.peak_device_bytes), " in all");
        throw Failure(PID_ERROR_MEMORY, text_of("expected ", gigabytes(needed),
                                                " of free device memory for this shape, but got ",
                                                gigabytes(free), "; ", advice));
    }

    // The context of a profile, made when first needed.
    Context& context_for(const EngineUse& use) {
        const auto key = std::make_pair(use.engine->file, use.profile);
        const auto found = contexts_.find(key);
        if (found != contexts_.end())
            return found->second;
        memory_.device()->make_current();
        Context context;
        context.execution = loaded_.make_context(*use.engine);
        const auto stream = static_cast<cudaStream_t>(memory_.device()->stream());
        if (!context.execution->setOptimizationProfileAsync(use.profile, stream))
            loaded_.refuse_engine(*use.engine);
        context.scratch_bytes =
            context.execution->getEngine().getDeviceMemorySizeForProfileV2(use.profile);
        const std::uint64_t planned =
            use.engine->scratch_bytes.at(static_cast<std::size_t>(use.profile));
        context.planned = context.scratch_bytes <= as_signed(planned);
        if (!context.planned)
            note(log_, use.engine->file, " needs ",
                 gigabytes(static_cast<std::uint64_t>(context.scratch_bytes)), " of scratch, ",
                 gigabytes(planned), " were planned: it gets a block of its own");
        return contexts_.emplace(key, std::move(context)).first->second;
    }

    // Make the decoder's block large enough for every context that works in it.
    void fit_scratch() {
        std::int64_t needed = 0;
        for (const auto& [key, context] : contexts_)
            if (!context.planned)
                needed = std::max(needed, context.scratch_bytes);
        if (needed <= scratch_bytes_)
            return;
        memory_.synchronize();
        scratch_.reset(); // give the old one back before asking for the new one
        scratch_bytes_ = 0;
        try {
            scratch_ = memory_.allocate(static_cast<std::size_t>(needed));
        } catch (const Shortage& shortage) {
            throw Failure(PID_ERROR_MEMORY,
                          text_of("expected ", gigabytes(static_cast<std::uint64_t>(needed)),
                                  " of device memory for the engines' scratch, but got ",
                                  shortage.what(),
                                  "; decode a smaller shape, or free memory on the GPU"));
        }
        scratch_bytes_ = needed;
    }

    LoadedEngines& loaded_;
    const Manifest& manifest_;
    const EngineSet& set_;
    Memory& memory_;
    Log log_;
    bool cuda_graphs_;
    Allocation scratch_;
    std::int64_t scratch_bytes_ = 0;
    std::map<std::pair<std::string, int>, Context> contexts_;
};

std::unique_ptr<Graphs> LoadedEngines::graphs(Memory& memory, const RunOptions& options) {
    return std::make_unique<TensorRtGraphs>(*this, memory, options);
}

} // namespace

std::unique_ptr<LoadedGraphs> load_tensorrt(const std::filesystem::path& bundle,
                                            const Manifest& manifest,
                                            const BackendOptions& options) {
    const auto [name, ordinal] = parse_device(options.device.empty() ? "cuda" : options.device);
    if (name != "cuda")
        refuse("expected a device cuda or cuda:N for the tensorrt backend, but got ",
               shown(options.device));
    if (options.backend != "tensorrt" && options.backend != PID_TENSORRT_FLAVOR)
        refuse("expected a library built with TensorRT for RTX for the tensorrt-rtx backend, but "
               "this one was built with TensorRT; use the tensorrt backend, or build it again");
    if (manifest.engines.empty())
        refuse("expected engines in ", bundle.string(), ", but it has none; ",
               std::set<std::string>{"fp32", "fp8-fp32", "int8-fp32"}.count(manifest.precision) != 0
                   ? "export it again with --precision bf16, and "
                   : "",
               "build them: pid-build ", bundle.string(), " --target current");
    std::shared_ptr<CudaDevice> device = CudaDevice::open(ordinal, nullptr);
    EngineSet set = choose_engines(bundle, manifest, options.engine_set, PID_TENSORRT_FLAVOR,
                                   library_version(), device->architecture(), options.verify);
    note(options.log, "Engines ", set.name, " by ", set.flavor, " ", set.version,
         " on cuda:", ordinal, " (", device->architecture(), ")");
    return std::make_unique<LoadedEngines>(bundle, manifest, std::move(set), std::move(device),
                                           options.threads);
}

} // namespace pid::core
