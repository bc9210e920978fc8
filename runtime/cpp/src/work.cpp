#include "work.h"

#include <array>
#include <utility>

#include "errors.h"

namespace pid::core {
namespace {

// Multiply-adds of a graph's call on all its tokens. N names a dimension of the network.
class Count {
public:
    Count(const Manifest& manifest, const Graph& graph, const Sizes& sizes)
        : network_(manifest.dimensions), gate_(manifest.latent_gate), graph_(graph), sizes_(sizes) {
    }

    std::uint64_t latent() const {
        const std::uint64_t block = n("latent_unpatchify"), r = n("latent_hidden");
        const std::uint64_t channels = n("latent_channels") / (block * block);
        const std::uint64_t convolutions = channels * r + (1 + 2 * n("latent_res_blocks")) * r * r;
        return 9 * convolutions * sizes_.value("Hs") * sizes_.value("Ws");
    }

    std::uint64_t caption() const { return sizes_.value("T") * n("text_dim") * n("hidden_size"); }

    std::uint64_t timestep() const {
        const std::uint64_t d = n("hidden_size");
        return 256 * d + d * d + 2 * n("patch_depth") * d * 6 * d;
    }

    std::uint64_t attention() const {
        const Shape shape = sizes_.shape(graph_.inputs.at("q").shape);
        return 2 * of(shape, 1) * sizes_.value("S") * of(shape, 2);
    }

    std::uint64_t tokens() const {
        const Shape shape = sizes_.shape(graph_.outputs.at("k").shape);
        const std::uint64_t d = of(shape, 2), patch = n("patch_size");
        std::uint64_t per_token = (graph_.outputs.count("q") > 0 ? 3 : 2) * d * d;
        if (is("embed"))
            per_token += 3 * patch * patch * d;
        if (!is("first"))
            per_token += leave();
        if (is("inject"))
            per_token += gate(gate_ == "channel" ? d : 1);
        return of(shape, 1) * per_token;
    }

    std::uint64_t pixel_first() const {
        const std::uint64_t gates = is("inject") ? gate(1) : 0;
        return sizes_.value("L") * (leave() + gates + embed() + enter_pixels());
    }

    std::uint64_t pixels() const {
        return sizes_.value("L") * ((is("embed") ? embed() : 0) + leave_pixels() + enter_pixels());
    }

    std::uint64_t update() const {
        const std::uint64_t patch = n("patch_size");
        const std::uint64_t velocity = patch * patch * n("pixel_hidden_size") * 3;
        return sizes_.value("L") * ((is("embed") ? embed() : 0) + leave_pixels() + velocity);
    }

private:
    std::uint64_t n(const char* name) const {
        const auto found = network_.find(name);
        if (found == network_.end())
            refuse("expected a ", name,
                   " to count the work by, but the manifest has none; export the bundle again");
        return found->second;
    }
    bool is(const char* option) const { return graph_.options.count(option) > 0; }
    static std::uint64_t of(const Shape& shape, std::size_t axis) {
        return static_cast<std::uint64_t>(shape.at(axis));
    }

    // Per token: of the second half of a patch block, and so on.
    std::uint64_t leave() const {
        const std::uint64_t d = n("hidden_size");
        return d * d + 3 * d * n("mlp_hidden");
    }
    std::uint64_t gate(std::uint64_t outputs) const {
        const std::uint64_t d = n("hidden_size"), r = n("latent_hidden");
        return r * d + d * outputs + r * outputs;
    }
    std::uint64_t embed() const {
        return n("patch_size") * n("patch_size") * 3 * n("pixel_hidden_size");
    }
    std::uint64_t enter_pixels() const {
        const std::uint64_t d = n("hidden_size"), a = n("pixel_attn_size"), flat = pixel_values();
        return d * flat + flat * a + d * a + 3 * a * a;
    }
    std::uint64_t leave_pixels() const {
        const std::uint64_t flat = pixel_values();
        return n("pixel_attn_size") * flat + 4 * n("hidden_size") * flat +
               flat * 8 * n("pixel_hidden_size");
    }
    std::uint64_t pixel_values() const {
        return n("patch_size") * n("patch_size") * n("pixel_hidden_size");
    }

    const std::map<std::string, std::uint64_t>& network_;
    const std::string& gate_;
    const Graph& graph_;
    const Sizes& sizes_;
};

// By stage; the others move numbers only.
constexpr std::array<std::pair<const char*, std::uint64_t (Count::*)() const>, 8> stages{{
    {"latent", &Count::latent},
    {"caption", &Count::caption},
    {"timestep", &Count::timestep},
    {"attention", &Count::attention},
    {"tokens", &Count::tokens},
    {"pixel_first", &Count::pixel_first},
    {"pixels", &Count::pixels},
    {"update", &Count::update},
}};

std::uint64_t instruction_flop(const Manifest& manifest, const Instruction& instruction,
                               const Sizes& sizes) {
    if (std::holds_alternative<Noise>(instruction))
        return 0;
    std::uint64_t flop = 0;
    for (const Run& run : runs_of(instruction)) {
        const Graph& graph = manifest.graphs.at(run.graph);
        const Sizes local = sizes.extended(run.dims);
        for (const auto& [stage, count] : stages)
            if (graph.stage == stage)
                flop += 2 * (Count(manifest, graph, local).*count)();
    }
    return flop;
}

} // namespace

std::uint64_t section_flop(const Manifest& manifest, const std::string& section,
                           const Sizes& sizes) {
    std::uint64_t flop = 0;
    if (const auto found = manifest.program.find(section); found != manifest.program.end())
        for (const Instruction& instruction : found->second)
            flop += instruction_flop(manifest, instruction, sizes);
    return flop;
}

std::uint64_t refresh_flop(const Manifest& manifest, const std::string& input, const Sizes& sizes) {
    std::uint64_t flop = 0;
    for (const std::size_t index : manifest.dependent("prologue", {input}))
        flop += instruction_flop(manifest, manifest.program.at("prologue")[index], sizes);
    return flop;
}

} // namespace pid::core
