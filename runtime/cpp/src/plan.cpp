#include "plan.h"

#include <cstdio>

#include "denoise.h"
#include "errors.h"
#include "interpreter.h"
#include "work.h"

namespace pid::core {
namespace {

// What the loops of denoise.h run. sizes: of a tile. The timestep network is the same for a batch,
// and counted once.
double flop_of(const Manifest& manifest, const Request& request, const Sizes& sizes) {
    const auto steps = static_cast<double>(request.schedule.steps());
    const auto runs = static_cast<double>(request.calls()) / static_cast<double>(request.group());
    const auto section = [&](const char* name) {
        return static_cast<double>(section_flop(manifest, name, sizes));
    };
    const auto refreshed = [&](const char* input) {
        return static_cast<double>(refresh_flop(manifest, input, sizes));
    };
    double of_image = runs * section("step");
    if (request.is_plain()) {
        of_image += section("prologue");
    } else {
        const double latents =
            request.tiling ? steps * static_cast<double>(request.tiling->count()) : 1;
        of_image += latents * refreshed("latent");
        of_image += (request.branches.size() > request.group() ? runs : 1) * refreshed("caption");
    }
    const double times = request.schedule.moments.empty() ? 0 : steps;
    return static_cast<double>(sizes.value("B")) * of_image + times * section("timestep");
}

// A number as Python's format gives it.
std::string formatted(const char* format, double number) {
    char text[64];
    std::snprintf(text, sizeof text, format, number);
    return text;
}

std::string in_gigabytes(std::uint64_t bytes) {
    return formatted("%.2f GB", static_cast<double>(bytes) / 1e9);
}

} // namespace

Plan plan_of(const Manifest& manifest, const Request& request, const Bucket* bucket,
             bool state_on_device) {
    const Sizes sizes = request.program_sizes();
    const auto& [name, own] = manifest.bucket_for(sizes.value("L"));
    Plan plan{};
    plan.width = request.sizes.value("W");
    plan.height = request.sizes.value("H");
    plan.bucket = name;
    plan.steps = request.schedule.steps();
    plan.tiles = request.tiling ? request.tiling->count() : 1;
    plan.tile_width = sizes.value("W");
    plan.tile_height = sizes.value("H");
    plan.branches = request.branches.size();
    plan.calls = request.calls();
    const double flop = flop_of(manifest, request, sizes);
    plan.tflop = flop / 1e12;
    for (const auto& [graph_name, graph] : manifest.graphs)
        plan.device_bytes += graph.weights_bytes;
    plan.device_bytes += Program::arena_bytes(bucket == nullptr ? own : *bucket, sizes);
    if (!request.is_plain()) {
        plan.host_bytes = image_bytes(request);
        (state_on_device ? plan.device_bytes : plan.host_bytes) += state_bytes(request);
    }
    std::string pieces = "whole";
    if (request.tiling) {
        plan.reason = request.tiling->reason;
        pieces = described(*request.tiling, manifest.network.pixels_per_latent());
    }
    plan.text = text_of(plan.width, "x", plan.height, ": bucket ", plan.bucket, ", ", pieces, "; ",
                        plan.steps, " steps", plan.branches > 1 ? " and 2 branches" : "",
                        request.branches_at_once ? " at once" : "", ", ", plan.calls,
                        " calls of the network, ", formatted("%.4g", plan.tflop), " TFLOP; device ",
                        in_gigabytes(plan.device_bytes), " and what graphs work in, host ",
                        in_gigabytes(plan.host_bytes));
    return plan;
}

} // namespace pid::core
