#include "npy_file.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <regex>
#include <utility>

#include "bundle/dtypes.h"
#include "errors.h"

namespace pid::cli {
namespace {

constexpr std::size_t longest_header = 10'000; // as in NumPy

[[noreturn]] void refuse_npy(const std::filesystem::path& path, const char* reason) {
    core::refuse("expected an array in ", path.string(), ", but cannot read it: ", reason,
                 "; save it with save_file of the safetensors package");
}

// Bytes of a value of a type that is read; of others 0.
std::size_t value_bytes(const std::string& descr) {
    return descr == "<f2" ? 2 : descr == "<f4" ? 4 : descr == "<f8" ? 8 : 0;
}

template <typename Value, typename Convert>
std::vector<float> converted(const std::vector<char>& bytes, Convert convert) {
    std::vector<float> values(bytes.size() / sizeof(Value));
    for (std::size_t i = 0; i < values.size(); ++i) {
        Value value;
        std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
        values[i] = convert(value);
    }
    return values;
}

// Values that lie column by column, row by row.
std::vector<float> by_rows(const std::vector<float>& values, const core::Shape& shape) {
    std::vector<float> rows(values.size());
    core::Shape index(shape.size(), 0);
    for (float& to : rows) {
        std::size_t from = 0;
        for (std::size_t axis = shape.size(); axis-- > 0;)
            from = from * static_cast<std::size_t>(shape[axis]) +
                   static_cast<std::size_t>(index[axis]);
        to = values[from];
        for (std::size_t axis = shape.size(); axis-- > 0 && ++index[axis] == shape[axis];)
            index[axis] = 0;
    }
    return rows;
}

} // namespace

NpyFile::NpyFile(std::filesystem::path path) : path_(std::move(path)) {
    std::ifstream file(path_, std::ios::binary);
    std::uint8_t start[12] = {};
    file.read(reinterpret_cast<char*>(start), sizeof start);
    // Signature, version, and the bytes of the header in two numbers or, from version 2 on, four.
    std::size_t bytes = start[8] + 256U * start[9];
    offset_ = 10;
    if (start[6] > 1) {
        bytes += 65536U * (start[10] + 256U * start[11]);
        offset_ = 12;
    }
    if (!file || bytes > longest_header)
        refuse_npy(path_, "its header is longer than the file or than NumPy's own");
    std::string header(bytes, '\0');
    file.seekg(static_cast<std::streamoff>(offset_));
    file.read(header.data(), static_cast<std::streamsize>(bytes));
    offset_ += bytes;
    std::smatch descr, order, shape;
    if (!file || !std::regex_search(header, descr, std::regex("'descr': *'([^']{1,20})'")) ||
        !std::regex_search(header, order, std::regex("'fortran_order': *(True|False)")) ||
        !std::regex_search(header, shape, std::regex("'shape': *\\(([0-9, ]{0,200})\\)")))
        refuse_npy(path_, "its header does not describe an array of numbers");
    descr_ = descr[1];
    by_columns_ = order[1] == "True";
    const std::string sizes = shape[1];
    const std::regex number("[0-9]+");
    for (std::sregex_iterator each(sizes.begin(), sizes.end(), number), end; each != end; ++each) {
        if (each->length() > 15 || shape_.size() == 32)
            refuse_npy(path_, "its shape is larger than any array");
        shape_.push_back(std::stoll(each->str()));
        const auto size = static_cast<std::size_t>(shape_.back());
        if (size > 0 && count_ > std::numeric_limits<std::size_t>::max() / 8 / size)
            refuse_npy(path_, "its shape is larger than any array");
        count_ *= size;
    }
    const std::size_t there = std::filesystem::file_size(path_) - offset_;
    if (there < count_ * value_bytes(descr_))
        refuse_npy(path_, "it is shorter than its header says");
}

std::string NpyFile::dtype() const {
    if (value_bytes(descr_) == 0)
        return descr_;
    return descr_ == "<f2" ? "F16" : "F32";
}

std::vector<float> NpyFile::read_float32() const {
    std::vector<char> bytes(count_ * value_bytes(descr_));
    std::ifstream file(path_, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset_));
    if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size())))
        core::refuse("cannot read ", path_.string(), ": it became shorter");
    std::vector<float> values;
    if (descr_ == "<f2")
        values = converted<std::uint16_t>(bytes, core::float_of_half);
    else if (descr_ == "<f4")
        values = converted<float>(bytes, [](float value) { return value; });
    else
        values = converted<double>(bytes, [](double value) { return static_cast<float>(value); });
    return by_columns_ ? by_rows(values, shape_) : values;
}

} // namespace pid::cli
