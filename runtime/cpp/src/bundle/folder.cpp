#include "bundle/folder.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <system_error>
#include <utility>

#include "bundle/files.h"
#include "bundle/safetensors.h"
#include "errors.h"
#include "parallel.h"

namespace pid::core {
namespace {

std::string read_text_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text(manifest_max_bytes + 1, '\0');
    if (file)
        file.read(text.data(), static_cast<std::streamsize>(text.size()));
    if (!file.eof() || file.bad()) {
        if (file && file.gcount() > static_cast<std::streamsize>(manifest_max_bytes))
            refuse("expected ", path.string(), " to have at most ", manifest_max_bytes, " bytes");
        refuse("expected a bundle (a folder with ", manifest_file, "), but cannot read ",
               path.string(), ": ", std::strerror(errno));
    }
    text.resize(static_cast<std::size_t>(file.gcount()));
    return text;
}

} // namespace

Manifest read_manifest(const std::filesystem::path& bundle, bool verify, std::size_t threads) {
    Manifest manifest = Manifest::parse(read_text_file(bundle / manifest_file));
    // The largest first, as one file is hashed by one thread.
    std::vector<std::pair<std::uint64_t, std::string>> files;
    for (const auto& [name, file] : manifest.files) {
        const std::filesystem::path path = bundle / name;
        std::error_code error;
        if (!std::filesystem::is_regular_file(path, error))
            refuse(bundle.string(), " has no file ", name, "; export or copy the bundle again");
        const std::uintmax_t bytes = std::filesystem::file_size(path, error);
        if (error || bytes != file.bytes)
            refuse("expected ", path.string(), " to have ", file.bytes, " bytes, but it has ",
                   error ? 0 : bytes, "; export or copy the bundle again");
        files.emplace_back(file.bytes, name);
    }
    if (!verify)
        return manifest;
    std::sort(files.rbegin(), files.rend());
    parallel_for(files.size(), threads, [&](std::size_t index) {
        const std::filesystem::path path = bundle / files[index].second;
        if (file_sha256(path) != manifest.files.at(files[index].second).sha256)
            refuse(path.string(), " was altered: its SHA-256 is not the manifest's; ",
                   "export or copy the bundle again");
    });
    return manifest;
}

std::map<std::string, std::vector<float>> read_constants(const std::filesystem::path& bundle,
                                                         const Manifest& manifest) {
    std::map<std::string, std::vector<float>> constants;
    const Safetensors weights(bundle / weights_file);
    for (const auto& [name, buffer] : manifest.buffers) {
        const auto* constant = std::get_if<Constant>(&buffer.source);
        if (constant == nullptr)
            continue;
        const std::string& tensor = constant->tensor;
        const SafetensorsEntry* entry = weights.find(tensor);
        if (entry == nullptr)
            refuse("cannot read constants from ", weights_file, ": expected a tensor ",
                   shown(tensor), ", but it has none; export the bundle again");
        SymbolicShape shape;
        for (const std::int64_t size : entry->shape)
            shape.emplace_back(static_cast<std::uint64_t>(size));
        if (entry->dtype != "F32" || shape != buffer.shape)
            refuse("expected constant '", name, "' in ", weights_file, " to be float32 of shape ",
                   text_of(buffer.shape), ", but got ", entry->dtype, " ", text_of(shape));
        constants[name] = weights.read_float32(tensor);
    }
    return constants;
}

} // namespace pid::core
