#include "bundle/files.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <vector>

#include <openssl/evp.h>

#include "errors.h"

namespace pid::core {
namespace {

constexpr std::size_t read_bytes = 1 << 20;

void expect_done(bool done) {
    if (!done)
        throw Failure(PID_ERROR_INTERNAL, "OpenSSL cannot compute a SHA-256");
}

} // namespace

Sha256::Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    expect_done(context_ && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
}

void Sha256::add(const void* data, std::size_t bytes) {
    expect_done(EVP_DigestUpdate(context_.get(), data, bytes) == 1);
}

std::string Sha256::hex() {
    std::array<unsigned char, 32> digest{};
    expect_done(EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr) == 1);
    std::string text;
    for (const unsigned byte : digest) {
        text += "0123456789abcdef"[byte >> 4U];
        text += "0123456789abcdef"[byte & 15U];
    }
    return text;
}

bool is_sha256(const std::string& text) {
    return text.size() == 64 && std::all_of(text.begin(), text.end(), [](char c) {
               return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
           });
}

std::string file_sha256(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file)
        refuse("cannot read ", path.string(), ": ", std::strerror(errno));
    std::vector<char> part(read_bytes);
    Sha256 digest;
    while (file) {
        file.read(part.data(), static_cast<std::streamsize>(part.size()));
        digest.add(part.data(), static_cast<std::size_t>(file.gcount()));
    }
    if (file.bad())
        refuse("cannot read ", path.string(), ": ", std::strerror(errno));
    return digest.hex();
}

} // namespace pid::core
