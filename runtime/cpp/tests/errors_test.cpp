// Every status of the C API but PID_ERROR_INTERNAL, which only a bug brings about.
#include <cstring>
#include <limits>
#include <thread>

#include "golden_decode.h"

extern "C" int use_everything_from_c(const char* bundle);

namespace {

using namespace pid::test;
using pid::Decoder;
using pid::DecodeRequest;

TEST(Names, OfEveryStatus) {
    const std::vector<std::pair<pid_status, std::string>> names{
        {PID_OK, "PID_OK"},
        {PID_ERROR_INPUT, "PID_ERROR_INPUT"},
        {PID_ERROR_MEMORY, "PID_ERROR_MEMORY"},
        {PID_ERROR_CANCELLED, "PID_ERROR_CANCELLED"},
        {PID_ERROR_BUSY, "PID_ERROR_BUSY"},
        {PID_ERROR_BACKEND, "PID_ERROR_BACKEND"},
        {PID_ERROR_INTERNAL, "PID_ERROR_INTERNAL"}};
    for (const auto& [status, name] : names)
        EXPECT_EQ(pid_status_name(status), name);
    EXPECT_STRNE(pid_status_name(static_cast<pid_status>(7)), "");
    EXPECT_EQ(pid_runtime_version(), std::string(PID_VERSION));
    EXPECT_EQ(pid_dtype_bytes(99), 0U);
}

TEST(Null, IsNothingToDo) {
    pid_array_free(nullptr);
    pid_decoder_close(nullptr);
    pid_bundle_close(nullptr);
    pid_decoder_cancel(nullptr);
    EXPECT_EQ(pid_array_tensor(nullptr).data, nullptr);
    EXPECT_EQ(pid_decoder_cuda_stream(nullptr), nullptr);
    EXPECT_STREQ(pid_decoder_model_json(nullptr), "");
}

// Expects a refusal and gives its message.
std::string refused(pid_status status) {
    EXPECT_EQ(status, PID_ERROR_INPUT) << pid_status_name(status);
    expect_one_line(pid_last_error());
    return pid_last_error();
}

TEST(Null, IsRefusedWhereSomethingIsNeeded) {
    auto* const untouched = reinterpret_cast<pid_decoder*>(&refused);
    pid_decoder* decoder = untouched;
    pid_array* array = nullptr;
    float data = 0;
    std::int64_t shape[4];
    pid_decoder_info info{};
    const pid_decode_params params = pid_decode_default_params();
    EXPECT_NE(refused(pid_decoder_open(nullptr, nullptr, &decoder)).find("bundle_path"),
              std::string::npos);
    refused(pid_decoder_open("bundle", nullptr, nullptr));
    refused(pid_decoder_get_info(nullptr, &info));
    refused(pid_decoder_decode(nullptr, &params, &array));
    refused(pid_decoder_decode_into(nullptr, &params, &data, 4));
    refused(pid_decoder_output_shape(nullptr, &params, shape));
    refused(pid_decoder_read_state(nullptr, &array));
    pid_bundle* bundle = nullptr;
    pid_timings timings{};
    refused(pid_bundle_open(nullptr, nullptr, &bundle));
    refused(pid_bundle_open("bundle", nullptr, nullptr));
    refused(pid_decoder_create(nullptr, nullptr, &decoder));
    refused(pid_decoder_get_timings(nullptr, &timings));
    pid_plan plan{};
    refused(pid_decoder_plan(nullptr, 64, 64, 1, &params, &plan));
    EXPECT_EQ(bundle, nullptr);
    EXPECT_EQ(decoder, untouched);
    EXPECT_EQ(array, nullptr);
}

TEST(Messages, AreKeptPerThread) {
    refused(pid_decoder_open("no such bundle", nullptr, nullptr));
    const std::string mine = pid_last_error();
    std::thread([] {
        EXPECT_STREQ(pid_last_error(), "");
        refused(pid_decoder_get_info(nullptr, nullptr));
    }).join();
    EXPECT_EQ(pid_last_error(), mine);
}

class Errors : public WithDecoder {
protected:
    // The message an open ends with.
    static std::string refused_open(const std::string& path, const pid::DecoderOptions& options) {
        try {
            Decoder decoder(path, options);
        } catch (const pid::Error& error) {
            EXPECT_EQ(error.status(), PID_ERROR_INPUT) << error.what();
            expect_one_line(error.what());
            return error.what();
        }
        ADD_FAILURE() << "expected a refusal";
        return "";
    }

    // The message a request ends with; the same decoder must decode a good one after it.
    static std::string failed(Decoder& decoder, const DecodeRequest& request, pid_status status) {
        std::string message;
        try {
            decoder.decode(request);
            ADD_FAILURE() << "expected a failure";
        } catch (const pid::Error& error) {
            EXPECT_EQ(error.status(), status) << error.what();
            expect_one_line(error.what());
            message = error.what();
        }
        return message;
    }

    template <typename Change>
    static std::string refused_request(Change change) {
        Case one;
        change(one.request);
        return failed(decoder(), one.request, PID_ERROR_INPUT);
    }
};

#define EXPECT_SAYS(message, part)                                                                 \
    do {                                                                                           \
        const std::string said = message;                                                          \
        EXPECT_NE(said.find(part), std::string::npos) << said;                                     \
    } while (0)

TEST_F(Errors, TheHeaderIsC) {
    EXPECT_EQ(use_everything_from_c(bundle().c_str()), 0) << "line of c_api.c";
}

TEST_F(Errors, OfOpening) {
    const auto with = [](auto change) {
        pid::DecoderOptions options = quick();
        change(options);
        return refused_open(bundle(), options);
    };
    EXPECT_SAYS(refused_open("no such bundle", quick()), "expected a bundle");
    EXPECT_SAYS(refused_open("", quick()), "expected a bundle");
    EXPECT_SAYS(with([](auto& o) { o.backend = "tensorflow"; }), "but got 'tensorflow'");
    EXPECT_SAYS(with([](auto& o) { o.device = "abacus"; }), "CPUExecutionProvider");
    EXPECT_SAYS(with([](auto& o) { o.device = "cuda:first"; }), "expected a device such as");
    EXPECT_SAYS(with([](auto& o) { o.threads = -1; }), "threads");
    EXPECT_SAYS(with([](auto& o) { o.engine_set = "a"; }),
                "the tensorrt backend to run engines 'a'");
    EXPECT_SAYS(with([](auto& o) { o.threads = 1 << 20; }), "threads");
    EXPECT_SAYS(with([](auto& o) {
                    o.device = "SomeExecutionProvider";
                    o.provider_library = "no such library.so";
                }),
                "provider");
    if (std::strstr(pid_runtime_backends(), "tensorrt") == nullptr) {
        EXPECT_SAYS(with([](auto& o) { o.backend = "tensorrt"; }), "PID_WITH_TENSORRT");
    }
}

TEST_F(Errors, OfDamagedBundles) {
    const Folder folder;
    const auto path = folder.copy_of("v1");
    std::string graph = read_bytes(path / "caption.onnx");
    graph[graph.size() / 2] = static_cast<char>(graph[graph.size() / 2] ^ 0x55);
    write_bytes(path / "caption.onnx", graph);
    pid::DecoderOptions options = quick();
    options.verify = true;
    EXPECT_SAYS(refused_open(path.string(), options), "was altered");
    std::string zeros(graph.size(), '\0');
    write_bytes(path / "caption.onnx", zeros);
    EXPECT_SAYS(refused_open(path.string(), quick()), "cannot load caption.onnx");
    write_bytes(path / "manifest.json", "{}");
    EXPECT_SAYS(refused_open(path.string(), quick()), "expected a pid-bundle manifest");
}

TEST_F(Errors, OfLatents) {
    std::vector<float> values(16 * 32 * 64, 0.0F);
    const auto latent = [&](std::initializer_list<std::int64_t> shape) {
        return refused_request(
            [&](DecodeRequest& r) { r.latent = pid::host_tensor(values.data(), shape); });
    };
    EXPECT_SAYS(latent({1, 15, 2, 3}),
                "expected latent shape [B, 16, h, w], but got [1, 15, 2, 3]");
    EXPECT_SAYS(latent({16, 2, 3}), "but got [16, 2, 3]");
    EXPECT_SAYS(latent({}), "but got []");
    EXPECT_SAYS(latent({1, 16, 0, 3}), "but got [1, 16, 0, 3]");
    EXPECT_SAYS(latent({1, 16, -2, 3}), "but got [1, 16, -2, 3]");
    EXPECT_SAYS(latent({0, 16, 2, 3}), "but got [0, 16, 2, 3]");
    EXPECT_SAYS(latent({1, 16, 17, 16}), "at most 0.262 megapixels");
    const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
    latent({1, 16, huge, huge});
    latent({huge, 16, 1, 1});
    latent({std::int64_t{1} << 58, 16, 1, 1});
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.latent.data = nullptr; }), "latent");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.latent.rank = 5; }), "rank 5");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.latent.rank = -1; }), "rank -1");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.latent.dtype = PID_UINT8; }), "float32");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.latent.dtype = 77; }), "float32");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.latent.memory = 7; }), "PID_HOST");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.latent.memory = PID_CUDA; }), "GPU");
    EXPECT_SAYS(refused_request([&](DecodeRequest& r) {
                    const char* odd = reinterpret_cast<const char*>(values.data()) + 1;
                    r.latent.data = odd;
                }),
                "aligned");
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
        values[95] = bad; // the last of them
        EXPECT_SAYS(latent({1, 16, 2, 3}), "expected a finite latent");
    }
}

TEST_F(Errors, OfOtherInputs) {
    std::vector<float> values(3 * 64 * 96 * 2, 0.0F);
    const auto caption = [&](std::initializer_list<std::int64_t> shape) {
        return refused_request(
            [&](DecodeRequest& r) { r.caption = pid::host_tensor(values.data(), shape); });
    };
    EXPECT_SAYS(caption({1, 13, 32}), "expected caption shape [B, T, 32], but got [1, 13, 32]");
    EXPECT_SAYS(caption({1, 12, 33}), "but got [1, 12, 33]");
    EXPECT_SAYS(caption({2, 12, 32}), "but got [2, 12, 32]");
    EXPECT_SAYS(caption({12, 32}), "but got [12, 32]");
    EXPECT_SAYS(caption({1, 0, 32}), "but got [1, 0, 32]");
    for (const float bad : {-0.01F, 1.01F, NAN, INFINITY})
        EXPECT_SAYS(refused_request([&](DecodeRequest& r) { r.sigma = {bad}; }),
                    "expected sigma in [0, 1]");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.sigma = {0, 0}; }), "sigma");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.seeds = {1, 2}; }), "seed");
    const pid_tensor noise = pid::host_tensor(values.data(), {1, 3, 64, 96});
    const pid_tensor wide = pid::host_tensor(values.data(), {1, 3, 96, 64});
    EXPECT_SAYS(refused_request([&](DecodeRequest& r) { r.noise = wide; }),
                "expected noise shape [1, 3, 64, 96], but got [1, 3, 96, 64]");
    EXPECT_SAYS(refused_request([&](DecodeRequest& r) { r.step_noise = {noise}; }),
                "expected 3 step noises");
    EXPECT_SAYS(refused_request([&](DecodeRequest& r) { r.step_noise = {noise, wide, noise}; }),
                "expected noise shape");
    values[0] = NAN;
    EXPECT_SAYS(refused_request([&](DecodeRequest& r) { r.noise = noise; }), "finite noise");
}

TEST_F(Errors, OfSchedules) {
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.steps = 3; }),
                "expected 1, 2, 4 steps, but got 3");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.steps = -1; }), "at least one step");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.rule = 5; }), "rule");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.times = {1, 0}; }), "expected no times");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.output = PID_FLOAT16; }), "output");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.output_memory = PID_CUDA; }),
                "output_memory");
    EXPECT_SAYS(refused_request([](DecodeRequest& r) { r.output_memory = 9; }), "output_memory");
    // One that takes any times.
    Decoder free((data_folder() / "any_times").string(), quick());
    const std::vector<std::vector<double>> wrong{{},     {0},      {1},         {0.5, 0.5, 0},
                                                 {0, 1}, {1.5, 0}, {1, NAN, 0}, {1, 0.5}};
    for (const auto& times : wrong) {
        Case one;
        one.request.times = times;
        EXPECT_SAYS(failed(free, one.request, PID_ERROR_INPUT), "expected times");
    }
    Case one;
    one.request.times.resize(102);
    for (std::size_t i = 0; i < 102; ++i)
        one.request.times[i] = 1 - static_cast<double>(i) / 101;
    EXPECT_SAYS(failed(free, one.request, PID_ERROR_INPUT), "at most 100 steps");
    one.request.times = {1, 0};
    one.request.steps = 4;
    EXPECT_SAYS(failed(free, one.request, PID_ERROR_INPUT), "expected 4 steps, but got times of 1");
    one.request.steps = 0;
    EXPECT_EQ(free.decode(one.request).size(3), 96);
}

TEST_F(Errors, OfGuidance) {
    Decoder free((data_folder() / "any_times").string(), quick());
    std::vector<float> values(12 * 32, 0.5F);
    const auto with = [&](auto change) {
        Case one;
        one.request.times = {0.9, 0.4, 0};
        one.request.guidance = 5;
        one.request.negative = pid::host_tensor(values.data(), {1, 12, 32});
        change(one.request);
        return failed(free, one.request, PID_ERROR_INPUT);
    };
    EXPECT_SAYS(with([](DecodeRequest& r) { r.negative = pid_tensor{}; }),
                "expected a negative caption for guidance 5, but got none");
    for (const double bad : {0.5, -1.0, 101.0, static_cast<double>(NAN)})
        EXPECT_SAYS(with([&](DecodeRequest& r) { r.guidance = bad; }),
                    "expected guidance from 1 to 100, but got ");
    EXPECT_SAYS(with([](DecodeRequest& r) { r.guidance = 0; }),
                "expected guidance with the negative caption, but got none");
    EXPECT_SAYS(
        with([&](DecodeRequest& r) { r.negative = pid::host_tensor(values.data(), {1, 11, 32}); }),
        "expected a negative of as many tokens as the caption, 12, but got 11");
    EXPECT_SAYS(
        with([&](DecodeRequest& r) { r.negative = pid::host_tensor(values.data(), {12, 32}); }),
        "expected negative shape [B, T, 32], but got [12, 32]");
    values[7] = NAN;
    EXPECT_SAYS(with([](DecodeRequest&) {}), "expected a finite negative");
}

TEST_F(Errors, OfTiles) {
    const auto with = [](std::int64_t width, std::int64_t height, std::int64_t overlap) {
        return refused_request([&](DecodeRequest& r) {
            r.tile_width = width;
            r.tile_height = height;
            r.overlap = overlap;
        });
    };
    EXPECT_SAYS(with(PID_TILE_AUTO, 64, -1), "width and height in multiples of 32 pixels, but got");
    EXPECT_SAYS(with(0, 64, -1), "width and height in multiples of 32 pixels, but got 0x64");
    EXPECT_SAYS(with(96, 96, -1), "no larger than the picture, 96x64, but got 96x96");
    EXPECT_SAYS(with(64, 64, 32), "an overlap below half of the tile, 64x64, but got 32");
    EXPECT_SAYS(with(64, 64, -7), "an overlap in multiples of 32 pixels, but got '-7'");
    EXPECT_SAYS(with(0, 0, 32), "expected a tile with the overlap, but got none");
    const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
    std::vector<float> values(16);
    EXPECT_SAYS(refused_request([&](DecodeRequest& r) {
                    r.latent = pid::host_tensor(values.data(), {1, 16, huge, huge});
                    r.tile_width = r.tile_height = PID_TILE_AUTO;
                }),
                "expected sides of at most 16384 pixels");
    refused_request([&](DecodeRequest& r) {
        r.latent = pid::host_tensor(values.data(), {huge, 16, 512, 512});
        r.tile_width = r.tile_height = PID_TILE_AUTO;
        r.overlap = 32;
    });
}

TEST_F(Errors, OfStructures) {
    pid_decoder_params open = pid_decoder_default_params();
    pid_decoder* opened = nullptr;
    for (const std::size_t bytes : {std::size_t{0}, sizeof open + 8, std::size_t{4}}) {
        open.struct_bytes = bytes;
        refused(pid_decoder_open(bundle().c_str(), &open, &opened));
        EXPECT_EQ(opened, nullptr);
    }
    pid_decode_params decode = pid_decode_default_params();
    decode.struct_bytes = 0;
    pid_array* image = nullptr;
    refused(pid_decoder_decode(decoder().get(), &decode, &image));
    refused(pid_decoder_decode(decoder().get(), nullptr, &image));
    refused(pid_decoder_decode(decoder().get(), &decode, nullptr));
    EXPECT_EQ(image, nullptr);
    pid_decoder_info info{};
    refused(pid_decoder_get_info(decoder().get(), &info));
    pid_timings timings{};
    refused(pid_decoder_get_timings(decoder().get(), &timings));
}

TEST_F(Errors, AnOlderProgramHasShorterStructures) {
    // Only the members up to the one it knew are read and written.
    pid_decoder_info info{};
    info.struct_bytes = offsetof(pid_decoder_info, text_dim);
    info.text_dim = 4711;
    EXPECT_EQ(pid_decoder_get_info(decoder().get(), &info), PID_OK);
    EXPECT_EQ(info.latent_channels, channels);
    EXPECT_EQ(info.text_dim, 4711);
    pid_decode_params params = pid_decode_default_params();
    Case one;
    params.latent = one.request.latent;
    params.struct_bytes = offsetof(pid_decode_params, steps);
    params.steps = 3; // must not be looked at
    pid_array* image = nullptr;
    EXPECT_EQ(pid_decoder_decode(decoder().get(), &params, &image), PID_OK) << pid_last_error();
    pid_array_free(image);
}

TEST_F(Errors, StateBeforeADecode) {
    Decoder fresh(bundle(), quick());
    try {
        fresh.state();
        ADD_FAILURE() << "expected a refusal";
    } catch (const pid::Error& error) {
        EXPECT_EQ(error.status(), PID_ERROR_INPUT);
        EXPECT_SAYS(error.what(), "expected a decode before its state is read");
    }
}

TEST_F(Errors, TimingsOfADecodeThatWasNotTimed) {
    const auto message = [] {
        pid_timings timings{};
        timings.struct_bytes = sizeof timings;
        return refused(pid_decoder_get_timings(decoder().get(), &timings));
    };
    Case one;
    decoder().decode(one.request);
    EXPECT_SAYS(message(), "expected a decode that was timed");
    one.request.timed = true;
    decoder().decode(one.request);
    EXPECT_GT(decoder().timings().total_ms, 0);
    one.request.progress = [](int, int) { return false; };
    failed(decoder(), one.request, PID_ERROR_CANCELLED);
    EXPECT_SAYS(message(), "expected a decode that was timed");
}

TEST_F(Errors, OfMemory) {
    // A batch whose arena is larger than the address space.
    Decoder huge((data_folder() / "huge").string(), quick());
    Case one(512, 1, 1);
    const std::string words = failed(huge, one.request, PID_ERROR_MEMORY);
    EXPECT_SAYS(words, "expected enough memory for 512 x ");
    EXPECT_SAYS(words, "GB for the arena, and what the graphs work in), but got too little; decode "
                       "a smaller batch");
}

TEST_F(Errors, OfTheBackend) {
    // Another graph stands in the place of the one that makes the image.
    Decoder odd((data_folder() / "wrong_graph").string(), quick());
    Case one;
    EXPECT_SAYS(failed(odd, one.request, PID_ERROR_BACKEND), "graph 'unpatchify' failed");
    one.request.output = PID_UINT8; // which does not need it
    EXPECT_EQ(odd.decode(one.request).size(1), 64);
}

} // namespace
