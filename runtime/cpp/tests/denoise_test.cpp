// Both branches of guidance as one batch, as on GPUs, against one after another.
#include "denoise.h"

#include "decoder.h"
#include "test_support.h"

namespace {

using namespace pid::core;

using Guidance = pid::test::WithData;

TEST_F(Guidance, OfBranchesAtOnceIsThatOfOneAfterAnother) {
    BackendOptions options{};
    options.backend = "onnxruntime";
    options.device = "cpu";
    options.threads = 1;
    const auto bundle =
        std::make_shared<const Bundle>(pid::test::data_folder() / "any_times", options);
    Decoder decoder(bundle, {});
    const pid::test::GuidedInputs inputs;
    const pid_decode_params params = inputs.params();
    std::vector<std::vector<float>> images;
    std::vector<std::int32_t> calls;
    const auto count = [&](std::int32_t done, std::int32_t all) {
        calls.push_back(10 * done + all);
        return true;
    };
    for (const bool at_once : {false, true}) {
        Request request = check_request(decoder.manifest(), params, false);
        request.branches_at_once = at_once;
        EXPECT_EQ(request.program_sizes().value("B"), at_once ? 4U : 2U);
        EXPECT_EQ(request.calls(), 6);
        images.emplace_back(3 * 2 * 160 * 192);
        decoder.decode(std::move(request), PID_FLOAT32, {images.back().data(), PID_HOST}, count);
    }
    const std::vector<std::int32_t> six{16, 26, 36, 46, 56, 66, 16, 26, 36, 46, 56, 66};
    EXPECT_EQ(calls, six);
    EXPECT_LE(pid::test::difference(images[0], images[1]), 1e-4F);
}

} // namespace
