// pid_runtime.hpp: the C API of pid_runtime.h as C++17: values that give back what they own, and
// exceptions. Header only. Everything said there about memory and threads holds here.
//
//     #include <pid/pid_runtime.hpp>
//
//     pid::Decoder decoder("flux-2k");
//     pid::DecodeRequest request;
//     request.latent = pid::host_tensor(latent, {1, 16, 64, 64});      // const float *
//     request.caption = pid::host_tensor(caption, {1, 300, 2304});
//     request.output = PID_UINT8;
//     pid::Array image = decoder.decode(request);                       // uint8 [1, H, W, 3]
//     write_png(image.data<std::uint8_t>(), image.size(1), image.size(2));
#ifndef PID_RUNTIME_HPP
#define PID_RUNTIME_HPP

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pid_runtime.h"

namespace pid {

// A call that failed. what() is the line of pid_last_error().
class Error : public std::runtime_error {
public:
    Error(pid_status status, const std::string& message)
        : std::runtime_error(message), status_(status) {}

    pid_status status() const noexcept { return status_; }

private:
    pid_status status_;
};

// Throw Error unless `status` is PID_OK.
inline void check(pid_status status) {
    if (status != PID_OK)
        throw Error(status, pid_last_error());
}

namespace detail {

inline pid_tensor make_tensor(const void* data, pid_dtype dtype, pid_memory memory,
                              std::initializer_list<std::int64_t> shape) {
    if (shape.size() > PID_MAX_RANK)
        throw Error(PID_ERROR_INPUT, "expected a tensor of at most 4 axes, but got more");
    const auto rank = static_cast<std::int32_t>(shape.size());
    return memory == PID_HOST ? pid_host_tensor(data, dtype, rank, shape.begin())
                              : pid_cuda_tensor(data, dtype, rank, shape.begin());
}

} // namespace detail

// Views of float32 memory, borrowed; for other types use pid_host_tensor() and pid_cuda_tensor().
inline pid_tensor host_tensor(const float* data, std::initializer_list<std::int64_t> shape) {
    return detail::make_tensor(data, PID_FLOAT32, PID_HOST, shape);
}

inline pid_tensor cuda_tensor(const float* data, std::initializer_list<std::int64_t> shape) {
    return detail::make_tensor(data, PID_FLOAT32, PID_CUDA, shape);
}

// A result that owns its memory.
class Array {
public:
    // Takes ownership.
    explicit Array(pid_array* array) noexcept : array_(array) {}

    pid_tensor tensor() const noexcept { return pid_array_tensor(array_.get()); }
    std::int32_t rank() const noexcept { return tensor().rank; }
    // Of an axis from 0 to rank() - 1.
    std::int64_t size(int axis) const { return tensor().shape[axis]; }
    std::vector<std::int64_t> shape() const {
        const pid_tensor view = tensor();
        return std::vector<std::int64_t>(view.shape, view.shape + view.rank);
    }
    // Number of values.
    std::size_t count() const {
        std::size_t values = 1;
        for (const std::int64_t size : shape())
            values *= static_cast<std::size_t>(size);
        return values;
    }
    // The values as float or std::uint8_t, whichever they are.
    template <typename Value>
    const Value* data() const noexcept {
        return static_cast<const Value*>(tensor().data);
    }

private:
    struct Free {
        void operator()(pid_array* array) const noexcept { pid_array_free(array); }
    };
    std::unique_ptr<pid_array, Free> array_;
};

// See pid_decoder_params, member by member.
struct DecoderOptions {
    std::string backend;          // "": onnxruntime
    std::string device;           // "": cpu, or cuda:0 for tensorrt
    std::string provider_library; // "": none
    std::string engine_set;       // "": the first that fits
    int threads = 0;
    bool verify = true;
    void* cuda_stream = nullptr;
    std::function<void(const std::string&)> warning;
    bool cuda_graphs = true;
    std::function<void(pid_log_level, const std::string&)> log;
};

// See pid_decode_params, member by member.
struct DecodeRequest {
    pid_tensor latent{};
    pid_tensor caption{};
    std::vector<float> sigma;
    std::vector<std::uint64_t> seeds;
    pid_tensor noise{};
    std::vector<pid_tensor> step_noise;
    int steps = 0;
    pid_rule rule = PID_DEFAULT_RULE;
    std::vector<double> times;
    pid_dtype output = PID_FLOAT32;
    pid_memory output_memory = PID_HOST;
    // Called with (calls of the network done, calls), see pid_progress_callback; return false to
    // stop, which decode() throws as PID_ERROR_CANCELLED. What it throws comes out of decode().
    std::function<bool(int, int)> progress;
    bool timed = false;
    pid_tensor negative{};
    double guidance = 0; // 0: the bundle's
    // 0, 0: no tiles; PID_TILE_AUTO, PID_TILE_AUTO: where it has to be
    std::int64_t tile_width = 0;
    std::int64_t tile_height = 0;
    std::int64_t overlap = -1; // -1: 8 pixels of the latent
};

namespace detail {

// What a pid_decoder_params borrows from options: its callbacks must stay where they are.
struct Callbacks {
    std::function<void(const std::string&)> warning;
    std::function<void(pid_log_level, const std::string&)> log;

    static void warn(const char* message, void* user_data) noexcept {
        try {
            static_cast<const Callbacks*>(user_data)->warning(message);
        } catch (...) { // a line that cannot be delivered must not stop a decode
        }
    }

    static void tell(pid_log_level level, const char* message, void* user_data) noexcept {
        try {
            static_cast<const Callbacks*>(user_data)->log(level, message);
        } catch (...) {
        }
    }
};

inline const char* text(const std::string& value) {
    return value.empty() ? nullptr : value.c_str();
}

inline pid_decoder_params make_params(const DecoderOptions& options, Callbacks& callbacks) {
    pid_decoder_params params = pid_decoder_default_params();
    params.backend = text(options.backend);
    params.device = text(options.device);
    params.provider_library = text(options.provider_library);
    params.engine_set = text(options.engine_set);
    params.threads = options.threads;
    params.verify = options.verify ? 1 : 0;
    params.cuda_stream = options.cuda_stream;
    params.cuda_graphs = options.cuda_graphs ? 1 : 0;
    callbacks = {options.warning, options.log};
    if (callbacks.warning) {
        params.warning = Callbacks::warn;
        params.warning_user_data = &callbacks;
    }
    if (callbacks.log) {
        params.log = Callbacks::tell;
        params.log_user_data = &callbacks;
    }
    return params;
}

} // namespace detail

// A bundle, opened on one backend, for decoders to share. Serves any number of threads, and may go
// before its decoders.
class Bundle {
public:
    explicit Bundle(const std::string& path, const DecoderOptions& options = {}) {
        detail::Callbacks callbacks; // told of opening alone
        const pid_decoder_params params = detail::make_params(options, callbacks);
        pid_bundle* bundle = nullptr;
        check(pid_bundle_open(path.c_str(), &params, &bundle));
        bundle_.reset(bundle);
    }

    // The handle, borrowed.
    pid_bundle* get() const noexcept { return bundle_.get(); }

private:
    struct Close {
        void operator()(pid_bundle* bundle) const noexcept { pid_bundle_close(bundle); }
    };
    std::unique_ptr<pid_bundle, Close> bundle_;
};

// Decodes with a bundle. Serves one thread at a time.
class Decoder {
public:
    // Of a bundle of its own.
    explicit Decoder(const std::string& bundle_path, const DecoderOptions& options = {}) {
        const pid_decoder_params params = detail::make_params(options, *callbacks_);
        pid_decoder* decoder = nullptr;
        check(pid_decoder_open(bundle_path.c_str(), &params, &decoder));
        decoder_.reset(decoder);
    }

    // Of a bundle it shares; of the options only those of a decoder count, see pid_decoder_params.
    explicit Decoder(const Bundle& bundle, const DecoderOptions& options = {}) {
        const pid_decoder_params params = detail::make_params(options, *callbacks_);
        pid_decoder* decoder = nullptr;
        check(pid_decoder_create(bundle.get(), &params, &decoder));
        decoder_.reset(decoder);
    }

    // Decode latents to images. Throws Error; nothing runs for a request that is refused.
    Array decode(const DecodeRequest& request) {
        pid_array* image = nullptr;
        run(request, [&](const pid_decode_params& params) {
            return pid_decoder_decode(decoder_.get(), &params, &image);
        });
        return Array(image);
    }

    // The same into memory of the caller, see pid_decoder_decode_into().
    void decode_into(const DecodeRequest& request, void* data, std::size_t data_bytes) {
        run(request, [&](const pid_decode_params& params) {
            return pid_decoder_decode_into(decoder_.get(), &params, data, data_bytes);
        });
    }

    // Shape of the images decode() would make.
    std::vector<std::int64_t> output_shape(const DecodeRequest& request) const {
        pid_decode_params params = pid_decode_default_params();
        params.latent = request.latent;
        params.output = request.output;
        set_tiles(params, request);
        std::vector<std::int64_t> shape(4);
        check(pid_decoder_output_shape(decoder_.get(), &params, shape.data()));
        return shape;
    }

    // What a decode of `batch` latents to `height` x `width` pixels would take, see
    // pid_decoder_plan(); strings are borrowed from this decoder.
    pid_plan plan(std::int64_t height, std::int64_t width, const DecodeRequest& request = {},
                  std::int64_t batch = 1) {
        pid_decode_params params = pid_decode_default_params();
        set_sampling(params, request);
        pid_plan plan{};
        plan.struct_bytes = sizeof plan;
        check(pid_decoder_plan(decoder_.get(), height, width, batch, &params, &plan));
        return plan;
    }

    // The sampler's state after the last step, see pid_decoder_read_state().
    Array state() const {
        pid_array* state = nullptr;
        check(pid_decoder_read_state(decoder_.get(), &state));
        return Array(state);
    }

    // Where the time of the last decode went, which must have been `timed`.
    pid_timings timings() const {
        pid_timings timings{};
        timings.struct_bytes = sizeof timings;
        check(pid_decoder_get_timings(decoder_.get(), &timings));
        return timings;
    }

    // Stop a decode that runs on another thread.
    void cancel() noexcept { pid_decoder_cancel(decoder_.get()); }

    // Strings are borrowed from this decoder.
    pid_decoder_info info() const {
        pid_decoder_info info{};
        info.struct_bytes = sizeof info;
        check(pid_decoder_get_info(decoder_.get(), &info));
        return info;
    }

    void* cuda_stream() const noexcept { return pid_decoder_cuda_stream(decoder_.get()); }

    // The handle, borrowed.
    pid_decoder* get() const noexcept { return decoder_.get(); }

private:
    struct Close {
        void operator()(pid_decoder* decoder) const noexcept { pid_decoder_close(decoder); }
    };

    struct Progress {
        const std::function<bool(int, int)>* function;
        std::exception_ptr thrown;
    };

    static void set_sampling(pid_decode_params& params, const DecodeRequest& request) {
        params.steps = request.steps;
        params.rule = request.rule;
        params.times = request.times.data();
        params.time_count = request.times.size();
        params.guidance = request.guidance;
        set_tiles(params, request);
    }

    static void set_tiles(pid_decode_params& params, const DecodeRequest& request) {
        params.tile_width = request.tile_width;
        params.tile_height = request.tile_height;
        params.overlap = request.overlap;
    }

    static int step(std::int32_t done, std::int32_t calls, void* user_data) noexcept {
        auto* progress = static_cast<Progress*>(user_data);
        try {
            return (*progress->function)(done, calls) ? 0 : 1;
        } catch (...) {
            progress->thrown = std::current_exception();
            return 1;
        }
    }

    template <typename Call>
    void run(const DecodeRequest& request, Call call) {
        pid_decode_params params = pid_decode_default_params();
        params.latent = request.latent;
        params.caption = request.caption;
        params.sigma = request.sigma.data();
        params.sigma_count = request.sigma.size();
        params.seeds = request.seeds.data();
        params.seed_count = request.seeds.size();
        params.noise = request.noise;
        params.step_noise = request.step_noise.data();
        params.step_noise_count = request.step_noise.size();
        params.output = request.output;
        params.output_memory = request.output_memory;
        params.timed = request.timed ? 1 : 0;
        params.negative = request.negative;
        set_sampling(params, request);
        Progress progress{&request.progress, nullptr};
        if (request.progress) {
            params.progress = step;
            params.progress_user_data = &progress;
        }
        const pid_status status = call(params);
        if (progress.thrown)
            std::rethrow_exception(progress.thrown);
        check(status);
    }

    // At one address for the life of the decoder.
    std::unique_ptr<detail::Callbacks> callbacks_ = std::make_unique<detail::Callbacks>();
    std::unique_ptr<pid_decoder, Close> decoder_;
};

} // namespace pid

#endif
