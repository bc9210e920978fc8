// Tensors in safetensors files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "bundle/sizes.h"

namespace pid::core {

struct SafetensorsEntry {
    // As the file calls it: "F32", "BF16", ..
    std::string dtype;
    Shape shape;
    // Of its first byte in the file.
    std::uint64_t offset;
    std::uint64_t bytes;
};

using SafetensorsEntries = std::map<std::string, SafetensorsEntry>;

// Read the header of a safetensors file.
// header: the JSON text after the first 8 bytes. file_bytes: of the whole file. what: the file, for
// the message.
// Refuses a header that is not that of a whole file: every byte after it belongs to one tensor.
SafetensorsEntries read_safetensors_header(const std::string& header, std::uint64_t file_bytes,
                                           const std::string& what);

// A file, of which only the header was read.
class Safetensors {
public:
    // Refuses a file that cannot be read or is none.
    explicit Safetensors(std::filesystem::path path);

    const SafetensorsEntries& entries() const { return entries_; }
    // The tensor of that name, or nullptr.
    const SafetensorsEntry* find(const std::string& name) const;
    // A tensor that is there and F32, F16 or BF16, as float32.
    std::vector<float> read_float32(const std::string& name) const;

private:
    std::filesystem::path path_;
    SafetensorsEntries entries_;
};

} // namespace pid::core
