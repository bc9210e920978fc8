// A manifest is read, or refused in one line. One that is read is laid out at its largest sizes, as
// a decode would: no arena ends before what lies in it.
#include <cstdlib>
#include <string_view>

#include "bundle/manifest.h"
#include "errors.h"
#include "interpreter.h"

namespace {

void expect(bool condition) {
    if (!condition)
        std::abort();
}

void lay_out(const pid::core::Manifest& manifest) {
    const std::uint64_t rows = manifest.sampler.max_steps;
    for (const auto& [name, bucket] : manifest.buckets) {
        const auto sizes = pid::core::Sizes::of_column(manifest.network, rows, bucket.max_tokens);
        const std::uint64_t arena = pid::core::Program::arena_bytes(bucket, sizes);
        for (const auto& [buffer_name, buffer] : manifest.buffers)
            expect(bucket.offsets.at(buffer_name) + sizes.bytes(buffer.dtype, buffer.shape) <=
                   arena);
        if (bucket.max_tokens / bucket.chunk_tokens < 1000) // a list of every call
            pid::core::planned_calls(manifest, bucket, sizes);
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    try {
        lay_out(pid::core::Manifest::parse(text));
    } catch (const pid::core::Failure& failure) {
        const std::string message = failure.what();
        expect(failure.status() == PID_ERROR_INPUT && !message.empty());
        expect(message.find('\n') == std::string::npos && message.size() < 2000);
    }
    return 0;
}
