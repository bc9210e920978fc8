#include "latent_files.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <utility>

#include "backends/memory.h"
#include "bundle/safetensors.h"
#include "errors.h"
#include "latents.h"

namespace pid::cli {
namespace {

using core::refuse;
using core::Safetensors;

constexpr const char* latent_name = "latent";
constexpr const char* caption_name = "caption";
constexpr const char* sigma_name = "sigma";
// In ComfyUI's files: the raw latent, and an empty tensor that says so.
constexpr const char* comfyui_latent = "latent_tensor";
constexpr const char* comfyui_mark = "latent_format_version_0";

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

// Refuse what begins as no safetensors file does, and say what it is.
void refuse_other_formats(const std::filesystem::path& path) {
    static const std::vector<std::pair<std::string, const char*>> formats{
        {"\x93NUMPY", "a NumPy file"},
        {"PK\x03\x04", "a ZIP archive, as torch.save and numpy.savez write"},
        {"\x80", "a pickle"}};
    std::string start(8, '\0');
    std::ifstream(path, std::ios::binary).read(start.data(), 8);
    // A safetensors file begins with the length of its header, of at most 10^8 bytes.
    if (start[4] == 0 && start[5] == 0 && start[6] == 0 && start[7] == 0)
        return;
    for (const auto& [signature, kind] : formats)
        if (start.rfind(signature, 0) == 0)
            refuse("expected ", path.string(), " to be a safetensors file, but got ", kind,
                   "; save its array as 'latent' with save_file of the safetensors package");
}

Safetensors open(const std::filesystem::path& path) {
    if (std::filesystem::is_regular_file(path))
        refuse_other_formats(path);
    return Safetensors(path);
}

// A tensor of some floats, without NaN, in the file's own shape.
Floats read(const std::filesystem::path& path, const Safetensors& file, const std::string& name) {
    const core::SafetensorsEntry& entry = *file.find(name);
    static const std::set<std::string> dtypes{"F32", "F16", "BF16"};
    if (dtypes.count(entry.dtype) == 0)
        refuse("expected '", name, "' in ", path.string(), " to be F32, F16, BF16, but got ",
               entry.dtype, "; convert it to float32");
    if (std::count(entry.shape.begin(), entry.shape.end(), 0) > 0)
        refuse("expected values in '", name, "' in ", path.string(), ", but got ",
               core::text_of_shape(entry.shape));
    Floats floats{file.read_float32(name), entry.shape};
    if (!core::all_finite(floats.values.data(), floats.values.size()))
        refuse("expected '", name, "' in ", path.string(),
               " to be finite, but it holds NaN or infinity; look at the step that made it");
    return floats;
}

// The same of this rank or one more; an axis of one image is added to the lower rank.
Floats read(const std::filesystem::path& path, const Safetensors& file, const std::string& name,
            std::size_t low_rank, const char* wanted) {
    const core::Shape& shape = file.find(name)->shape;
    if (shape.size() != low_rank && shape.size() != low_rank + 1)
        refuse("expected '", name, "' in ", path.string(), " to be ", wanted, ", but got ",
               core::text_of_shape(shape), "; reshape it");
    Floats floats = read(path, file, name);
    if (shape.size() == low_rank)
        floats.shape.insert(floats.shape.begin(), 1);
    return floats;
}

Floats read_latent(const std::filesystem::path& path, const Safetensors& file,
                   const core::Manifest& manifest, const std::string& key) {
    const bool is_comfyui =
        file.find(comfyui_latent) != nullptr && file.find(comfyui_mark) != nullptr;
    const std::string name = is_comfyui && key.empty()
                                 ? comfyui_latent
                                 : choose(path, file, latent_name, key, "--latent-key");
    Floats latent = read(path, file, name);
    core::Shape& shape = latent.shape;
    const auto channels = static_cast<std::int64_t>(manifest.network.latent_channels);
    if (shape.size() == 3 && shape[0] == channels && !core::may_be_tokens(manifest, shape))
        shape.insert(shape.begin(), 1);
    else if (shape.size() == 5 && shape[2] == 1)
        shape.erase(shape.begin() + 2);
    if (shape.empty() || shape.size() > PID_MAX_RANK)
        refuse(path.string(), ": expected latent shape [B, ", channels, ", h, w], but got ",
               core::text_of_shape(shape), "; ", core::shape_hint(manifest, shape));
    if (!is_comfyui || name != comfyui_latent)
        return latent;
    if (!manifest.model.comfyui_latent)
        refuse("expected ", path.string(),
               " to hold a normalised latent, but got ComfyUI's raw one, and this bundle does not "
               "say how to normalise it; normalise it and save it as 'latent'");
    if (shape.size() == 4 && shape[1] == channels)
        manifest.model.comfyui_latent->apply(latent.values, shape);
    return latent;
}

Floats read_caption(const std::filesystem::path& path, const Safetensors& file,
                    const std::string& name) {
    return read(path, file, name, 2, "[T, D] or [B, T, D]");
}

} // namespace

const float* Floats::part(std::size_t image) const {
    return values.data() + (images() == 1 ? 0 : image * (values.size() / images()));
}

LatentFile read_latent_file(const std::filesystem::path& path, const core::Manifest& manifest,
                            const std::string& key, bool embedded_caption) {
    const Safetensors file = open(path);
    LatentFile read_file;
    read_file.latent = read_latent(path, file, manifest, key);
    if (embedded_caption && file.find(caption_name) != nullptr)
        read_file.caption = read_caption(path, file, caption_name);
    if (file.find(sigma_name) != nullptr)
        read_file.sigma = read(path, file, sigma_name, 0, "[] or [B]");
    return read_file;
}

Floats read_caption_file(const std::filesystem::path& path, const std::string& key) {
    const Safetensors file = open(path);
    return read_caption(path, file, choose(path, file, caption_name, key, "--caption-key"));
}

} // namespace pid::cli
