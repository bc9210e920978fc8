// Arrays in files of NumPy.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "bundle/sizes.h"

namespace pid::cli {

// How NumPy's files begin.
constexpr const char* npy_signature = "\x93NUMPY";

// A file, of which only the header was read.
class NpyFile {
public:
    // Refuses a file that cannot be read, is none or is cut short.
    explicit NpyFile(std::filesystem::path path);

    // What it is read from, as safetensors calls it: "F32" (of float64 too) or "F16"; NumPy's own
    // word for what read_float32() does not read.
    std::string dtype() const;
    const core::Shape& shape() const { return shape_; }
    // The values, row by row.
    std::vector<float> read_float32() const;

private:
    std::filesystem::path path_;
    std::string descr_;
    bool by_columns_ = false;
    core::Shape shape_;
    std::size_t offset_ = 0;
    std::size_t count_ = 1;
};

} // namespace pid::cli
