// SHA-256 (FIPS 180-4), of files above all.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace pid::core {

class Sha256 {
public:
    // portable: without the processor's own instructions for it, for tests.
    explicit Sha256(bool portable = false);
    void add(const void* data, std::size_t bytes);
    // The digest of all that was added, as 64 lowercase hexadecimal digits; call it once.
    std::string hex();

private:
    std::array<std::uint32_t, 8> state_;
    std::array<std::uint8_t, 64> block_{};
    std::uint64_t bytes_ = 0;
    bool portable_;
};

// Whether a text is a digest as `hex()` writes it.
bool is_sha256(const std::string& text);

// Of a file's contents. Refuses a file that cannot be read.
std::string file_sha256(const std::filesystem::path& path);

} // namespace pid::core
