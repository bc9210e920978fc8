#include "request.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>

#include "backends/memory.h"
#include "errors.h"
#include "interpreter.h"
#include "latents.h"

namespace pid::core {
namespace {

struct FloatKind {
    pid_dtype dtype;
    std::size_t bytes;
};

constexpr std::array<FloatKind, 4> floats{
    {{PID_FLOAT32, 4}, {PID_FLOAT16, 2}, {PID_BFLOAT16, 2}, {PID_FLOAT64, 8}}};

[[noreturn]] void refuse_shape(const std::string& name, const SymbolicShape& wanted,
                               const Shape& shape, const std::string& fix) {
    std::string letters;
    for (const Size& size : wanted) {
        const auto* symbol = std::get_if<std::string>(&size);
        letters += (letters.empty() ? "" : ", ") +
                   (symbol != nullptr ? *symbol : std::to_string(std::get<std::uint64_t>(size)));
    }
    refuse("expected ", name, " shape [", letters, "], but got ", text_of_shape(shape), "; ", fix);
}

// The shape of a tensor that is given. wanted: letters stand for any size but 0.
Shape check_shape(const pid_tensor& tensor, const std::string& name, const SymbolicShape& wanted,
                  const std::string& fix) {
    if (tensor.rank < 0 || tensor.rank > PID_MAX_RANK)
        refuse("expected a ", name, " of at most ", PID_MAX_RANK, " axes, but got rank ",
               tensor.rank, "; ", fix);
    Shape shape(tensor.shape, tensor.shape + tensor.rank);
    bool fits = shape.size() == wanted.size();
    for (std::size_t axis = 0; fits && axis < shape.size(); ++axis) {
        const auto* number = std::get_if<std::uint64_t>(&wanted[axis]);
        fits = shape[axis] > 0 &&
               (number == nullptr || static_cast<std::uint64_t>(shape[axis]) == *number);
    }
    if (!fits)
        refuse_shape(name, wanted, shape, fix);
    return shape;
}

std::vector<float> convert(const void* data, pid_dtype dtype, std::size_t count) {
    std::vector<float> values(count);
    const auto* halves = static_cast<const std::uint16_t*>(data);
    const auto* doubles = static_cast<const double*>(data);
    for (std::size_t i = 0; i < count; ++i) {
        if (dtype == PID_FLOAT64)
            values[i] = static_cast<float>(doubles[i]);
        else
            values[i] =
                dtype == PID_FLOAT16 ? float_of_half(halves[i]) : float_of_bfloat16(halves[i]);
    }
    return values;
}

// A tensor whose shape was checked, as float32.
Input check_values(const pid_tensor& tensor, const std::string& name, Shape shape,
                   bool has_device) {
    const auto* kind = std::find_if(floats.begin(), floats.end(), [&](const FloatKind& each) {
        return each.dtype == tensor.dtype;
    });
    if (kind == floats.end())
        refuse("expected ", name,
               " values of float32, float16, bfloat16 or float64, but got others; convert them");
    std::uint64_t bytes = kind->bytes;
    for (const std::int64_t size : shape)
        bytes = product(bytes, static_cast<std::uint64_t>(size));
    if (bytes >= too_much)
        refuse("expected a ", name, " that fits in memory, but got shape ", text_of_shape(shape));
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % kind->bytes != 0)
        refuse("expected ", name, " values aligned to ", kind->bytes,
               " bytes, but got the address ", tensor.data, "; copy them");
    Input input{tensor.data, tensor.memory, std::move(shape), {}};
    if (tensor.memory == PID_CUDA) {
        if (!has_device)
            refuse("expected ", name,
                   " in host memory, but got it on a GPU; copy it, or decode on a GPU");
        if (tensor.dtype != PID_FLOAT32)
            refuse("expected ", name, " on a GPU to be float32, but got others; convert it");
        return input;
    }
    if (tensor.memory != PID_HOST)
        refuse("expected ", name, " in memory PID_HOST or PID_CUDA, but got ",
               static_cast<int>(tensor.memory));
    if (tensor.dtype != PID_FLOAT32) {
        input.converted = convert(tensor.data, tensor.dtype, count_of(input.shape));
        input.data = input.converted.data();
    }
    if (!all_finite(static_cast<const float*>(input.data), count_of(input.shape)))
        refuse("expected a finite ", name,
               ", but it holds NaN or infinity; look at the step that made it");
    return input;
}

// The caption embedding that stands for none: zeros [1, text_max_length, text_dim].
Input empty_caption(const Network& network) {
    Input caption;
    caption.shape = {1, static_cast<std::int64_t>(network.text_max_length),
                     static_cast<std::int64_t>(network.text_dim)};
    caption.converted.resize(count_of(caption.shape));
    caption.data = caption.converted.data();
    return caption;
}

// name: "caption" or "negative".
Input check_caption(const Manifest& manifest, const char* name, const pid_tensor& tensor,
                    std::uint64_t batch, bool has_device) {
    const Network& network = manifest.network;
    if (tensor.data == nullptr)
        return empty_caption(network);
    const SymbolicShape wanted{"B", "T", network.text_dim};
    const std::string fix = text_of("B is 1 or that of the latent, ", batch, ", and T at most ",
                                    network.text_max_length);
    Shape shape = check_shape(tensor, name, wanted, fix);
    const auto images = static_cast<std::uint64_t>(shape[0]);
    if ((images != 1 && images != batch) ||
        static_cast<std::uint64_t>(shape[1]) > network.text_max_length)
        refuse_shape(name, wanted, shape, fix);
    return check_values(tensor, name, std::move(shape), has_device);
}

std::vector<Branch> check_branches(const Manifest& manifest, const pid_decode_params& params,
                                   double guidance, std::uint64_t batch, bool has_device) {
    std::vector<Branch> branches;
    Input caption = check_caption(manifest, "caption", params.caption, batch, has_device);
    if (guidance != 1) {
        Input other = check_caption(manifest, "negative", params.negative, batch, has_device);
        if (other.shape[1] != caption.shape[1])
            refuse("expected a negative of as many tokens as the caption, ", caption.shape[1],
                   ", but got ", other.shape[1], "; make both with pid-caption");
        branches.push_back({std::move(other), 1 - guidance});
    }
    branches.push_back({std::move(caption), guidance});
    return branches;
}

// "" or " or B", after "expected one sigma".
std::string or_more(std::uint64_t batch) {
    return batch == 1 ? "" : text_of(" or ", batch);
}

std::vector<float> check_sigmas(const Model& model, const pid_decode_params& params,
                                std::uint64_t batch) {
    if (params.sigma_count == 0)
        return std::vector<float>(batch, 0.0F);
    if ((params.sigma_count != 1 && params.sigma_count != batch) || params.sigma == nullptr)
        refuse("expected one sigma", or_more(batch), ", but got ",
               params.sigma == nullptr ? 0 : params.sigma_count, "; give one per image");
    const std::vector<float> given(params.sigma, params.sigma + params.sigma_count);
    for (const float sigma : given)
        if (!(sigma >= 0 && sigma <= 1))
            refuse("expected sigma in [0, 1], but got [", joined(given), "]; 0 is a clean latent",
                   model.is_euler ? ", and for x0 + sigma noise divide latent and sigma by "
                                    "sqrt(sigma^2 + 1) first"
                                  : "");
    return given.size() == batch ? given : std::vector<float>(batch, given[0]);
}

std::vector<std::uint64_t> check_seeds(const pid_decode_params& params, std::uint64_t batch) {
    std::vector<std::uint64_t> seeds(batch);
    if (params.seed_count > 1 || (params.seed_count == 1 && params.seeds == nullptr)) {
        if (params.seed_count != batch || params.seeds == nullptr)
            refuse("expected one seed", or_more(batch), ", but got ",
                   params.seeds == nullptr ? 0 : params.seed_count);
        std::copy_n(params.seeds, batch, seeds.begin());
        return seeds;
    }
    const std::uint64_t first = params.seed_count == 1 ? params.seeds[0] : 0;
    for (std::uint64_t image = 0; image < batch; ++image)
        seeds[image] = first + image; // modulo 2^64
    return seeds;
}

// The noise image of every draw.
std::vector<Input> check_noises(const pid_decode_params& params, const Sizes& sizes,
                                const Schedule& schedule, bool has_device) {
    const std::size_t steps = schedule.steps();
    std::vector<pid_tensor> given(steps + 1); // the last one is multiplied by 0
    given[0] = params.noise;
    if (params.step_noise_count > 0 && schedule.rule == PID_SDE) { // others add none
        if (params.step_noise_count != steps - 1 || params.step_noise == nullptr)
            refuse("expected ", steps - 1,
                   " step noises, one after every step but the last, but got ",
                   params.step_noise == nullptr ? 0 : params.step_noise_count);
        std::copy_n(params.step_noise, steps - 1, given.begin() + 1);
    }
    const SymbolicShape wanted{sizes.value("B"), std::uint64_t{3}, sizes.value("H"),
                               sizes.value("W")};
    std::vector<Input> noises;
    for (const pid_tensor& tensor : given) {
        if (tensor.data == nullptr)
            noises.emplace_back();
        else
            noises.push_back(
                check_values(tensor, "noise",
                             check_shape(tensor, "noise", wanted, "it has the shape of the images"),
                             has_device));
    }
    return noises;
}

// Refuse a latent of a height and width that no bucket holds.
void check_fits(const Manifest& manifest, std::uint64_t height, std::uint64_t width) {
    const Network& network = manifest.network;
    const std::uint64_t budget = most_tokens(manifest.buckets);
    const std::uint64_t tokens = product(product(height, width), network.least_tokens());
    if (tokens <= budget)
        return;
    const std::uint64_t most = budget / network.least_tokens();
    const double scale = std::sqrt(static_cast<double>(most) /
                                   (static_cast<double>(height) * static_cast<double>(width)));
    const auto scaled = [&](std::uint64_t side) {
        return static_cast<std::uint64_t>(std::floor(static_cast<double>(side) * scale));
    };
    const std::uint64_t rows = std::max<std::uint64_t>(1, std::min(most, scaled(height)));
    const std::uint64_t columns = std::max<std::uint64_t>(1, std::min(scaled(width), most / rows));
    const std::uint64_t side = network.pixels_per_latent();
    refuse("expected an image of at most ", manifest.megapixels(budget),
           ", the largest bucket of this bundle, but got ", product(side, width), "x",
           product(side, height), "; the largest of this shape is ", side * columns, "x",
           side * rows, ", of a latent of height ", rows, " and width ", columns,
           "; or export with --buckets large=", tokens, ", or decode in tiles (tile auto)");
}

// The sizes of the images and their tiles.
std::pair<Sizes, std::optional<Tiling>> check_size(const Manifest& manifest,
                                                   const pid_decode_params& params) {
    const Network& network = manifest.network;
    const pid_tensor& latent = params.latent;
    if (latent.data == nullptr)
        refuse("expected a latent, but got none; this bundle takes ", latents_of(manifest.model));
    const bool has_axes = latent.rank > 0 && latent.rank <= PID_MAX_RANK;
    const std::string fix =
        shape_hint(manifest, Shape(latent.shape, latent.shape + (has_axes ? latent.rank : 0)));
    const Shape shape =
        check_shape(latent, "latent", {"B", network.latent_channels, "h", "w"}, fix);
    const auto size = [&](std::size_t axis) { return static_cast<std::uint64_t>(shape[axis]); };
    std::optional<Tiling> tiling = tiling_of(manifest, size(2), size(3), params);
    if (!tiling)
        check_fits(manifest, size(2), size(3));
    Sizes sizes = Sizes::of_request(network, size(0), size(2), size(3), 1, 1);
    const Sizes run = tiling ? sizes.resized(tiling->rows.tile, tiling->columns.tile) : sizes;
    Program::arena_bytes(manifest.bucket_for(run.value("L")).second, run);
    return {std::move(sizes), std::move(tiling)};
}

void check_calls(const Request& request) {
    if (request.calls() > std::numeric_limits<std::int32_t>::max())
        refuse("expected at most ", std::numeric_limits<std::int32_t>::max(),
               " calls of the network, but got ", request.calls(), "; give larger tiles");
}

} // namespace

Sizes Request::program_sizes() const {
    Sizes found = tiling ? sizes.resized(tiling->rows.tile, tiling->columns.tile) : sizes;
    found.set("B", group() * sizes.value("B"));
    return found;
}

std::int64_t Request::calls() const {
    return static_cast<std::int64_t>(schedule.steps() * (tiling ? tiling->count() : 1) *
                                     branches.size());
}

bool Request::is_plain() const {
    return !tiling && branches.size() == 1 && schedule.rule != PID_DPMPP_2M;
}

double check_guidance(const Manifest& manifest, std::optional<double> guidance, bool has_negative) {
    const Model& model = manifest.model;
    if (model.distilled && (has_negative || guidance.value_or(1) != 1)) {
        std::string given = shown(guidance.value_or(1));
        if (const std::size_t end = given.rfind(".0"); end + 2 == given.size())
            given.resize(end);
        refuse("expected no guidance, which ", model.name,
               " has learned at its distillation, but got ",
               has_negative ? "a negative caption" : "guidance " + given, "; drop it");
    }
    const double asked = guidance.value_or(manifest.sampler.guidance);
    if (has_negative && !guidance && asked == 1)
        refuse("expected guidance with the negative caption, but got none; give for example 5");
    if (!(1 <= asked && asked <= largest_guidance))
        refuse("expected guidance from 1 to ", largest_guidance, ", but got ", shown(asked),
               "; 5 is usual");
    if (asked != 1 && !has_negative)
        refuse("expected a negative caption for guidance ", asked,
               ", but got none; give one, made by pid-caption of an empty text for example, or "
               "guidance 1");
    return asked;
}

Sizes check_sizes(const Manifest& manifest, const pid_decode_params& params) {
    return check_size(manifest, params).first;
}

std::optional<Tiling> smaller_tiles(const Manifest& manifest, const Request& request) {
    const std::uint64_t most = request.program_sizes().value("L") / 2;
    return automatic(manifest, request.sizes.value("h"), request.sizes.value("w"), request.overlap,
                     "memory is short", std::min(most, most_tokens(manifest.buckets)));
}

Request check_request(const Manifest& manifest, const pid_decode_params& params, bool has_device) {
    const auto given = params.guidance == 0 ? std::nullopt : std::optional<double>(params.guidance);
    const double guidance = check_guidance(manifest, given, params.negative.data != nullptr);
    auto [sizes, tiling] = check_size(manifest, params);
    const std::uint64_t batch = sizes.value("B");
    const ImageSize image{sizes.value("W"), sizes.value("H")};
    Schedule schedule = check_schedule(manifest.sampler, params, &image);
    Input latent = check_values(params.latent, "latent",
                                Shape(params.latent.shape, params.latent.shape + 4), has_device);
    std::vector<Branch> branches = check_branches(manifest, params, guidance, batch, has_device);
    std::vector<float> sigmas = check_sigmas(manifest.model, params, batch);
    std::vector<std::uint64_t> seeds = check_seeds(params, batch);
    const std::size_t times = manifest.sampler.times.size();
    sizes = Sizes::of_request(manifest.network, batch, sizes.value("h"), sizes.value("w"),
                              static_cast<std::uint64_t>(branches[0].caption.shape[1]),
                              times > 0 ? times : schedule.steps());
    std::vector<Input> noises = check_noises(params, sizes, schedule, has_device);
    Request request{std::move(sizes),
                    std::move(schedule),
                    std::move(latent),
                    std::move(branches),
                    params.caption.data != nullptr,
                    std::move(sigmas),
                    std::move(seeds),
                    std::move(noises),
                    std::move(tiling),
                    overlap_of(manifest, params),
                    is_automatic(params)};
    check_calls(request);
    return request;
}

Request outline_request(const Manifest& manifest, std::int64_t height, std::int64_t width,
                        std::int64_t batch, const pid_decode_params& params) {
    const Network& network = manifest.network;
    const auto side = static_cast<std::int64_t>(network.pixels_per_latent());
    if (std::min(height, width) < 1 || height % side != 0 || width % side != 0)
        refuse("expected sides in multiples of ", side, " pixels, but got ", width, "x", height,
               "; ", side, " pixels are one of the latent");
    const auto given = params.guidance == 0 ? std::nullopt : std::optional<double>(params.guidance);
    const double wanted = given.value_or(manifest.sampler.guidance);
    const double guidance = check_guidance(manifest, given, wanted != 1);
    const float zero = 0; // not looked at
    const std::array<std::int64_t, 4> shape{
        batch, static_cast<std::int64_t>(network.latent_channels), height / side, width / side};
    pid_decode_params own = params;
    own.latent = pid_host_tensor(&zero, PID_FLOAT32, 4, shape.data());
    auto [sizes, tiling] = check_size(manifest, own);
    const ImageSize image{sizes.value("W"), sizes.value("H")};
    Request request{};
    request.schedule = check_schedule(manifest.sampler, own, &image);
    const std::size_t times = manifest.sampler.times.size();
    request.sizes =
        Sizes::of_request(network, sizes.value("B"), sizes.value("h"), sizes.value("w"),
                          network.text_max_length, times > 0 ? times : request.schedule.steps());
    request.branches.resize(guidance == 1 ? 1 : 2);
    request.tiling = std::move(tiling);
    request.overlap = overlap_of(manifest, own);
    request.is_automatic = is_automatic(own);
    check_calls(request);
    return request;
}

} // namespace pid::core
