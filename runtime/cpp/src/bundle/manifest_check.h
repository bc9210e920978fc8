// "Checks" of docs/bundle-format.md.
#pragma once

#include <cstdint>
#include <string>

#include "bundle/manifest.h"
#include "errors.h"

namespace pid::core {

// No size of a shape is larger.
constexpr std::uint64_t largest_size = 1U << 24U;

template <typename Wanted, typename Got>
void require(bool condition, const Wanted& wanted, const Got& got,
             const char* fix = "export the bundle again") {
    if (!condition)
        refuse("expected ", wanted, ", but the manifest has ", text_of(got).substr(0, 80), "; ",
               fix);
}

// What a manifest must keep to before anything is allocated. Refuses one that contradicts itself
// or promises the impossible.
void check_manifest(const Manifest& manifest);

// The part of that about buffers and instructions.
void check_program(const Manifest& manifest);

// Whether so many bytes may lie at an offset.
bool lies_in_arena(const Bucket& bucket, std::uint64_t offset, std::uint64_t bytes);

// Refuse a bucket whose plan does not hold the manifest's buffers.
// scratch_bytes: what the arena has room for besides.
void check_bucket(const Manifest& manifest, const std::string& name, const Bucket& bucket,
                  std::uint64_t scratch_bytes = 0);

} // namespace pid::core
