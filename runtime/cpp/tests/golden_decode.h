// A decode of the golden-sized bundle "v1", which every test of decoding starts from.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "pid/pid_runtime.hpp"
#include "test_support.h"

namespace pid::test {

constexpr std::int64_t channels = 16, text_tokens = 12, text_dim = 32, pixels_per_latent = 32;

inline std::string bundle() {
    return (data_folder() / "v1").string();
}

inline DecoderOptions quick() {
    DecoderOptions options;
    options.threads = 1;
    options.verify = false;
    return options;
}

// Tests of one decoder, open for as long as the suite runs.
class WithDecoder : public WithData {
protected:
    static void SetUpTestSuite() {
        if (!data_folder().empty())
            decoder_ = std::make_unique<Decoder>(bundle(), quick());
    }
    static void TearDownTestSuite() { decoder_.reset(); }
    static Decoder& decoder() { return *decoder_; }

private:
    inline static std::unique_ptr<Decoder> decoder_;
};

// A latent and a caption, and a request that borrows them.
struct Case {
    explicit Case(std::int64_t batch = 1, std::int64_t height = 2, std::int64_t width = 3)
        : latent(numbers(static_cast<std::size_t>(batch * channels * height * width), 1)),
          caption(numbers(static_cast<std::size_t>(text_tokens * text_dim), 2)) {
        request.latent = host_tensor(latent.data(), {batch, channels, height, width});
        request.caption = host_tensor(caption.data(), {1, text_tokens, text_dim});
        request.seeds = {7};
    }
    Case(const Case&) = delete;
    Case& operator=(const Case&) = delete;

    std::vector<float> latent;
    std::vector<float> caption;
    DecodeRequest request;
};

inline std::vector<float> floats(const Array& array) {
    return {array.data<float>(), array.data<float>() + array.count()};
}

} // namespace pid::test
