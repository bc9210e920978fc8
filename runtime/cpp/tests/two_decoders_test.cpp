// Two decoders in two threads, of bundles of their own and of one they share, for ThreadSanitizer.
// Decodes the bundle "v1" of PID_TEST_DATA.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <pid/pid_runtime.hpp>

namespace {

struct Result {
    std::vector<float> image;
    std::string error;
};

using Open = std::function<pid::Decoder()>;

// What one thread does: open, decode three times, fail once, and have one decode cancelled.
void work(const Open& open, std::uint64_t seed, Result& result) {
    try {
        pid::Decoder decoder = open();
        std::vector<float> latent(16 * 2 * 3, 0.5F), caption(12 * 32, 0.25F);
        pid::DecodeRequest request;
        request.latent = pid::host_tensor(latent.data(), {1, 16, 2, 3});
        request.caption = pid::host_tensor(caption.data(), {1, 12, 32});
        request.seeds = {seed};
        for (int round = 0; round < 3; ++round) {
            const pid::Array image = decoder.decode(request);
            result.image.assign(image.data<float>(), image.data<float>() + image.count());
        }
        request.steps = 3;
        try {
            decoder.decode(request);
            result.error = "3 steps were not refused";
        } catch (const pid::Error&) {
        }
        request.steps = 0;
        std::atomic<bool> started{false}, stop{false};
        std::thread canceller([&] {
            while (!started && !stop)
                std::this_thread::yield();
            decoder.cancel();
        });
        request.progress = [&](int, int) {
            started = true;
            return true;
        };
        try {
            decoder.decode(request); // may end before it is cancelled
        } catch (const pid::Error& error) {
            if (error.status() != PID_ERROR_CANCELLED)
                result.error = error.what();
        }
        stop = true;
        canceller.join();
    } catch (const std::exception& error) {
        result.error = error.what();
    }
}

} // namespace

int main() {
    const char* data = std::getenv("PID_TEST_DATA");
    if (data == nullptr) {
        std::fprintf(stderr, "PID_TEST_DATA is not set: run it by tests/cpp\n");
        return 77; // skipped
    }
    const std::string bundle = std::string(data) + "/v1";
    pid::DecoderOptions options;
    options.threads = 1;
    const pid::Bundle shared(bundle, options);
    const Open of_its_own = [&] { return pid::Decoder(bundle, options); };
    const Open of_the_shared = [&] { return pid::Decoder(shared, options); };
    // A third one alone says what the two must make.
    Result alone;
    work(of_its_own, 2, alone);
    for (const Open& open : {of_its_own, of_the_shared}) {
        Result first, second;
        std::thread one(work, open, 1, std::ref(first)), two(work, open, 2, std::ref(second));
        one.join();
        two.join();
        for (const Result* result : {&first, &second, &alone}) {
            if (!result->error.empty()) {
                std::fprintf(stderr, "%s\n", result->error.c_str());
                return 1;
            }
        }
        if (second.image != alone.image || first.image == second.image) {
            std::fprintf(stderr, "expected the image of the seed, but got another\n");
            return 1;
        }
    }
    std::printf("%zu values\n", alone.image.size());
    return 0;
}
