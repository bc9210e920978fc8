// SHA-256 (FIPS 180-4), of files above all.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>

struct evp_md_ctx_st; // of OpenSSL

namespace pid::core {

class Sha256 {
public:
    Sha256();
    void add(const void* data, std::size_t bytes);
    // The digest of all that was added, as 64 lowercase hexadecimal digits; call it once.
    std::string hex();

private:
    std::unique_ptr<evp_md_ctx_st, void (*)(evp_md_ctx_st*)> context_;
};

// Whether a text is a digest as `hex()` writes it.
bool is_sha256(const std::string& text);

// Of a file's contents. Refuses a file that cannot be read.
std::string file_sha256(const std::filesystem::path& path);

} // namespace pid::core
