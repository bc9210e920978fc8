// The header of a safetensors file is read, or refused in one line. The tensors of one that is read
// lie in the file.
#include <cstdlib>
#include <string>

#include "bundle/safetensors.h"
#include "errors.h"

namespace {

void expect(bool condition) {
    if (!condition)
        std::abort();
}

std::uint64_t little_endian(const std::uint8_t* data) {
    std::uint64_t value = 0;
    for (std::size_t i = 8; i-- > 0;)
        value = value << 8U | data[i];
    return value;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < 8 || little_endian(data) > size - 8)
        return 0;
    const std::string header(reinterpret_cast<const char*>(data) + 8, little_endian(data));
    try {
        const auto entries = pid::core::read_safetensors_header(header, size, "the file");
        for (const auto& [name, entry] : entries)
            expect(entry.offset >= 8 + header.size() && entry.offset <= size &&
                   entry.bytes <= size - entry.offset);
    } catch (const pid::core::Failure& failure) {
        const std::string message = failure.what();
        expect(failure.status() == PID_ERROR_INPUT && !message.empty());
        expect(message.find('\n') == std::string::npos && message.size() < 2000);
    }
    return 0;
}
