// The C API over the classes of this library: every exception becomes a status.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <filesystem>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "backends/backends.h"
#include "backends/device.h"
#include "decoder.h"
#include "errors.h"
#include "parallel.h"
#include "pid/pid_runtime.h"
#include "request.h"

using namespace pid::core;

struct pid_array {
    Allocation memory;
    pid_tensor view;
};

struct pid_bundle {
    std::shared_ptr<const Bundle> shared; // with its decoders
};

struct pid_decoder {
    pid_decoder(std::shared_ptr<const Bundle> bundle, RunOptions options)
        : decoder(std::move(bundle), std::move(options)) {}

    Decoder decoder;
    std::atomic<bool> busy{false};
    std::atomic<std::thread::id> user{}; // the thread of the call that runs
    Plan plan{};                         // the last one, whose strings the caller has borrowed
};

namespace {

constexpr int most_threads = 4096;

pid_status failed(pid_status status, const char* message) noexcept {
    try {
        set_last_error(message);
    } catch (...) { // no memory for a string: the message of the last failure stays
    }
    return status;
}

// Call a function, and turn what it throws into a status.
template <typename Function>
pid_status guarded(Function function) noexcept {
    try {
        function();
        return PID_OK;
    } catch (const Failure& failure) {
        return failed(failure.status(), failure.what());
    } catch (const std::bad_alloc&) {
        return failed(PID_ERROR_MEMORY, "expected more memory, but there is none left; decode a "
                                        "smaller shape or batch");
    } catch (const std::exception& error) {
        return failed(PID_ERROR_INTERNAL, error.what());
    } catch (...) {
        return failed(PID_ERROR_INTERNAL, "an exception of an unknown kind");
    }
}

void require_given(const void* argument, const char* name) {
    if (argument == nullptr)
        refuse("expected an argument ", name, ", but got NULL");
}

// A structure of the caller's, who may have been compiled with an older and shorter one.
template <typename Params>
Params own_copy(const Params* given, Params params, const char* name) {
    if (given == nullptr)
        return params;
    if (given->struct_bytes < sizeof(std::size_t) || given->struct_bytes > sizeof(Params))
        refuse("expected ", name, " from its function of defaults, but got ", given->struct_bytes,
               " bytes instead of ", sizeof(Params), "; or update the library");
    std::memcpy(&params, given, given->struct_bytes);
    params.struct_bytes = sizeof(Params);
    return params;
}

// Holds a decoder for one call.
class Use {
public:
    explicit Use(pid_decoder& decoder) : decoder_(decoder) {
        if (decoder_.busy.exchange(true))
            throw Failure(PID_ERROR_BUSY, "expected one call at a time, but another one uses this "
                                          "decoder; open one per thread");
        decoder_.user = std::this_thread::get_id();
    }
    ~Use() {
        decoder_.user = std::thread::id();
        decoder_.busy = false;
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

private:
    pid_decoder& decoder_;
};

std::string text_or_empty(const char* text) {
    return text == nullptr ? "" : text;
}

// Both callbacks as one.
Log log_of(const pid_decoder_params& params) {
    if (params.warning == nullptr && params.log == nullptr)
        return nullptr;
    return
        [warning = params.warning, warning_user_data = params.warning_user_data, log = params.log,
         log_user_data = params.log_user_data](pid_log_level level, const std::string& line) {
            if (warning != nullptr && level == PID_LOG_WARNING)
                warning(line.c_str(), warning_user_data);
            if (log != nullptr)
                log(level, line.c_str(), log_user_data);
        };
}

BackendOptions backend_options(const pid_decoder_params& params) {
    if (params.threads < 0 || params.threads > most_threads)
        refuse("expected from 1 to ", most_threads, " threads, or 0 for all, but got ",
               params.threads);
    BackendOptions options;
    options.backend = params.backend == nullptr ? "onnxruntime" : params.backend;
    options.device = text_or_empty(params.device);
    options.provider_library = text_or_empty(params.provider_library);
    options.engine_set = text_or_empty(params.engine_set);
    options.threads = params.threads == 0 ? core_count() : static_cast<std::size_t>(params.threads);
    options.verify = params.verify != 0;
    options.cuda_stream = params.cuda_stream;
    options.log = log_of(params);
    return options;
}

RunOptions run_options(const pid_decoder_params& params) {
    RunOptions options;
    options.cuda_stream = params.cuda_stream;
    options.cuda_graphs = params.cuda_graphs != 0;
    options.log = log_of(params);
    return options;
}

pid_tensor view_of(const void* data, pid_dtype dtype, pid_memory memory, const Shape& shape) {
    pid_tensor view{};
    view.data = data;
    view.dtype = dtype;
    view.memory = memory;
    view.rank = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), view.shape);
    return view;
}

Allocation allocate_result(Memory& own, pid_memory memory, std::size_t bytes) {
    if (memory == PID_CUDA)
        return own.allocate(bytes);
    return Allocation(new std::byte[bytes], std::default_delete<std::byte[]>());
}

void check_output_memory(const Memory& own, pid_memory memory) {
    if (memory != PID_HOST && memory != PID_CUDA)
        refuse("expected output_memory PID_HOST or PID_CUDA, but got ", static_cast<int>(memory));
    if (memory == PID_CUDA && !own.device())
        refuse("expected output_memory PID_HOST, since this decoder runs on the CPU, but got "
               "PID_CUDA; open it with a GPU");
}

// A checked request and the images it makes.
struct Work {
    pid_decode_params params;
    Request request;
    Shape shape;
    std::size_t bytes;
};

Work prepare(const pid_decoder& decoder, const pid_decode_params* given) {
    require_given(given, "params");
    const pid_decode_params params =
        own_copy(given, pid_decode_default_params(), "pid_decode_params");
    const Memory& memory = decoder.decoder.memory();
    check_output_memory(memory, params.output_memory);
    Request request = check_request(decoder.decoder.manifest(), params, memory.device() != nullptr);
    Shape shape = Decoder::image_shape(request.sizes, params.output);
    const std::size_t bytes = count_of(shape) * pid_dtype_bytes(params.output);
    return {params, std::move(request), std::move(shape), bytes};
}

void decode_into(pid_decoder& decoder, Work& work, void* data) {
    const pid_decode_params& params = work.params;
    Progress progress;
    if (params.progress != nullptr)
        progress = [&](std::int32_t done, std::int32_t calls) {
            return params.progress(done, calls, params.progress_user_data) == 0;
        };
    decoder.decoder.cancelled() = false;
    decoder.decoder.decode(std::move(work.request), params.output, {data, params.output_memory},
                           progress, params.timed != 0);
}

} // namespace

const char* pid_last_error(void) {
    return last_error();
}

const char* pid_status_name(pid_status status) {
    switch (status) {
    case PID_OK:
        return "PID_OK";
    case PID_ERROR_INPUT:
        return "PID_ERROR_INPUT";
    case PID_ERROR_MEMORY:
        return "PID_ERROR_MEMORY";
    case PID_ERROR_CANCELLED:
        return "PID_ERROR_CANCELLED";
    case PID_ERROR_BUSY:
        return "PID_ERROR_BUSY";
    case PID_ERROR_BACKEND:
        return "PID_ERROR_BACKEND";
    case PID_ERROR_INTERNAL:
        return "PID_ERROR_INTERNAL";
    }
    return "an unknown status";
}

const char* pid_runtime_version(void) {
    return PID_VERSION;
}

const char* pid_runtime_backends(void) {
    return backend_names();
}

pid_tensor pid_host_tensor(const void* data, pid_dtype dtype, int32_t rank, const int64_t* shape) {
    pid_tensor tensor{};
    tensor.data = data;
    tensor.dtype = dtype;
    tensor.memory = PID_HOST;
    tensor.rank = rank; // one out of range is refused where the tensor is used
    for (int32_t axis = 0; axis < rank && axis < PID_MAX_RANK; ++axis)
        tensor.shape[axis] = shape[axis];
    return tensor;
}

pid_tensor pid_cuda_tensor(const void* data, pid_dtype dtype, int32_t rank, const int64_t* shape) {
    pid_tensor tensor = pid_host_tensor(data, dtype, rank, shape);
    tensor.memory = PID_CUDA;
    return tensor;
}

size_t pid_dtype_bytes(pid_dtype dtype) {
    switch (dtype) {
    case PID_FLOAT32:
        return 4;
    case PID_FLOAT16:
    case PID_BFLOAT16:
        return 2;
    case PID_FLOAT64:
        return 8;
    case PID_UINT8:
        return 1;
    }
    return 0;
}

pid_tensor pid_array_tensor(const pid_array* array) {
    return array == nullptr ? pid_tensor{} : array->view;
}

void pid_array_free(pid_array* array) {
    delete array;
}

pid_decoder_params pid_decoder_default_params(void) {
    pid_decoder_params params{};
    params.struct_bytes = sizeof params;
    params.verify = 1;
    params.cuda_graphs = 1;
    return params;
}

pid_decode_params pid_decode_default_params(void) {
    pid_decode_params params{};
    params.struct_bytes = sizeof params;
    params.rule = PID_DEFAULT_RULE;
    params.overlap = -1;
    return params;
}

pid_status pid_bundle_open(const char* bundle_path, const pid_decoder_params* params,
                           pid_bundle** bundle) {
    return guarded([&] {
        require_given(bundle_path, "bundle_path");
        require_given(bundle, "bundle");
        const pid_decoder_params own =
            own_copy(params, pid_decoder_default_params(), "pid_decoder_params");
        *bundle = new pid_bundle{std::make_shared<Bundle>(bundle_path, backend_options(own))};
    });
}

void pid_bundle_close(pid_bundle* bundle) {
    delete bundle;
}

pid_status pid_decoder_create(const pid_bundle* bundle, const pid_decoder_params* params,
                              pid_decoder** decoder) {
    return guarded([&] {
        require_given(bundle, "bundle");
        require_given(decoder, "decoder");
        const pid_decoder_params own =
            own_copy(params, pid_decoder_default_params(), "pid_decoder_params");
        *decoder = new pid_decoder(bundle->shared, run_options(own));
    });
}

pid_status pid_decoder_open(const char* bundle_path, const pid_decoder_params* params,
                            pid_decoder** decoder) {
    return guarded([&] {
        require_given(bundle_path, "bundle_path");
        require_given(decoder, "decoder");
        const pid_decoder_params own =
            own_copy(params, pid_decoder_default_params(), "pid_decoder_params");
        *decoder = new pid_decoder(std::make_shared<Bundle>(bundle_path, backend_options(own)),
                                   run_options(own));
    });
}

void pid_decoder_close(pid_decoder* decoder) {
    delete decoder;
}

pid_status pid_decoder_get_info(const pid_decoder* decoder, pid_decoder_info* info) {
    return guarded([&] {
        require_given(decoder, "decoder");
        require_given(info, "info");
        if (info->struct_bytes < sizeof(std::size_t))
            refuse("expected info->struct_bytes to be the size of pid_decoder_info, but got ",
                   info->struct_bytes);
        const Manifest& manifest = decoder->decoder.manifest();
        const Network& network = manifest.network;
        pid_decoder_info own{};
        own.struct_bytes = info->struct_bytes;
        own.name = manifest.model.name.c_str();
        own.producer = manifest.producer.c_str();
        own.latent_convention = manifest.model.latent_convention.c_str();
        own.precision = manifest.precision.c_str();
        own.latent_channels = static_cast<std::int64_t>(network.latent_channels);
        own.pixels_per_latent = static_cast<std::int64_t>(network.pixels_per_latent());
        own.text_dim = static_cast<std::int64_t>(network.text_dim);
        own.text_max_length = static_cast<std::int64_t>(network.text_max_length);
        own.max_image_pixels = static_cast<std::int64_t>(product(
            most_tokens(manifest.buckets), product(network.patch_size, network.patch_size)));
        own.default_steps = static_cast<std::int32_t>(manifest.sampler.steps);
        own.max_steps = static_cast<std::int32_t>(manifest.sampler.max_steps);
        const bool any_times = manifest.sampler.times.empty();
        own.takes_times = any_times ? 1 : 0;
        own.takes_steps = !any_times || manifest.sampler.flow_shift ? 1 : 0;
        own.default_rule = default_rule(manifest.sampler);
        own.default_guidance = manifest.sampler.guidance;
        std::memcpy(info, &own, std::min(info->struct_bytes, sizeof own));
    });
}

const char* pid_decoder_model_json(const pid_decoder* decoder) {
    return decoder == nullptr ? "" : decoder->decoder.manifest().model.json.c_str();
}

void* pid_decoder_cuda_stream(const pid_decoder* decoder) {
    if (decoder == nullptr || !decoder->decoder.memory().device())
        return nullptr;
    return decoder->decoder.memory().device()->stream();
}

pid_status pid_decoder_decode(pid_decoder* decoder, const pid_decode_params* params,
                              pid_array** image) {
    return guarded([&] {
        require_given(decoder, "decoder");
        require_given(image, "image");
        const Use use(*decoder);
        Work work = prepare(*decoder, params);
        const pid_memory memory = work.params.output_memory;
        auto result = std::make_unique<pid_array>();
        result->memory = allocate_result(decoder->decoder.memory(), memory, work.bytes);
        result->view = view_of(result->memory.get(), work.params.output, memory, work.shape);
        decode_into(*decoder, work, result->memory.get());
        *image = result.release();
    });
}

pid_status pid_decoder_decode_into(pid_decoder* decoder, const pid_decode_params* params,
                                   void* data, size_t data_bytes) {
    return guarded([&] {
        require_given(decoder, "decoder");
        require_given(data, "data");
        const Use use(*decoder);
        Work work = prepare(*decoder, params);
        if (data_bytes != work.bytes)
            refuse("expected data of ", work.bytes, " bytes for images ", text_of_shape(work.shape),
                   ", but got ", data_bytes);
        decode_into(*decoder, work, data);
    });
}

pid_status pid_decoder_output_shape(const pid_decoder* decoder, const pid_decode_params* params,
                                    int64_t* shape) {
    return guarded([&] {
        require_given(decoder, "decoder");
        require_given(params, "params");
        require_given(shape, "shape");
        const pid_decode_params own =
            own_copy(params, pid_decode_default_params(), "pid_decode_params");
        const Shape images =
            Decoder::image_shape(check_sizes(decoder->decoder.manifest(), own), own.output);
        std::copy(images.begin(), images.end(), shape);
    });
}

pid_status pid_decoder_plan(pid_decoder* decoder, int64_t height, int64_t width, int64_t batch,
                            const pid_decode_params* params, pid_plan* plan) {
    return guarded([&] {
        require_given(decoder, "decoder");
        require_given(plan, "plan");
        if (plan->struct_bytes < sizeof(std::size_t))
            refuse("expected plan->struct_bytes to be the size of pid_plan, but got ",
                   plan->struct_bytes);
        const pid_decode_params own =
            own_copy(params, pid_decode_default_params(), "pid_decode_params");
        const Use use(*decoder);
        Plan& made = decoder->plan;
        made = decoder->decoder.plan(height, width, batch, own);
        pid_plan result{};
        result.struct_bytes = plan->struct_bytes;
        result.width = static_cast<std::int64_t>(made.width);
        result.height = static_cast<std::int64_t>(made.height);
        result.bucket = made.bucket.c_str();
        result.steps = static_cast<std::int32_t>(made.steps);
        result.branches = static_cast<std::int32_t>(made.branches);
        result.tiles = static_cast<std::int64_t>(made.tiles);
        result.tile_width = static_cast<std::int64_t>(made.tile_width);
        result.tile_height = static_cast<std::int64_t>(made.tile_height);
        result.calls = made.calls;
        result.tflop = made.tflop;
        result.device_bytes = static_cast<std::int64_t>(made.device_bytes);
        result.host_bytes = static_cast<std::int64_t>(made.host_bytes);
        result.reason = made.reason ? made.reason->c_str() : nullptr;
        result.text = made.text.c_str();
        std::memcpy(plan, &result, std::min(plan->struct_bytes, sizeof result));
    });
}

pid_status pid_decoder_read_state(pid_decoder* decoder, pid_array** state) {
    return guarded([&] {
        require_given(decoder, "decoder");
        require_given(state, "state");
        std::optional<Use> use; // not from within a progress callback, where a call runs already
        if (decoder->user.load() != std::this_thread::get_id())
            use.emplace(*decoder);
        const Shape shape = decoder->decoder.state_shape();
        auto result = std::make_unique<pid_array>();
        result->memory =
            allocate_result(decoder->decoder.memory(), PID_HOST, count_of(shape) * sizeof(float));
        result->view = view_of(result->memory.get(), PID_FLOAT32, PID_HOST, shape);
        decoder->decoder.read_state(reinterpret_cast<float*>(result->memory.get()));
        *state = result.release();
    });
}

pid_status pid_decoder_get_timings(pid_decoder* decoder, pid_timings* timings) {
    return guarded([&] {
        require_given(decoder, "decoder");
        require_given(timings, "timings");
        if (timings->struct_bytes < sizeof(std::size_t))
            refuse("expected timings->struct_bytes to be the size of pid_timings, but got ",
                   timings->struct_bytes);
        const Use use(*decoder);
        pid_timings own = decoder->decoder.timings();
        own.struct_bytes = timings->struct_bytes;
        std::memcpy(timings, &own, std::min(timings->struct_bytes, sizeof own));
    });
}

void pid_decoder_cancel(pid_decoder* decoder) {
    if (decoder != nullptr)
        decoder->decoder.cancelled() = true;
}
