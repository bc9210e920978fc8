#include "latent_files.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <set>
#include <utility>

#include "backends/memory.h"
#include "bundle/safetensors.h"
#include "errors.h"
#include "latents.h"
#include "npy_file.h"

namespace pid::cli {
namespace {

using core::refuse;

constexpr const char* latent_name = "latent";
constexpr const char* caption_name = "caption";
constexpr const char* sigma_name = "sigma";
constexpr const char* negative_name = "negative";
// In ComfyUI's files: the raw latent, and an empty tensor that says so.
constexpr const char* comfyui_latent = "latent_tensor";
constexpr const char* comfyui_mark = "latent_format_version_0";

// In the file of FLUX.2's autoencoder, its authors' or diffusers'; and what it adds to variances.
constexpr const char* statistics_names[] = {"bn.running_mean", "bn.running_var"};
constexpr float statistics_eps = 1e-4F;
constexpr const char* normalised_note = "raw latents, normalised as this bundle takes them";

// The tensors of a file, of which only the header was read.
struct Tensors {
    std::filesystem::path path;
    core::SafetensorsEntries entries;
    std::function<std::vector<float>(const std::string&)> read_float32;

    const core::SafetensorsEntry* find(const std::string& name) const {
        const auto found = entries.find(name);
        return found == entries.end() ? nullptr : &found->second;
    }
};

// The name of the tensor that is a file's latent or caption: the one called `key`, if that is not
// "". fix: what to do where the file does not say.
std::string choose(const Tensors& file, const char* role, const std::string& key,
                   const char* option, const std::string& fix) {
    std::string listed, other;
    std::size_t others = 0;
    for (const auto& [name, entry] : file.entries) {
        listed += (listed.empty() ? "" : ", ") + name;
        if (name != latent_name && name != caption_name && name != sigma_name) {
            other = name;
            ++others;
        }
    }
    listed = listed.empty() ? "no tensors" : listed.substr(0, 200);
    if (!key.empty()) {
        if (file.find(key) == nullptr)
            refuse("expected a tensor '", key, "' in ", file.path.string(), ", but got ", listed,
                   "; change ", option);
        return key;
    }
    if (file.find(role) != nullptr)
        return role;
    if (others != 1)
        refuse("expected one tensor, or one named '", role, "', in ", file.path.string(),
               ", but got ", listed, "; ", fix);
    return other;
}

std::string choose(const Tensors& file, const char* role, const std::string& key,
                   const char* option) {
    return choose(file, role, key, option, std::string("choose with ") + option);
}

// How a file begins, unless that may be a safetensors file: "" then.
std::string other_format(const std::filesystem::path& path) {
    std::string start(8, '\0');
    std::ifstream(path, std::ios::binary).read(start.data(), 8);
    // A safetensors file begins with the length of its header, of at most 10^8 bytes.
    const bool is_length = start[4] == 0 && start[5] == 0 && start[6] == 0 && start[7] == 0;
    return is_length ? "" : start;
}

// Refuse what cannot be read, and say what it is.
void refuse_other_format(const std::filesystem::path& path, const std::string& start) {
    static const std::vector<std::pair<std::string, const char*>> formats{
        {"PK\x03\x04", "a ZIP archive, as torch.save and numpy.savez write"}, {"\x80", "a pickle"}};
    for (const auto& [signature, kind] : formats)
        if (start.rfind(signature, 0) == 0)
            refuse("expected ", path.string(), " to be a safetensors file, but got ", kind,
                   "; save its array as 'latent' with save_file of the safetensors package");
}

Tensors open(const std::filesystem::path& path) {
    const std::string start = std::filesystem::is_regular_file(path) ? other_format(path) : "";
    if (start.rfind(npy_signature, 0) == 0) {
        const NpyFile file(path);
        const core::SafetensorsEntry entry{file.dtype(), file.shape(), 0, 0};
        return {path, {{latent_name, entry}}, [file](const auto&) { return file.read_float32(); }};
    }
    refuse_other_format(path, start);
    const core::Safetensors file(path);
    return {path, file.entries(), [file](const auto& name) { return file.read_float32(name); }};
}

// A tensor of some floats, without NaN, in the file's own shape.
Floats read(const Tensors& file, const std::string& name) {
    const std::string path = file.path.string();
    const core::SafetensorsEntry& entry = *file.find(name);
    static const std::set<std::string> dtypes{"F32", "F16", "BF16"};
    if (dtypes.count(entry.dtype) == 0)
        refuse("expected '", name, "' in ", path, " to be F32, F16, BF16, but got ", entry.dtype,
               "; convert it to float32");
    if (std::count(entry.shape.begin(), entry.shape.end(), 0) > 0)
        refuse("expected values in '", name, "' in ", path, ", but got ",
               core::text_of_shape(entry.shape));
    Floats floats{file.read_float32(name), entry.shape};
    if (!core::all_finite(floats.values.data(), floats.values.size()))
        refuse("expected '", name, "' in ", path,
               " to be finite, but it holds NaN or infinity; look at the step that made it");
    return floats;
}

// The same of this rank or one more; an axis of one image is added to the lower rank.
Floats read(const Tensors& file, const std::string& name, std::size_t low_rank,
            const char* wanted) {
    const core::Shape& shape = file.find(name)->shape;
    if (shape.size() != low_rank && shape.size() != low_rank + 1)
        refuse("expected '", name, "' in ", file.path.string(), " to be ", wanted, ", but got ",
               core::text_of_shape(shape), "; reshape it");
    Floats floats = read(file, name);
    if (shape.size() == low_rank)
        floats.shape.insert(floats.shape.begin(), 1);
    return floats;
}

std::int64_t channels_of(const core::Manifest& manifest) {
    return static_cast<std::int64_t>(manifest.network.latent_channels);
}

// Tokens, unpacked. Refuses what cannot be tokens of this bundle.
void unpack(Floats& latent, const std::string& path, const core::Manifest& manifest,
            const LatentForm& form) {
    const std::int64_t channels = channels_of(manifest);
    const auto width = static_cast<std::int64_t>(manifest.model.token_width);
    const core::Shape shape = latent.shape;
    if (!core::may_be_tokens(manifest, shape))
        refuse("expected ",
               width > 0 ? core::text_of("tokens [B, n, ", width, "]")
                         : "a bundle whose latents are ever packed",
               " in ", path, ", but got ", core::text_of_shape(shape), "; change --latent-form");
    const auto root = [](std::int64_t square) {
        return static_cast<std::int64_t>(std::sqrt(static_cast<double>(square)));
    };
    const auto down =
        static_cast<std::int64_t>(std::max<std::uint64_t>(manifest.model.latent_down, 1));
    const std::int64_t patch = root(width / channels), side = root(shape[1]) * patch;
    const std::int64_t columns = form.size ? form.size->first / down : side;
    const std::int64_t rows = form.size ? form.size->second / down : side;
    if (rows * columns != shape[1] * patch * patch || rows % patch != 0 || columns % patch != 0)
        refuse("expected tokens of ",
               form.size ? core::text_of(form.size->first, "x", form.size->second) : "a square",
               ", but ", path, " has ", shape[1], ", of ", patch, "x", patch, " latent pixels of ",
               down,
               " pixels each; give the size of the picture that was generated, as --latent-form "
               "packed:1024x768");
    latent.shape = {shape[0], channels, rows, columns};
    latent.values = core::unpacked(latent.values, latent.shape, patch);
}

// Whether latents are FLUX.2's raw ones, of which 2x2 pixels are one of the bundle's.
bool is_in_parts(const core::Shape& shape, const core::Manifest& manifest) {
    const std::int64_t parts = core::raw_patch * core::raw_patch;
    return shape.size() == 4 && shape[1] * parts == channels_of(manifest);
}

// Raw latents, normalised by the statistics in a file. Refuses a file without them, or with those
// of other latents.
void normalise_by_statistics(Floats& latent, const std::string& path,
                             const core::Manifest& manifest, const Path& statistics) {
    const std::int64_t channels = channels_of(manifest);
    const Tensors file = open(statistics);
    const auto [mean_name, variance_name] = statistics_names;
    for (const char* name : statistics_names)
        if (file.find(name) == nullptr || file.find(name)->shape != core::Shape{channels})
            refuse("expected ", mean_name, " and ", variance_name, " of ", channels,
                   " channels in ", statistics.string(),
                   ", but got none; give the safetensors file of the autoencoder that made the "
                   "latents, FLUX.2's");
    core::Shape& shape = latent.shape;
    if (is_in_parts(shape, manifest)) {
        if (shape[2] % core::raw_patch != 0 || shape[3] % core::raw_patch != 0)
            refuse("expected raw latents of even height and width in ", path, ", but got ",
                   core::text_of_shape(shape), "; generate a picture whose sides are multiples of ",
                   manifest.model.latent_down);
        shape = {shape[0], channels, shape[2] / core::raw_patch, shape[3] / core::raw_patch};
        latent.values = core::in_blocks(latent.values, shape);
    }
    if (shape.size() == 4 && shape[1] == channels)
        core::batch_normalization(read(file, mean_name).values, read(file, variance_name).values,
                                  statistics_eps)
            .apply(latent.values, shape);
}

// note: where what was done to it is put.
Floats read_latent(const Tensors& file, const core::Manifest& manifest, const std::string& key,
                   const LatentForm& form, std::string& note) {
    const std::string path = file.path.string();
    const bool is_comfyui =
        file.find(comfyui_latent) != nullptr && file.find(comfyui_mark) != nullptr;
    const std::string name =
        is_comfyui && key.empty() ? comfyui_latent : choose(file, latent_name, key, "--latent-key");
    Floats latent = read(file, name);
    if (form.kind == "packed") {
        unpack(latent, path, manifest, form);
        note = "tokens, unpacked to " + core::text_of_shape(latent.shape);
        return latent;
    }
    core::Shape& shape = latent.shape;
    const std::int64_t channels = channels_of(manifest);
    const bool is_clear = form.kind != "auto" || !core::may_be_tokens(manifest, shape);
    if (shape.size() == 3 && shape[0] == channels && is_clear)
        shape.insert(shape.begin(), 1);
    else if (shape.size() == 5 && shape[2] == 1)
        shape.erase(shape.begin() + 2);
    if (shape.empty() || shape.size() > PID_MAX_RANK)
        refuse(path, ": expected latent shape [B, ", channels, ", h, w], but got ",
               core::text_of_shape(shape), "; ", core::shape_hint(manifest, shape));
    if (!form.statistics.empty()) {
        normalise_by_statistics(latent, path, manifest, form.statistics);
        note = normalised_note;
        return latent;
    }
    if (manifest.model.space == "flux2" && is_in_parts(shape, manifest))
        refuse("expected ", path, " to hold latents of ", channels, " channels, but got raw ones, ",
               core::text_of_shape(shape),
               "; name the file of FLUX.2's autoencoder, whose statistics normalise them, as "
               "--latent-form raw:flux2_ae.safetensors");
    const bool is_raw = is_comfyui && name == comfyui_latent;
    if (form.kind == "normalised" || (form.kind == "auto" && !is_raw))
        return latent;
    const auto& rule = manifest.model.comfyui_latent;
    if (!rule || (form.kind == "raw" && rule->is_identity()))
        refuse("expected ", path, " to hold a normalised latent, but got ",
               is_raw ? "ComfyUI's raw one" : "a raw one",
               ", and this bundle does not say how to normalise it; normalise it and save it as "
               "'latent'");
    if (shape.size() == 4 && shape[1] == channels)
        rule->apply(latent.values, shape);
    note = normalised_note;
    return latent;
}

Floats read_caption(const Tensors& file, const std::string& name) {
    return read(file, name, 2, "[T, D] or [B, T, D]");
}

} // namespace

const float* Floats::part(std::size_t image) const {
    return values.data() + (images() == 1 ? 0 : image * (values.size() / images()));
}

LatentFile read_latent_file(const std::filesystem::path& path, const core::Manifest& manifest,
                            const std::string& key, const LatentForm& form, bool embedded_caption) {
    const Tensors file = open(path);
    LatentFile read_file;
    read_file.latent = read_latent(file, manifest, key, form, read_file.note);
    if (embedded_caption && file.find(caption_name) != nullptr)
        read_file.caption = read_caption(file, caption_name);
    if (file.find(sigma_name) != nullptr)
        read_file.sigma = read(file, sigma_name, 0, "[] or [B]");
    return read_file;
}

Floats read_caption_file(const std::filesystem::path& path, const std::string& key) {
    const Tensors file = open(path);
    return read_caption(file, choose(file, caption_name, key, "--caption-key"));
}

Floats read_negative_file(const std::filesystem::path& path) {
    const Tensors file = open(path);
    return read_caption(file, file.find(negative_name) != nullptr
                                  ? negative_name
                                  : choose(file, caption_name, "", "",
                                           "name that of the negative caption 'negative'"));
}

} // namespace pid::cli
