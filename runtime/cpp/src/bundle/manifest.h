// The manifest: a decoder as data. See docs/bundle-format.md, which this implements.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "bundle/dtypes.h"
#include "bundle/sizes.h"

namespace pid::core {

constexpr const char* manifest_file = "manifest.json";
constexpr const char* weights_file = "weights.safetensors";
constexpr std::uint64_t manifest_max_bytes = 1U << 24U;

// An input or output of a graph.
struct Port {
    DType dtype;
    SymbolicShape shape;
};

// One ONNX file.
struct Graph {
    std::string file;
    // The same graph with ONNX Runtime's own operators; "" if there is none.
    std::string contrib_file;
    // Which part of the network it is, and what is true of it, for who counts its work.
    std::string stage;
    std::set<std::string> options;
    std::map<std::string, Port> inputs;
    std::map<std::string, Port> outputs;
    std::uint64_t weights_bytes;
    std::string weights_sha256;
};

enum class Function { cos, sin };
enum class Axis { column, row };

// Tables of positions, as docs/bundle-format.md specifies them.
struct Rope2d {
    Function function;
    std::uint64_t head_dim;
    double reference;
    double extent;
    double theta;
};
struct Rope1d {
    Function function;
    std::uint64_t head_dim;
    double theta;
};
struct PixelAxis {
    Axis axis;
    std::uint64_t size;
    std::uint64_t patch_size;
    double theta;
};
using Table = std::variant<Rope2d, Rope1d, PixelAxis>;

// A tensor of the bundle's weights.
struct Constant {
    std::string tensor;
};

// What a table or constant is filled with; nothing for other buffers.
using Source = std::variant<std::monostate, Table, Constant>;

// A named piece of memory.
struct Buffer {
    DType dtype;
    SymbolicShape shape;
    // "input" and "schedule" are written for every decode, "table" for every new shape, "constant"
    // likewise, "temporary" and "output" by the program.
    std::string kind;
    Source source;
};

// A contiguous part of a buffer, from the element at index `start` (zeros when empty).
struct Operand {
    std::string buffer;
    SymbolicShape start;
};

// Run a graph, over slices of its axis `chunk` unless that is "".
struct Run {
    std::string graph;
    std::map<std::string, Operand> inputs;
    std::map<std::string, Operand> outputs;
    std::string chunk;
    // What the graph's own symbols stand for.
    std::map<std::string, std::string> dims;
};

// Copy one buffer to another of the same size.
struct Copy {
    std::string source;
    std::string target;
};

// Fill `target` with the next draw of noise, generated or put by `graph` from an image.
struct Noise {
    std::string target;
    std::string image;
    std::string graph;

    // What this stands for when noise is given as an image.
    Run patchify() const;
};

// For each slice of an axis, one after another: all of `parts` in order. Its runs are cut along the
// axis, which is their `chunk`; its copies are of the slice too.
struct Each {
    std::string axis;
    std::vector<std::variant<Run, Copy>> parts;

    // The shape of a slice of a buffer, in which the axis is the slice's length.
    SymbolicShape slice_of(const Buffer& buffer) const;
};

using Instruction = std::variant<Run, Copy, Noise, Each>;

// What an instruction runs, or may run.
std::vector<Run> runs_of(const Instruction& instruction);

// Parts of a program: once; once per step before the first; per step; then one of the last two.
constexpr std::array<const char*, 5> sections{"prologue", "timestep", "step", "image",
                                              "image_bytes"};

// Where every buffer, and every engine's scratch, begins in the arena is a multiple of this.
constexpr std::uint64_t arena_alignment = 256;

// A token budget: the largest L, the tokens of one chunk, and where each buffer lies.
struct Bucket {
    std::uint64_t max_tokens;
    std::uint64_t chunk_tokens;
    std::uint64_t arena_bytes;
    std::map<std::string, std::uint64_t> offsets;
    // Where the scratch of every instruction lies, by section; empty when it is not planned, as it
    // is by engine sets alone.
    std::map<std::string, std::vector<std::uint64_t>> scratch;
};

// The largest budget of some buckets, by name, or of an engine set's.
template <typename AnyBucket>
std::uint64_t most_tokens(const std::map<std::string, AnyBucket>& buckets) {
    std::uint64_t most = 0;
    for (const auto& [name, bucket] : buckets)
        most = std::max(most, bucket.max_tokens);
    return most;
}

// The smallest of them that holds so many patch tokens, the first by name of several; nullptr when
// none does.
template <typename AnyBucket>
const std::pair<const std::string, AnyBucket>*
smallest_bucket(const std::map<std::string, AnyBucket>& buckets, std::uint64_t tokens) {
    const std::pair<const std::string, AnyBucket>* smallest = nullptr;
    for (const auto& bucket : buckets)
        if (bucket.second.max_tokens >= tokens &&
            (smallest == nullptr || bucket.second.max_tokens < smallest->second.max_tokens))
            smallest = &bucket;
    return smallest;
}

// How a state follows from the one before, in the order of pid_rule; see schedule.h.
constexpr std::array<const char*, 3> rules{"sde", "ode", "dpm++2m"};

constexpr double largest_guidance = 100;

// How the times of an undistilled decode depend on the image; see shifted_times().
struct FlowShift {
    double shift;
    // Side in pixels of the square image that is shifted by `shift` itself.
    std::uint64_t size;
};

// The times a decode visits, and how.
struct Sampler {
    // Defaults are these, `rule` and `guidance`.
    std::uint64_t steps;
    std::uint64_t max_steps;
    std::string rule = rules[0];
    double guidance = 1;
    // The times the network knows; empty when any time goes.
    std::vector<double> times;
    // By number of steps, the rows of `times` visited.
    std::map<std::string, std::vector<std::uint64_t>> schedules;
    // Of a bundle that takes any times, what those of a number of steps follow from.
    std::optional<FlowShift> flow_shift;
};

// Size and hash of one file of the bundle.
struct File {
    std::uint64_t bytes;
    std::string sha256;
};

// What the bundle says about its decoder, which is more than a decode needs: a member that is not
// there, or is not what it should be, is as here.
// factor * (z - shift), each one number for all channels or one per channel.
struct Normalization {
    std::vector<float> factor;
    std::vector<float> shift;

    // Whether nothing is done.
    bool is_identity() const;
    // Normalise raw latents [B, C, h, w] where they are.
    void apply(std::vector<float>& z, const Shape& shape) const;
};

struct Model {
    std::string name;
    std::string space;
    std::string variant;
    // All variants of the space; none if the bundle does not say.
    std::optional<std::vector<std::string>> variants;
    // How many times the image is as wide as the picture of the latent; 0 if it is not known.
    std::uint64_t scale = 0;
    std::string latent_convention;
    std::string weights_license;
    // Least and most of a normalised latent's standard deviation.
    std::optional<std::pair<double, double>> latent_spread;
    // Channels of tokens [B, n, token_width] in which generators pack latents; 0 if none does.
    std::uint64_t token_width = 0;
    // Pixels of the generator's picture per latent pixel; 0 if the bundle does not say.
    std::uint64_t latent_down = 0;
    // How ComfyUI's latents become this bundle's.
    std::optional<Normalization> comfyui_latent;
    // Whether a latent of noise level sigma may be x0 + sigma noise, of an Euler schedule.
    bool is_euler = false;
    bool captioned = true;
    bool distilled = false;
    // (width, height) of images in pixels; empty when they are not known.
    std::vector<std::pair<std::int64_t, std::int64_t>> trained_sizes;
    // All of it as JSON.
    std::string json;
};

struct Manifest {
    std::string producer;
    Model model;
    std::string precision;
    Network network;
    // All whole numbers that it says of the network, and how latents are let in: what the network
    // computes follows from them.
    std::map<std::string, std::uint64_t> dimensions;
    std::string latent_gate;
    Sampler sampler;
    std::map<std::string, File> files;
    std::map<std::string, Graph> graphs;
    std::map<std::string, Buffer> buffers;
    std::map<std::string, Bucket> buckets;
    std::map<std::string, std::vector<Instruction>> program;
    // Names of engine sets and what they are as JSON, in the order of the file; read where they are
    // used.
    std::vector<std::pair<std::string, std::string>> engines;

    // Read and check the text of manifest.json. Refuses one that cannot be run.
    static Manifest parse(std::string_view text);

    // The smallest bucket that holds `tokens` patch tokens. Refuses when none does.
    const std::pair<const std::string, Bucket>& bucket_for(std::uint64_t tokens) const;

    // Where in a section stand the instructions whose results follow from these buffers, in order.
    std::vector<std::size_t> dependent(const std::string& section,
                                       std::set<std::string> inputs) const;

    // The size of an image of so many patch tokens, such as "4.19 megapixels".
    std::string megapixels(std::uint64_t tokens) const;
};

} // namespace pid::core
