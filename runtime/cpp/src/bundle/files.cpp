#include "bundle/files.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <vector>

#include "errors.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PID_SHA_INSTRUCTIONS 1
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace pid::core {
namespace {

constexpr std::size_t block_bytes = 64;
constexpr std::size_t read_bytes = 1 << 20;

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
alignas(16) constexpr std::array<std::uint32_t, 64> constants{
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// Of the square roots of the first 8 primes.
constexpr std::array<std::uint32_t, 8> initial_state{
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

using State = std::array<std::uint32_t, 8>;

std::uint32_t rotated(std::uint32_t x, int bits) {
    return (x >> bits) | (x << (32 - bits));
}

void mix_plain(State& state, const std::uint8_t* data, std::size_t blocks) {
    for (; blocks > 0; --blocks, data += block_bytes) {
        std::array<std::uint32_t, 64> w;
        for (std::size_t i = 0; i < 16; ++i) {
            const std::uint8_t* at = data + 4 * i;
            w[i] = static_cast<std::uint32_t>(at[0]) << 24 |
                   static_cast<std::uint32_t>(at[1]) << 16 |
                   static_cast<std::uint32_t>(at[2]) << 8 | static_cast<std::uint32_t>(at[3]);
        }
        for (std::size_t i = 16; i < 64; ++i) {
            const std::uint32_t s0 =
                rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ (w[i - 15] >> 3);
            const std::uint32_t s1 =
                rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ (w[i - 2] >> 10);
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        State s = state; // a .. h
        for (std::size_t i = 0; i < 64; ++i) {
            const std::uint32_t sum1 = rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25);
            const std::uint32_t choice = (s[4] & s[5]) ^ (~s[4] & s[6]);
            const std::uint32_t t1 = s[7] + sum1 + choice + constants[i] + w[i];
            const std::uint32_t sum0 = rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22);
            const std::uint32_t majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
            s = {t1 + sum0 + majority, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
        }
        for (std::size_t i = 0; i < 8; ++i)
            state[i] += s[i];
    }
}

#ifdef PID_SHA_INSTRUCTIONS

bool has_sha_instructions() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool ssse3_sse41 =
        __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_SSSE3) != 0 && (c & bit_SSE4_1) != 0;
    return ssse3_sse41 && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & (1U << 29)) != 0;
}

// The same with the processor's own rounds, ten times as fast: a bundle's weights are gigabytes.
__attribute__((target("sha,sse4.1,ssse3"))) void
mix_instructions(State& state, const std::uint8_t* data, std::size_t blocks) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    // The instructions want the state as (a, b, e, f) and (c, d, g, h), the first one highest.
    const __m128i abcd =
        _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state.data())), 0xB1);
    const __m128i efgh = _mm_shuffle_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(state.data() + 4)), 0x1B);
    __m128i abef = _mm_alignr_epi8(abcd, efgh, 8);
    __m128i cdgh = _mm_blend_epi16(efgh, abcd, 0xF0);
    for (; blocks > 0; --blocks, data += block_bytes) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (int i = 0; i < 4; ++i)
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i),
                                    big_endian);
        for (int i = 0; i < 16; ++i) { // four rounds each
            const __m128i words = w[i & 3];
            __m128i sum = _mm_add_epi32(
                words, _mm_load_si128(reinterpret_cast<const __m128i*>(constants.data()) + i));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            sum = _mm_shuffle_epi32(sum, 0x0E);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, sum);
            if (i < 12) { // the words of four rounds' time
                const __m128i last = w[(i + 3) & 3];
                __m128i next = _mm_sha256msg1_epu32(words, w[(i + 1) & 3]);
                next = _mm_add_epi32(next, _mm_alignr_epi8(last, w[(i + 2) & 3], 4));
                w[i & 3] = _mm_sha256msg2_epu32(next, last);
            }
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1B);
    const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state.data()), _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state.data() + 4), _mm_alignr_epi8(dchg, feba, 8));
}

void mix(State& state, const std::uint8_t* data, std::size_t blocks, bool portable) {
    static const bool fast = has_sha_instructions();
    (fast && !portable ? mix_instructions : mix_plain)(state, data, blocks);
}

#else

void mix(State& state, const std::uint8_t* data, std::size_t blocks, bool) {
    mix_plain(state, data, blocks);
}

#endif

} // namespace

Sha256::Sha256(bool portable) : state_(initial_state), portable_(portable) {}

void Sha256::add(const void* data, std::size_t bytes) {
    const auto* at = static_cast<const std::uint8_t*>(data);
    const std::size_t held = bytes_ % block_bytes;
    bytes_ += bytes;
    if (held > 0) {
        const std::size_t taken = std::min(bytes, block_bytes - held);
        std::memcpy(block_.data() + held, at, taken);
        at += taken;
        bytes -= taken;
        if (held + taken < block_bytes)
            return;
        mix(state_, block_.data(), 1, portable_);
    }
    mix(state_, at, bytes / block_bytes, portable_);
    at += bytes / block_bytes * block_bytes;
    if (bytes % block_bytes > 0)
        std::memcpy(block_.data(), at, bytes % block_bytes);
}

std::string Sha256::hex() {
    const std::uint64_t bits = bytes_ * 8;
    std::array<std::uint8_t, 2 * block_bytes> end{0x80};
    // A one, zeros, and the length in 8 bytes, to the end of a block.
    const std::size_t padding = (bytes_ % block_bytes < 56 ? 56 : 120) - bytes_ % block_bytes;
    for (std::size_t i = 0; i < 8; ++i)
        end[padding + i] = static_cast<std::uint8_t>(bits >> (56 - 8 * i));
    add(end.data(), padding + 8);
    std::string text;
    for (const std::uint32_t word : state_)
        for (int shift = 28; shift >= 0; shift -= 4)
            text += "0123456789abcdef"[(word >> shift) & 15U];
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
