#include "backends/ort_environment.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <mutex>

namespace pid::core {
namespace {

// An ONNX model that copies one number, x to y; the same as Python's.
constexpr char identity[] =
    "\x08\x08:7\n\x10\n\x01x\x12\x01y\"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12"
    "\x04\n\x02\x08\x01"
    "b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    "B\x04\n\x00\x10\r";

} // namespace

std::shared_ptr<OrtEnvironment> OrtEnvironment::shared() {
    static std::mutex mutex;
    static std::weak_ptr<OrtEnvironment> held;
    const std::lock_guard<std::mutex> lock(mutex);
    if (auto environment = held.lock())
        return environment;
    const OrtApi* api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api == nullptr)
        refuse("expected ONNX Runtime 1.", ORT_API_VERSION, " or later, as this library was built ",
               "with, but got ", OrtGetApiBase()->GetVersionString(), "; update it");
    Ort::InitApi(api);
    return guarded(PID_ERROR_BACKEND, "ONNX Runtime cannot start", [] {
        auto environment = std::make_shared<OrtEnvironment>();
        held = environment;
        return environment;
    });
}

OrtEnvironment::OrtEnvironment() : env_(ORT_LOGGING_LEVEL_ERROR, "pid") {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    try {
        env_.CreateAndRegisterAllocator(memory, nullptr);
    } catch (const Ort::Exception&) { // the program that embeds this has registered one
    }
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    use_shared_arena(options);
    copying_ = Ort::Session(env_, identity, sizeof identity - 1, options);
}

void OrtEnvironment::use_shared_arena(Ort::SessionOptions& options) {
    options.AddConfigEntry("session.use_env_allocators", "1");
}

void OrtEnvironment::give_back() noexcept {
    try {
        Ort::RunOptions options;
        options.AddConfigEntry("memory.enable_memory_arena_shrinkage", "cpu:0");
        std::array<float, 1> value{};
        const std::array<std::int64_t, 1> shape{1};
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
        const auto input = Ort::Value::CreateTensor<float>(memory, value.data(), value.size(),
                                                           shape.data(), shape.size());
        const char* const x = "x";
        const char* const y = "y";
        copying_.Run(options, &x, &input, 1, &y, 1);
    } catch (const std::exception&) { // it stays for the next decoder
    }
}

// What ONNX Runtime says of memory that ran out, without its own files and functions.
std::string shortage_of(const std::string& message) {
    static const std::string before = "requested buffer of size ";
    const std::size_t at = message.find(before);
    if (at == std::string::npos)
        return "too little (ONNX Runtime ran out of it)";
    const std::uint64_t wanted = std::strtoull(message.c_str() + at + before.size(), nullptr, 10);
    return "too little (ONNX Runtime wanted " + gigabytes(wanted) + " more)";
}

} // namespace pid::core
