// Latents and caption embeddings in files of safetensors and NumPy.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "arguments.h"
#include "bundle/manifest.h"

namespace pid::cli {

// float32 values, and their shape.
struct Floats {
    std::vector<float> values;
    core::Shape shape;

    bool given() const { return !shape.empty(); }
    std::size_t images() const { return static_cast<std::size_t>(shape[0]); }
    // The part [1, ..] of [B, ..] that belongs to one image; all of [1, ..].
    const float* part(std::size_t image) const;
};

// What a file holds; shapes as the decoder takes them.
struct LatentFile {
    Floats latent;  // [B, C, h, w]
    Floats caption; // [B, T, D] or [1, T, D]; not given if there is none
    Floats sigma;   // [B] or [1]; not given if there is none
    // [B, T, D] or [1, T, D]; not given, as a latent file has none
    Floats negative;
    // What was done to the latent; "" for nothing.
    std::string note;
};

// Read a latent [C, h, w] or [B, C, h, w], and the caption and sigma beside it.
//
// The latent is the tensor called `key`; for "", the tensor called "latent", or the only one that
// is neither "caption" [T, D] or [B, T, D] nor "sigma" (a number or one per image). That of
// ComfyUI's files is known, and normalised. An axis of one frame, [B, C, 1, h, w], is left out; a
// shape that is not clear stays as it is. Each is F32, F16 or BF16. A NumPy file is a latent.
// manifest: of the bundle that is to decode it. form: what the latent is. embedded_caption: read
// "caption", if there is one.
// Refuses a file that cannot be read or holds something else, such as NaN.
LatentFile read_latent_file(const std::filesystem::path& path, const core::Manifest& manifest,
                            const std::string& key, const LatentForm& form, bool embedded_caption);

// Read a caption embedding [T, D] or [B, T, D], as [1 or B, T, D].
//
// It is the tensor called `key`; for "", the tensor called "caption", or the only one.
// Refuses as read_latent_file() does.
Floats read_caption_file(const std::filesystem::path& path, const std::string& key);

// Read a negative caption embedding, as read_caption_file() reads a caption's.
//
// It is the tensor called "negative", as pid-caption --negative writes it beside the caption; in a
// file without one what would be the caption.
Floats read_negative_file(const std::filesystem::path& path);

} // namespace pid::cli
