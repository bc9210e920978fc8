// Decodes by the public C++ API: memory, progress, cancellation. That the pixels are Python's is
// the business of tests/cpp.
#include <atomic>
#include <chrono>
#include <optional>
#include <thread>

#ifdef __linux__
#include <unistd.h>
#endif

#include "golden_decode.h"

namespace {

using namespace pid::test;
using pid::Decoder;

constexpr float close = 1e-5F;

class Decode : public WithDecoder {
protected:
    pid_status status_of(pid::DecodeRequest& request) {
        try {
            decoder().decode(request);
        } catch (const pid::Error& error) {
            expect_one_line(error.what());
            return error.status();
        }
        return PID_OK;
    }
};

TEST_F(Decode, IsRepeatableAndTheSameInBytes) {
    Case one;
    const pid::Array image = decoder().decode(one.request);
    EXPECT_EQ(image.shape(), (std::vector<std::int64_t>{1, 3, 64, 96}));
    EXPECT_EQ(image.count(), 3U * 64 * 96);
    const auto values = floats(image);
    EXPECT_EQ(floats(decoder().decode(one.request)), values);
    one.request.output = PID_UINT8;
    const pid::Array pixels = decoder().decode(one.request);
    EXPECT_EQ(pixels.shape(), decoder().output_shape(one.request));
    for (std::size_t i = 0; i < 64U * 96; ++i) {
        for (std::size_t channel = 0; channel < 3; ++channel) {
            const float wanted = (values[channel * 64 * 96 + i] + 1) * 127.5F;
            ASSERT_NEAR(pixels.data<std::uint8_t>()[3 * i + channel], wanted, 0.501F);
        }
    }
}

TEST_F(Decode, OfABatchIsThatOfItsImages) {
    Case both(2);
    const auto images = floats(decoder().decode(both.request));
    const std::size_t half = images.size() / 2;
    for (std::size_t image = 0; image < 2; ++image) {
        Case one;
        const auto* latent = both.latent.data() + image * one.latent.size();
        one.request.latent = pid::host_tensor(latent, {1, channels, 2, 3});
        one.request.seeds = {7 + image};
        const auto begin = images.begin() + static_cast<std::ptrdiff_t>(image * half);
        const std::vector<float> part(begin, begin + static_cast<std::ptrdiff_t>(half));
        EXPECT_LE(difference(floats(decoder().decode(one.request)), part), close);
    }
}

TEST_F(Decode, ShapesMayComeAndGo) {
    std::vector<std::vector<float>> first;
    for (int round = 0; round < 2; ++round) {
        std::size_t at = 0;
        for (const auto& [batch, height, width] :
             std::vector<std::array<std::int64_t, 3>>{{1, 2, 3}, {2, 3, 2}, {1, 5, 5}, {3, 1, 1}}) {
            Case each(batch, height, width);
            const auto image = floats(decoder().decode(each.request));
            if (round == 0)
                first.push_back(image);
            else
                EXPECT_EQ(image, first[at++]);
        }
    }
}

TEST_F(Decode, GivenNoiseTakesThePlaceOfTheSeeds) {
    Case one;
    const auto noise = numbers(3U * 64 * 96, 3);
    const pid_tensor image = pid::host_tensor(noise.data(), {1, 3, 64, 96});
    one.request.noise = image;
    one.request.step_noise = {image, image, image};
    const auto wanted = floats(decoder().decode(one.request));
    one.request.seeds = {12345};
    EXPECT_EQ(floats(decoder().decode(one.request)), wanted);
    one.request.step_noise[1] = pid_tensor{}; // this one from the seed
    EXPECT_GT(difference(floats(decoder().decode(one.request)), wanted), 1e-3F);
}

TEST_F(Decode, TakesOtherFloats) {
    Case one;
    std::vector<double> doubles(one.latent.begin(), one.latent.end());
    const auto wanted = floats(decoder().decode(one.request));
    const std::int64_t shape[] = {1, channels, 2, 3};
    one.request.latent = pid_host_tensor(doubles.data(), PID_FLOAT64, 4, shape);
    EXPECT_EQ(floats(decoder().decode(one.request)), wanted);
    const std::vector<std::uint16_t> halves(one.latent.size(), 0x3800); // 0.5
    const std::vector<std::uint16_t> brains(one.latent.size(), 0x3F00); // 0.5
    const std::vector<float> singles(one.latent.size(), 0.5F);
    one.request.latent = pid_host_tensor(halves.data(), PID_FLOAT16, 4, shape);
    const auto of_halves = floats(decoder().decode(one.request));
    one.request.latent = pid_host_tensor(brains.data(), PID_BFLOAT16, 4, shape);
    EXPECT_EQ(floats(decoder().decode(one.request)), of_halves);
    one.request.latent = pid_host_tensor(singles.data(), PID_FLOAT32, 4, shape);
    EXPECT_EQ(floats(decoder().decode(one.request)), of_halves);
}

// Memory

TEST_F(Decode, WhatIsBorrowedIsNotKept) {
    // Everything borrowed is given back at once, which AddressSanitizer would notice.
    std::optional<Decoder> decoder;
    {
        const std::string path = bundle();
        auto options = std::make_unique<pid::DecoderOptions>(quick());
        options->backend = "onnxruntime";
        options->device = "CPUExecutionProvider";
        decoder.emplace(path, *options);
    }
    auto one = std::make_unique<Case>();
    one->request.sigma = {0.5F};
    one->request.progress = [](int, int) { return true; };
    pid::Array image = decoder->decode(one->request);
    one.reset();
    const pid::Array state = decoder->state();
    EXPECT_EQ(state.shape(), (std::vector<std::int64_t>{1, 24, 256, 3}));
    const Decoder moved = std::move(*decoder);
    EXPECT_EQ(decoder->get(), nullptr);
    decoder.reset();
    const pid::Array kept = std::move(image);
    EXPECT_EQ(kept.count(), 3U * 64 * 96);
}

TEST_F(Decode, ResultsOutliveTheirDecoder) {
    Case one;
    auto decoder = std::make_unique<Decoder>(bundle(), quick());
    const pid::Array image = decoder->decode(one.request);
    const pid::Array state = decoder->state();
    const auto values = floats(image);
    decoder.reset();
    EXPECT_EQ(floats(image), values);
    for (const float value : floats(state))
        ASSERT_TRUE(std::isfinite(value));
}

TEST_F(Decode, IntoMemoryOfTheCaller) {
    Case one;
    const auto wanted = floats(decoder().decode(one.request));
    std::vector<float> own(wanted.size() + 2, 42.0F);
    decoder().decode_into(one.request, own.data() + 1, wanted.size() * sizeof(float));
    EXPECT_EQ(std::vector<float>(own.begin() + 1, own.end() - 1), wanted);
    EXPECT_EQ(own.front(), 42.0F);
    EXPECT_EQ(own.back(), 42.0F);
    for (const std::size_t bytes :
         {std::size_t{0}, wanted.size() * sizeof(float) - 1, wanted.size() * sizeof(float) + 1})
        EXPECT_THROW(decoder().decode_into(one.request, own.data(), bytes), pid::Error);
    EXPECT_EQ(own.front(), 42.0F);
}

// What decoders share

TEST_F(Decode, DecodersOfABundleReadNothingAgain) {
    std::optional<Folder> folder(std::in_place);
    std::optional<pid::Bundle> shared(std::in_place, folder->copy_of("v1").string(), quick());
    folder.reset();
    Decoder first(*shared, quick()), second(*shared, quick());
    shared.reset(); // which decoders survive
    Case one, other(2, 3, 2);
    const auto wanted = floats(decoder().decode(one.request));
    const auto wanted_of_other = floats(decoder().decode(other.request));
    EXPECT_EQ(floats(first.decode(one.request)), wanted);
    EXPECT_EQ(floats(second.decode(other.request)), wanted_of_other);
    EXPECT_EQ(floats(first.decode(other.request)), wanted_of_other);
    EXPECT_EQ(floats(second.decode(one.request)), wanted);
}

#ifdef __linux__

// Bytes of memory in which this process has something.
std::uint64_t resident_bytes() {
    std::ifstream file("/proc/self/statm");
    std::uint64_t mapped = 0, resident = 0;
    file >> mapped >> resident;
    return resident * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
}

TEST_F(Decode, DecodersOfABundleShareItsWeights) {
    const pid::Bundle shared(bundle(), quick());
    const std::uint64_t before = resident_bytes();
    std::vector<Decoder> decoders;
    for (int i = 0; i < 8; ++i)
        decoders.emplace_back(shared, quick());
    const std::uint64_t weights =
        std::filesystem::file_size(data_folder() / "v1" / "weights.safetensors");
    EXPECT_LT(resident_bytes(), before + weights); // less than one copy of them, not eight
}

#ifndef __SANITIZE_ADDRESS__ // which keeps what is freed

TEST_F(Decode, AClosedDecoderGivesItsMemoryBack) {
    Case large(2, 16, 16);
    large.request.steps = 1;
    const std::uint64_t before = resident_bytes();
    {
        Decoder closed(bundle(), quick());
        closed.decode(large.request);
        EXPECT_GT(resident_bytes(), before + (80U << 20U));
    }
    EXPECT_LT(resident_bytes(), before + (40U << 20U));
}

#endif
#endif

TEST_F(Decode, CancelsItsOwnDecodeAlone) {
    const pid::Bundle shared(bundle(), quick());
    Decoder first(shared, quick()), second(shared, quick());
    Case one, two;
    one.request.progress = [&](int, int) {
        second.cancel(); // which runs nothing
        EXPECT_EQ(second.decode(two.request).size(3), 96);
        return true;
    };
    EXPECT_EQ(first.decode(one.request).size(3), 96);
}

// Progress, cancellation

TEST_F(Decode, ReportsEveryStep) {
    Case one;
    std::vector<std::pair<int, int>> told;
    std::vector<float> last;
    one.request.steps = 2;
    one.request.progress = [&](int done, int steps) {
        told.emplace_back(done, steps);
        last = floats(decoder().state());
        return true;
    };
    decoder().decode(one.request);
    EXPECT_EQ(told, (std::vector<std::pair<int, int>>{{1, 2}, {2, 2}}));
    EXPECT_EQ(floats(decoder().state()), last);
}

// A picture of 5 x 6 latent pixels in 2 x 2 tiles.
class Tiled : public Case {
public:
    explicit Tiled(std::int64_t batch = 1) : Case(batch, 5, 6) {
        request.tile_width = 4 * pixels_per_latent;
        request.tile_height = 3 * pixels_per_latent;
        request.overlap = pixels_per_latent;
    }
};

TEST_F(Decode, ReportsEveryTile) {
    Tiled one;
    std::vector<std::pair<int, int>> told;
    std::vector<float> last;
    one.request.steps = 2;
    one.request.progress = [&](int done, int calls) {
        told.emplace_back(done, calls);
        last = floats(decoder().state());
        return true;
    };
    const pid::Array image = decoder().decode(one.request);
    EXPECT_EQ(image.shape(), decoder().output_shape(one.request));
    ASSERT_EQ(told.size(), 8U);
    for (int call = 0; call < 8; ++call)
        EXPECT_EQ(told[static_cast<std::size_t>(call)], std::make_pair(call + 1, 8));
    // The state is the picture's, by tokens of 16 x 16 pixels.
    const auto values = floats(image);
    ASSERT_EQ(last.size(), values.size());
    for (std::size_t y = 0; y < 160; ++y)
        for (std::size_t x = 0; x < 192; ++x) {
            const std::size_t token = (y / 16 * 12 + x / 16) * 256 + y % 16 * 16 + x % 16;
            ASSERT_EQ(values[y * 192 + x], std::min(std::max(last[3 * token], -1.0F), 1.0F));
        }
    try {
        decoder().state();
        ADD_FAILURE() << "expected a refusal";
    } catch (const pid::Error& error) {
        const std::string message = error.what();
        EXPECT_NE(message.find("but the last one was in tiles or with guidance and has ended; "
                               "read it in a progress callback"),
                  std::string::npos)
            << message;
    }
    one.request.output = PID_UINT8;
    const pid::Array pixels = decoder().decode(one.request);
    for (std::size_t i = 0; i < 160U * 192; ++i)
        ASSERT_EQ(pixels.data<std::uint8_t>()[3 * i],
                  static_cast<int>(std::nearbyint((values[i] + 1) * 127.5F)));
}

TEST_F(Decode, StopsBetweenTiles) {
    Tiled one;
    const auto wanted = floats(decoder().decode(one.request));
    for (const int stop : {1, 2, 7}) {
        int calls = 0;
        one.request.progress = [&](int done, int) {
            ++calls;
            return done < stop;
        };
        EXPECT_EQ(status_of(one.request), PID_ERROR_CANCELLED);
        EXPECT_EQ(calls, stop);
    }
    one.request.progress = nullptr;
    EXPECT_EQ(floats(decoder().decode(one.request)), wanted);
}

TEST_F(Decode, OneTileIsTheWholePicture) {
    Case one(1, 5, 6);
    const auto whole = floats(decoder().decode(one.request));
    one.request.tile_width = one.request.tile_height = PID_TILE_AUTO;
    EXPECT_EQ(floats(decoder().decode(one.request)), whole);
    one.request.tile_width = 6 * pixels_per_latent;
    one.request.tile_height = 5 * pixels_per_latent;
    EXPECT_EQ(floats(decoder().decode(one.request)), whole);
}

TEST_F(Decode, TakesSmallerTilesWhereMemoryIsShort) {
    // Of the larger bucket's arenas so many have no address.
    std::vector<std::string> notes;
    pid::DecoderOptions options = quick();
    options.log = [&](pid_log_level, const std::string& line) { notes.push_back(line); };
    Decoder decoder((data_folder() / "short").string(), options);
    Case many(300, 4, 4);
    many.request.steps = 1;
    many.request.tile_width = many.request.tile_height = 128; // all of it
    many.request.overlap = 0;
    EXPECT_THROW(decoder.decode(many.request), pid::Error);
    EXPECT_NE(std::string(pid_last_error()).find("bucket tiny or in tiles, of 128x64 for example"),
              std::string::npos)
        << pid_last_error();
    many.request.tile_width = many.request.tile_height = PID_TILE_AUTO;
    const auto images = floats(decoder.decode(many.request));
    const std::string wanted =
        "Decoding in 4 tiles of 64x64, overlapping by 0 pixels or more: memory is short";
    EXPECT_NE(std::find(notes.begin(), notes.end(), wanted), notes.end()) << notes.back();
    Case one(1, 4, 4);
    one.request.steps = 1;
    one.request.tile_width = one.request.tile_height = 64;
    one.request.overlap = 0;
    const auto alone = floats(decoder.decode(one.request));
    const std::vector<float> first(images.begin(),
                                   images.begin() + static_cast<std::ptrdiff_t>(alone.size()));
    EXPECT_LE(difference(first, alone), close);
}

TEST_F(Decode, StopsWhenProgressSaysSo) {
    Case one;
    const auto wanted = floats(decoder().decode(one.request));
    for (const int stop : {1, 3, 4}) {
        int calls = 0;
        one.request.progress = [&](int done, int) {
            ++calls;
            return done < stop;
        };
        EXPECT_EQ(status_of(one.request), PID_ERROR_CANCELLED);
        EXPECT_EQ(calls, stop);
    }
    one.request.progress = nullptr;
    EXPECT_EQ(floats(decoder().decode(one.request)), wanted); // and can be used again
}

TEST_F(Decode, WhatProgressThrowsComesOut) {
    Case one;
    one.request.progress = [](int, int) -> bool { throw std::out_of_range("of my own"); };
    EXPECT_THROW(decoder().decode(one.request), std::out_of_range);
}

TEST_F(Decode, IsCancelledFromItsCallback) {
    Case one;
    one.request.progress = [&](int, int) {
        decoder().cancel();
        return true;
    };
    EXPECT_EQ(status_of(one.request), PID_ERROR_CANCELLED);
    one.request.progress = nullptr;
    EXPECT_EQ(status_of(one.request), PID_OK);
}

TEST_F(Decode, IsCancelledFromAnotherThread) {
    Case one;
    std::atomic<bool> first_step{false}, ended{false};
    one.request.progress = [&](int, int) {
        first_step = true;
        while (first_step) // until the other thread has cancelled
            std::this_thread::yield();
        return true;
    };
    std::thread other([&] {
        while (!first_step && !ended)
            std::this_thread::yield();
        decoder().cancel();
        first_step = false;
    });
    EXPECT_EQ(status_of(one.request), PID_ERROR_CANCELLED);
    ended = true;
    other.join();
}

TEST_F(Decode, ServesOneCallAtATime) {
    Case one, two;
    pid_status within = PID_OK, beside = PID_OK;
    one.request.progress = [&](int, int) {
        within = status_of(two.request);
        std::thread([&] { beside = status_of(two.request); }).join();
        return true;
    };
    EXPECT_EQ(status_of(one.request), PID_OK);
    EXPECT_EQ(within, PID_ERROR_BUSY);
    EXPECT_EQ(beside, PID_ERROR_BUSY);
}

TEST_F(Decode, TellsWhatCouldBeBetter) {
    std::vector<std::string> warnings;
    pid::DecoderOptions options = quick();
    options.warning = [&](const std::string& line) { warnings.push_back(line); };
    Decoder decoder(bundle(), options);
    Case one;
    decoder.decode(one.request);
    EXPECT_TRUE(warnings.empty());
    one.request.sigma = {0.9F};
    one.request.caption = pid_tensor{};
    decoder.decode(one.request);
    ASSERT_EQ(warnings.size(), 2U);
    EXPECT_NE(warnings[0].find("sigma 0.9 is beyond 0.8"), std::string::npos);
    EXPECT_NE(warnings[1].find("no caption"), std::string::npos);
}

TEST_F(Decode, LogsWhatItNotes) {
    std::vector<std::pair<pid_log_level, std::string>> lines;
    int warnings = 0;
    pid::DecoderOptions options = quick();
    options.log = [&](pid_log_level level, const std::string& line) {
        lines.emplace_back(level, line);
    };
    options.warning = [&](const std::string&) { ++warnings; };
    const pid::Bundle shared(bundle(), options);
    ASSERT_EQ(lines.size(), 1U);
    EXPECT_EQ(lines[0].first, PID_LOG_INFO);
    EXPECT_NE(lines[0].second.find("CPUExecutionProvider, 1 threads"), std::string::npos);
    Decoder decoder(shared, options);
    Case one;
    one.request.sigma = {0.9F};
    decoder.decode(one.request);
    ASSERT_EQ(lines.size(), 3U);
    EXPECT_EQ(lines[1].first, PID_LOG_WARNING);
    EXPECT_NE(lines[1].second.find("sigma 0.9"), std::string::npos);
    EXPECT_EQ(lines[2].first, PID_LOG_INFO);
    EXPECT_NE(lines[2].second.find("for a batch of 1 at 96x64"), std::string::npos);
    EXPECT_EQ(warnings, 1);
    options.log = nullptr;
    Decoder silent(shared, options);
    silent.decode(one.request);
    EXPECT_EQ(lines.size(), 3U);
    EXPECT_EQ(warnings, 2);
}

TEST_F(Decode, TellsWhereItsTimeWent) {
    static constexpr int pause_ms = 25;
    Decoder fresh(bundle(), quick());
    Case one;
    one.request.timed = true;
    one.request.progress = [](int, int) {
        std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
        return true;
    };
    const auto begin = std::chrono::steady_clock::now();
    fresh.decode(one.request);
    const std::chrono::duration<double, std::milli> all = std::chrono::steady_clock::now() - begin;
    const pid_timings first = fresh.timings();
    EXPECT_GE(first.steps_ms, 4 * pause_ms);
    EXPECT_LE(first.total_ms, all.count());
    EXPECT_GE(first.total_ms, 0.5 * all.count());
    EXPECT_DOUBLE_EQ(first.total_ms,
                     first.prepare_ms + first.prologue_ms + first.steps_ms + first.image_ms);
    fresh.decode(one.request);
    const pid_timings second = fresh.timings();
    EXPECT_LT(second.prepare_ms, first.prepare_ms); // the shape is there already
    for (const pid_timings& each : {first, second})
        for (const double part : {each.open_ms, each.prepare_ms, each.prologue_ms, each.image_ms})
            EXPECT_GT(part, 0);
    EXPECT_EQ(second.open_ms, first.open_ms);
}

} // namespace
