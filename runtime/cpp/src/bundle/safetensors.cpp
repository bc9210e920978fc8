#include "bundle/safetensors.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <system_error>
#include <utility>

#include "bundle/dtypes.h"
#include "bundle/json_reader.h"
#include "errors.h"

namespace pid::core {
namespace {

constexpr std::uint64_t prefix_bytes = 8;
constexpr std::uint64_t header_max_bytes = 100'000'000; // as in the safetensors library

// Bytes of a value; 0 for a type this reader knows nothing of.
std::uint64_t value_bytes(const std::string& dtype) {
    static const std::map<std::string, std::uint64_t> bytes{
        {"BOOL", 1},    {"U8", 1},  {"I8", 1},   {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U16", 2},
        {"I16", 2},     {"F16", 2}, {"BF16", 2}, {"U32", 4},     {"I32", 4},     {"F32", 4},
        {"F8_E8M0", 1}, {"U64", 8}, {"I64", 8},  {"F64", 8},     {"C64", 8}};
    const auto found = bytes.find(dtype);
    return found == bytes.end() ? 0 : found->second;
}

[[noreturn]] void refuse_file(const std::string& what, const std::string& problem) {
    refuse("expected ", what, " to be a safetensors file, but got: ", problem, "; save it again");
}

std::uint64_t read_prefix(const std::array<unsigned char, prefix_bytes>& prefix) {
    std::uint64_t bytes = 0;
    for (std::size_t i = prefix_bytes; i-- > 0;)
        bytes = bytes << 8U | prefix[i];
    return bytes;
}

} // namespace

SafetensorsEntries read_safetensors_header(const std::string& header, std::uint64_t file_bytes,
                                           const std::string& what) {
    const std::uint64_t data = prefix_bytes + header.size();
    const Json parsed = parse_json(header, "the header of " + what);
    SafetensorsEntries entries;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
    for (const auto& [name, value] : object(parsed, what).items()) {
        if (name == "__metadata__")
            continue;
        const std::string where = "tensor " + shown(name) + " of " + what;
        SafetensorsEntry entry;
        object(value, where);
        entry.dtype = text(member(value, "dtype", where), where);
        std::uint64_t bytes = value_bytes(entry.dtype);
        const bool known = bytes > 0;
        for (const Json& size : list(member(value, "shape", where), where)) {
            entry.shape.push_back(static_cast<std::int64_t>(integer(size, where)));
            bytes = product(bytes, integer(size, where));
        }
        const Json& range = list(member(value, "data_offsets", where), where);
        if (range.size() != 2)
            refuse_file(what, where + " has not two data_offsets");
        const std::uint64_t begin = integer(range[0], where), end = integer(range[1], where);
        if (begin > end || end > file_bytes - data)
            refuse_file(what, where + " ends outside the file");
        if (known && end - begin != bytes)
            refuse_file(what, where + " has another size than its shape");
        entry.offset = data + begin;
        entry.bytes = end - begin;
        ranges.emplace_back(begin, end);
        entries.emplace(name, std::move(entry));
    }
    std::sort(ranges.begin(), ranges.end());
    std::uint64_t at = 0;
    for (const auto& [begin, end] : ranges) {
        if (begin != at)
            refuse_file(what, "tensors overlap or leave gaps");
        at = end;
    }
    if (at != file_bytes - data)
        refuse_file(what, "its data is not as long as its header says");
    return entries;
}

Safetensors::Safetensors(std::filesystem::path path) : path_(std::move(path)) {
    const std::string what = path_.string();
    std::error_code error;
    if (!std::filesystem::is_regular_file(path_, error))
        refuse("expected a safetensors file, but ", what, " is none; check the path");
    const std::uintmax_t file_bytes = std::filesystem::file_size(path_, error);
    std::ifstream file(path_, std::ios::binary);
    std::array<unsigned char, prefix_bytes> prefix{};
    if (error || !file)
        refuse_file(what, "it cannot be read");
    if (!file.read(reinterpret_cast<char*>(prefix.data()), prefix_bytes))
        refuse_file(what, "fewer than 8 bytes");
    const std::uint64_t header_bytes = read_prefix(prefix);
    if (header_bytes > header_max_bytes || header_bytes > file_bytes - prefix_bytes)
        refuse_file(what, "a header longer than the file");
    std::string header(header_bytes, '\0');
    if (!file.read(header.data(), static_cast<std::streamsize>(header_bytes)))
        refuse_file(what, "it cannot be read");
    entries_ = read_safetensors_header(header, file_bytes, what);
}

const SafetensorsEntry* Safetensors::find(const std::string& name) const {
    const auto found = entries_.find(name);
    return found == entries_.end() ? nullptr : &found->second;
}

std::vector<float> Safetensors::read_float32(const std::string& name) const {
    const SafetensorsEntry& entry = entries_.at(name);
    std::ifstream file(path_, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(entry.offset));
    const auto read = [&](void* target) {
        if (!file.read(static_cast<char*>(target), static_cast<std::streamsize>(entry.bytes)))
            refuse("cannot read ", path_.string(), ": it became shorter");
    };
    std::vector<float> values;
    if (entry.dtype == "F32") {
        values.resize(entry.bytes / sizeof(float));
        read(values.data());
        return values;
    }
    std::vector<std::uint16_t> halves(entry.bytes / sizeof(std::uint16_t));
    read(halves.data());
    values.resize(halves.size());
    std::transform(halves.begin(), halves.end(), values.begin(),
                   entry.dtype == "F16" ? float_of_half : float_of_bfloat16);
    return values;
}

} // namespace pid::core
