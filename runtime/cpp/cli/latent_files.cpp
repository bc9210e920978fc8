#include "latent_files.h"

#include <algorithm>
#include <set>

#include "backends/memory.h"
#include "bundle/safetensors.h"
#include "errors.h"

namespace pid::cli {
namespace {

using core::refuse;
using core::Safetensors;

constexpr const char* latent_name = "latent";
constexpr const char* caption_name = "caption";
constexpr const char* sigma_name = "sigma";

// The name of the tensor that is a file's latent or caption.
std::string choose(const std::filesystem::path& path, const Safetensors& file, const char* role,
                   const std::string& key, const char* option) {
    std::string listed, other;
    std::size_t others = 0;
    for (const auto& [name, entry] : file.entries()) {
        listed += (listed.empty() ? "" : ", ") + name;
        if (name != latent_name && name != caption_name && name != sigma_name) {
            other = name;
            ++others;
        }
    }
    listed = listed.empty() ? "no tensors" : listed.substr(0, 200);
    if (!key.empty()) {
        if (file.find(key) == nullptr)
            refuse("expected a tensor '", key, "' in ", path.string(), ", but got ", listed,
                   "; change ", option);
        return key;
    }
    if (file.find(role) != nullptr)
        return role;
    if (others != 1)
        refuse("expected one tensor, or one named '", role, "', in ", path.string(), ", but got ",
               listed, "; choose with ", option);
    return other;
}

// A tensor of one of these ranks, without NaN. An axis of one image is added to the lower rank.
Floats read(const std::filesystem::path& path, const Safetensors& file, const std::string& name,
            std::size_t low_rank, const char* wanted) {
    const core::SafetensorsEntry& entry = *file.find(name);
    const auto& shape = entry.shape;
    static const std::set<std::string> dtypes{"F32", "F16", "BF16"};
    if (dtypes.count(entry.dtype) == 0)
        refuse("expected '", name, "' in ", path.string(), " to be F32, F16, BF16, but got ",
               entry.dtype, "; convert it to float32");
    if ((shape.size() != low_rank && shape.size() != low_rank + 1) ||
        std::count(shape.begin(), shape.end(), 0) > 0)
        refuse("expected '", name, "' in ", path.string(), " to be ", wanted, ", but got ",
               core::text_of_shape(shape), "; reshape it");
    Floats floats{file.read_float32(name), shape};
    if (!core::all_finite(floats.values.data(), floats.values.size()))
        refuse("expected '", name, "' in ", path.string(),
               " to be finite, but it holds NaN or infinity; look at the step that made it");
    if (shape.size() == low_rank)
        floats.shape.insert(floats.shape.begin(), 1);
    return floats;
}

Floats read_caption(const std::filesystem::path& path, const Safetensors& file,
                    const std::string& name) {
    return read(path, file, name, 2, "[T, D] or [B, T, D]");
}

} // namespace

const float* Floats::part(std::size_t image) const {
    return values.data() + (images() == 1 ? 0 : image * (values.size() / images()));
}

LatentFile read_latent_file(const std::filesystem::path& path, const std::string& key,
                            bool embedded_caption) {
    const Safetensors file(path);
    const std::string name = choose(path, file, latent_name, key, "--latent-key");
    LatentFile read_file;
    read_file.latent = read(path, file, name, 3, "[C, h, w] or [B, C, h, w]");
    if (embedded_caption && file.find(caption_name) != nullptr)
        read_file.caption = read_caption(path, file, caption_name);
    if (file.find(sigma_name) != nullptr)
        read_file.sigma = read(path, file, sigma_name, 0, "[] or [B]");
    return read_file;
}

Floats read_caption_file(const std::filesystem::path& path, const std::string& key) {
    const Safetensors file(path);
    return read_caption(path, file, choose(path, file, caption_name, key, "--caption-key"));
}

} // namespace pid::cli
