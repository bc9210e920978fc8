#include "decode_jobs.h"

#include <algorithm>
#include <map>
#include <set>

#include "errors.h"
#include "png_file.h"
#include "request.h"

namespace pid::cli {
namespace {

using core::refuse;

constexpr const char* caption_suffix = ".safetensors";

// Whether a file is one of latents, by its name; the second suffix is ComfyUI's.
bool is_latent_file(const Path& path) {
    return path.extension() == caption_suffix || path.extension() == ".latent" ||
           path.extension() == ".npy";
}

// In the order of their names, without hidden ones.
std::vector<Path> files_in(const Path& folder) {
    std::vector<Path> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder))
        if (entry.is_regular_file() && entry.path().filename().string()[0] != '.')
            files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    return files;
}

// All of a tensor, or what it has for one image of the file.
pid_tensor view_of(const Floats& floats, std::size_t image, bool one_of_many) {
    if (!floats.given())
        return pid_tensor{};
    pid_tensor view{};
    view.data = floats.part(image);
    view.dtype = PID_FLOAT32;
    view.rank = static_cast<std::int32_t>(floats.shape.size());
    std::copy(floats.shape.begin(), floats.shape.end(), view.shape);
    if (one_of_many)
        view.shape[0] = 1;
    return view;
}

Path target_of(const Source& source, const Arguments& arguments, std::size_t batch,
               std::size_t index) {
    Path target = arguments.output;
    if (arguments.many)
        target /= Path(source.latent.stem()) += ".png";
    if (batch == 1)
        return target;
    Path name = target.stem();
    name += "-" + std::to_string(index);
    name += target.extension();
    return target.replace_filename(name);
}

} // namespace

Inputs read_source(const core::Manifest& manifest, const Source& source,
                   const Arguments& arguments) {
    Inputs inputs = read_latent_file(source.latent, manifest, arguments.latent_key,
                                     arguments.latent_form, source.caption.empty());
    if (!source.caption.empty())
        inputs.caption = read_caption_file(source.caption, arguments.caption_key);
    if (!arguments.negative.empty())
        inputs.negative = read_negative_file(arguments.negative);
    if (arguments.sigma)
        inputs.sigma = {{*arguments.sigma}, {1}};
    return inputs;
}

pid_decode_params decode_params(const Arguments& arguments, const Inputs& inputs, std::size_t first,
                                std::size_t count, const std::uint64_t& seed) {
    pid_decode_params params{};
    params.struct_bytes = sizeof params;
    // All of a file is shown as it is: what is too much for its images must not be cut off.
    const bool one_of_many = inputs.latent.given() && count < inputs.latent.images();
    params.latent = view_of(inputs.latent, first, one_of_many);
    params.caption = view_of(inputs.caption, first, one_of_many);
    params.negative = view_of(inputs.negative, first, one_of_many);
    params.guidance = arguments.guidance.value_or(0);
    params.tile_width = arguments.tile_width;
    params.tile_height = arguments.tile_height;
    params.overlap = arguments.overlap;
    if (inputs.sigma.given()) {
        params.sigma = inputs.sigma.part(first);
        params.sigma_count = one_of_many ? 1 : inputs.sigma.images();
    }
    params.seeds = &seed;
    params.seed_count = 1;
    params.steps = arguments.steps;
    params.times = arguments.times.data();
    params.time_count = arguments.times.size();
    params.rule = arguments.rule;
    params.output = PID_UINT8;
    return params;
}

std::vector<Source> find_sources(const Arguments& arguments) {
    if (!arguments.many)
        return {{arguments.latents, arguments.caption}};
    std::vector<Source> sources;
    for (const Path& file : files_in(arguments.latents))
        if (is_latent_file(file))
            sources.push_back({file, arguments.caption});
    if (sources.empty())
        refuse("expected *.safetensors, *.latent, *.npy files, but got none in ",
               arguments.latents.string(), "; give another folder");
    if (arguments.captions.empty())
        return sources;
    for (Source& source : sources) {
        source.caption = arguments.captions / (Path(source.latent.stem()) += caption_suffix);
        if (!std::filesystem::is_regular_file(source.caption))
            refuse("expected a caption for every latent, but got no ",
                   source.caption.filename().string(), " in ", arguments.captions.string(),
                   "; add it, or use --caption FILE for all");
    }
    return sources;
}

std::string skipped_files(const Arguments& arguments) {
    std::size_t skipped = 0;
    std::set<std::string> kinds;
    const std::vector<Path> files = files_in(arguments.latents);
    for (const Path& file : files)
        if (!is_latent_file(file)) {
            ++skipped;
            kinds.insert(file.has_extension() ? file.extension().string()
                                              : file.filename().string());
        }
    if (skipped == 0)
        return "";
    return core::text_of("skipped ", skipped, " of ", files.size(), " files in ",
                         arguments.latents.string(), ": ", core::joined(kinds),
                         " is none of *.safetensors, *.latent, *.npy");
}

core::Failure about(const Source& source, const core::Failure& failure) {
    return {failure.status(), source.latent.string() + ": " + failure.what()};
}

std::vector<Job> plan_jobs(const core::Manifest& manifest, const std::vector<Source>& sources,
                           const Arguments& arguments, bool on_device) {
    std::vector<Job> jobs;
    for (const Source& source : sources) {
        const Inputs inputs = read_source(manifest, source, arguments);
        const std::size_t batch = inputs.latent.images();
        try {
            core::Request request = core::check_request(
                manifest, decode_params(arguments, inputs, 0, batch, arguments.seed), false);
            request.sizes.set("B", 1);
            const core::Plan plan = core::plan_of(manifest, request, nullptr, on_device);
            for (std::size_t index = 0; index < batch; ++index)
                jobs.push_back({source, index, target_of(source, arguments, batch, index),
                                static_cast<std::int64_t>(request.sizes.value("W")),
                                static_cast<std::int64_t>(request.sizes.value("H")),
                                request.seeds[index], request.sigmas[index], inputs.caption.given(),
                                plan});
        } catch (const core::Failure& failure) {
            throw about(source, failure);
        }
    }
    return jobs;
}

std::vector<Job> without_existing(std::vector<Job> jobs) {
    const auto exists = [](const Job& job) {
        return std::filesystem::symlink_status(job.target).type() !=
               std::filesystem::file_type::not_found;
    };
    jobs.erase(std::remove_if(jobs.begin(), jobs.end(), exists), jobs.end());
    return jobs;
}

void check_targets(const std::vector<Job>& jobs, bool overwrite) {
    std::map<Path, Path> sources;
    for (const Job& job : jobs) {
        const auto [earlier, is_new] = sources.emplace(job.target, job.source.latent);
        if (!is_new)
            refuse("expected every image to have its own name, but got ", job.target.string(),
                   " from both ", earlier->second.string(), " and ", job.source.latent.string(),
                   "; rename one of these");
        check_image_path(job.target);
        if (!overwrite && std::filesystem::symlink_status(job.target).type() !=
                              std::filesystem::file_type::not_found)
            refuse("expected a new file, but ", job.target.string(),
                   " exists; choose another name or add --overwrite");
    }
}

} // namespace pid::cli
