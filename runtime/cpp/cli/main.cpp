// pid-decode-cpp: latents in files to PNG files, as pid-decode does in Python.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <new>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include <nlohmann/json.hpp>

#include "advice.h"
#include "arguments.h"
#include "bundle/files.h"
#include "bundle/folder.h"
#include "console.h"
#include "decode_jobs.h"
#include "decoder.h"
#include "errors.h"
#include "latents.h"
#include "parallel.h"
#include "png_file.h"
#include "request.h"

namespace pid::cli {
namespace {

using core::refuse;
using Clock = std::chrono::steady_clock;

// A folder of which nothing is left if nothing was put into it.
class Folder {
public:
    explicit Folder(Path path) : path_(std::move(path)) {
        std::error_code error;
        made_ = std::filesystem::create_directory(path_, error);
        if (std::filesystem::is_directory(path_))
            return;
        if (std::filesystem::exists(path_))
            refuse("expected a folder for the images, but ", path_.string(),
                   " is a file; choose another name");
        refuse("expected to make the folder ", path_.string(), ", but got: ", error.message(),
               "; choose another place");
    }
    ~Folder() {
        std::error_code ignored;
        if (made_)
            std::filesystem::remove(path_, ignored); // refused unless it is empty
    }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;

private:
    Path path_;
    bool made_ = false;
};

// Lets interrupts cancel this decoder while it lives.
class Cancellable {
public:
    explicit Cancellable(core::Decoder& decoder) { cancel_when_interrupted(&decoder.cancelled()); }
    ~Cancellable() { cancel_when_interrupted(nullptr); }
    Cancellable(const Cancellable&) = delete;
    Cancellable& operator=(const Cancellable&) = delete;
};

void check_kinds(const Arguments& arguments) {
    if (!arguments.many && std::filesystem::is_directory(arguments.latents))
        refuse("expected a file for --latent, but ", arguments.latents.string(),
               " is a folder; use --latents");
    if (std::filesystem::is_directory(arguments.caption))
        refuse("expected a file for --caption, but ", arguments.caption.string(),
               " is a folder; use --captions");
    if (std::filesystem::is_directory(arguments.negative))
        refuse("expected a file for --negative, but ", arguments.negative.string(),
               " is a folder; give a file made by pid-caption");
    if (arguments.many && !std::filesystem::is_directory(arguments.latents))
        refuse("expected a folder for --latents, but ", arguments.latents.string(), " is none");
    if (!arguments.captions.empty() && !std::filesystem::is_directory(arguments.captions))
        refuse("expected a folder for --captions, but ", arguments.captions.string(), " is none");
}

// What a decode of the size that times shift by visits. Refuses what the bundle does not do.
core::Schedule check_sampling(const Arguments& arguments, const core::Manifest& manifest) {
    if (!arguments.negative.empty())
        read_negative_file(arguments.negative);
    core::Schedule schedule = core::check_schedule(
        manifest.sampler, decode_params(arguments, Inputs(), 0, 0, arguments.seed));
    core::check_guidance(manifest, arguments.guidance, !arguments.negative.empty());
    if (arguments.overlap != -1 && arguments.tile_width == 0 && arguments.tile_height == 0)
        refuse("expected --tile with --overlap, but got none; add --tile auto");
    return schedule;
}

// What runs but not as well as it could, each line once.
void warn(const core::Model& model, const std::vector<Job>& jobs) {
    const auto largest = std::max_element(
        jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.sigma < b.sigma; });
    std::set<std::string> told;
    for (const Job& job : jobs)
        for (const std::string& line :
             core::advice(model, job.width, job.height, largest->sigma, true))
            if (told.insert(line).second)
                print_warning(line);
    const auto bare =
        std::count_if(jobs.begin(), jobs.end(), [](const Job& job) { return !job.has_caption; });
    if (bare > 0 && model.captioned)
        print_warning(core::text_of(bare, " of ", jobs.size(),
                                    " images have no caption and get the empty embedding (zeros), "
                                    "which costs quality; give the prompt's embedding, made by "
                                    "pid-caption, by --caption"));
}

const char* device_of(const Arguments& arguments) {
    if (!arguments.device.empty())
        return arguments.device.c_str();
    return arguments.backend.rfind("tensorrt", 0) == 0 ? "cuda:0" : "cpu";
}

double rounded_sigma(const Job& job) {
    return std::round(static_cast<double>(job.sigma) * 1e6) / 1e6;
}

// How images are made, for the result and for the images themselves.
nlohmann::ordered_json making_of(const Arguments& arguments, const core::Sampler& sampler,
                                 const core::Schedule& schedule) {
    nlohmann::ordered_json times;
    if (!arguments.times.empty())
        times = arguments.times;
    nlohmann::ordered_json making{
        {"bundle_sha256", core::file_sha256(arguments.bundle / core::manifest_file)},
        {"backend", arguments.backend},
        {"device", device_of(arguments)},
        {"steps", schedule.steps()},
        {"times", times},
        {"rule", core::rules[static_cast<std::size_t>(schedule.rule)]}};
    if (const double guidance = arguments.guidance.value_or(sampler.guidance); guidance != 1)
        making["guidance"] = guidance;
    if (!arguments.negative.empty())
        making["negative"] = arguments.negative.string();
    if (arguments.tile_width == PID_TILE_AUTO)
        making["tile"] = "auto";
    else if (arguments.tile_width != 0)
        making["tile"] = {arguments.tile_width, arguments.tile_height};
    if (arguments.overlap != -1)
        making["overlap"] = arguments.overlap;
    return making;
}

std::string text_of_json(const nlohmann::ordered_json& json) {
    const auto replace = nlohmann::ordered_json::error_handler_t::replace; // paths may be any bytes
    return json.dump(-1, ' ', false, replace);
}

// What an image says of its making.
PngTexts texts_of(const core::Manifest& manifest, const nlohmann::ordered_json& making,
                  const Job& job) {
    nlohmann::ordered_json record{{"model", manifest.model.name},
                                  {"precision", manifest.precision}};
    record.update(making);
    record.update({{"seed", job.seed},
                   {"sigma", rounded_sigma(job)},
                   {"width", job.width},
                   {"height", job.height}});
    if (!manifest.model.weights_license.empty())
        record["weights_license"] = manifest.model.weights_license;
    return {{"Software", "pid-trt " PID_VERSION}, {"pid-trt", text_of_json(record)}};
}

// Decode and write every image; the seconds of each decode.
std::vector<double> run(core::Decoder& decoder, const std::vector<Job>& jobs,
                        const Arguments& arguments, const nlohmann::ordered_json& making,
                        Progress& progress) {
    std::vector<double> seconds;
    Inputs inputs;
    for (const Job& job : jobs) {
        if (job.index == 0)
            inputs = read_source(decoder.manifest(), job.source, arguments);
        if (job.index == 0 && !inputs.note.empty() && !arguments.quiet)
            print_note(job.source.latent.string() + ": " + inputs.note);
        const std::size_t count = inputs.latent.values.size() / inputs.latent.images();
        const std::string spread =
            core::spread_warning(decoder.manifest().model, inputs.latent.part(job.index), count);
        if (!spread.empty())
            print_warning(job.source.latent.string() + ": " + spread);
        core::Request request = core::check_request(
            decoder.manifest(), decode_params(arguments, inputs, job.index, 1, job.seed), false);
        std::vector<std::uint8_t> pixels(static_cast<std::size_t>(job.width * job.height) * 3);
        const auto begin = Clock::now();
        const auto advance = [&](std::int32_t, std::int32_t calls) {
            progress.advance(1.0 / calls);
            return true;
        };
        try {
            decoder.decode(std::move(request), PID_UINT8, {pixels.data(), PID_HOST}, advance);
        } catch (const core::Failure& failure) {
            if (failure.status() != PID_ERROR_INPUT)
                throw;
            throw about(job.source, failure);
        }
        seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
        const PngTexts texts =
            arguments.metadata ? texts_of(decoder.manifest(), making, job) : PngTexts();
        save_png(job.target, pixels.data(), static_cast<std::size_t>(job.height),
                 static_cast<std::size_t>(job.width), texts);
    }
    return seconds;
}

void report(const Arguments& arguments, const nlohmann::ordered_json& making,
            const std::vector<Job>& jobs, const std::vector<double>& seconds, std::size_t planned) {
    nlohmann::ordered_json images = nlohmann::ordered_json::array();
    std::string lines;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        const Job& job = jobs[i];
        images.push_back({{"latent", job.source.latent.string()},
                          {"index", job.index},
                          {"image", job.target.string()},
                          {"width", job.width},
                          {"height", job.height},
                          {"seed", job.seed},
                          {"sigma", rounded_sigma(job)},
                          {"seconds", std::round(seconds[i] * 1e4) / 1e4}});
        char taken[32];
        std::snprintf(taken, sizeof taken, "%.2f", seconds[i]);
        lines += core::text_of(lines.empty() ? "" : "\n", job.target.string(), ": ", job.width, "x",
                               job.height, ", seed ", job.seed, ", ", taken, " s");
    }
    if (const std::size_t skipped = planned - jobs.size(); skipped > 0)
        lines += core::text_of(lines.empty() ? "" : "\n", skipped, " of ", planned,
                               " images were there already");
    nlohmann::ordered_json result{{"bundle", arguments.bundle.string()}};
    result.update(making);
    result["images"] = images;
    result["skipped"] = planned - jobs.size();
    result["failed"] = nlohmann::ordered_json::array(); // Python on a cluster may go on
    print_line(arguments.json ? text_of_json(result) : lines);
}

// What every image would take.
void show_plans(const Arguments& arguments, const std::vector<Job>& jobs) {
    nlohmann::ordered_json plans = nlohmann::ordered_json::array();
    std::string lines;
    for (const Job& job : jobs) {
        const core::Plan& plan = job.plan;
        nlohmann::ordered_json reason;
        if (plan.reason)
            reason = *plan.reason;
        plans.push_back({{"latent", job.source.latent.string()},
                         {"width", plan.width},
                         {"height", plan.height},
                         {"bucket", plan.bucket},
                         {"steps", plan.steps},
                         {"tiles", plan.tiles},
                         {"tile", {plan.tile_width, plan.tile_height}},
                         {"branches", plan.branches},
                         {"calls", plan.calls},
                         {"tflop", plan.tflop},
                         {"device_bytes", plan.device_bytes},
                         {"host_bytes", plan.host_bytes},
                         {"reason", reason},
                         {"text", plan.text}});
        lines +=
            core::text_of(lines.empty() ? "" : "\n", job.source.latent.string(), ": ", plan.text);
    }
    const nlohmann::ordered_json result{{"bundle", arguments.bundle.string()}, {"plans", plans}};
    print_line(arguments.json ? text_of_json(result) : lines);
}

void decode(const Arguments& arguments) {
    check_kinds(arguments);
    const core::Manifest manifest = core::read_manifest(arguments.bundle, false, 1);
    const core::Schedule schedule = check_sampling(arguments, manifest);
    std::vector<Job> jobs = plan_jobs(manifest, find_sources(arguments), arguments,
                                      std::string_view(device_of(arguments)) != "cpu");
    if (arguments.plan) {
        show_plans(arguments, jobs);
        return;
    }
    const std::size_t planned = jobs.size();
    if (arguments.skip_existing)
        jobs = without_existing(std::move(jobs));
    const nlohmann::ordered_json making = making_of(arguments, manifest.sampler, schedule);
    if (jobs.empty()) {
        report(arguments, making, jobs, {}, planned);
        return;
    }
    std::optional<Folder> folder;
    if (arguments.many)
        folder.emplace(arguments.output);
    check_targets(jobs, arguments.overwrite);
    core::BackendOptions options{};
    options.backend = arguments.backend;
    options.device = arguments.device;
    options.provider_library = arguments.provider_library;
    options.engine_set = arguments.engine_set;
    options.threads = arguments.threads == 0 ? core::core_count() : arguments.threads;
    options.verify = arguments.verify;
    core::RunOptions run_options;
    run_options.cuda_graphs = arguments.cuda_graphs;
    if (!arguments.quiet)
        run_options.log = [](pid_log_level, const std::string& line) {
            if (line.rfind(core::tiles_note, 0) == 0) // what is to be warned of, warn() says
                print_note(line);
        };
    core::Decoder decoder(std::make_shared<core::Bundle>(arguments.bundle, options), run_options);
    throw_if_interrupted();
    const Cancellable cancellable(decoder);
    if (const std::string skipped = arguments.many ? skipped_files(arguments) : "";
        !skipped.empty())
        print_warning(skipped);
    warn(manifest.model, jobs);
    std::vector<double> seconds;
    {
        Progress progress(static_cast<double>(jobs.size()), arguments.quiet);
        seconds = run(decoder, jobs, arguments, making, progress);
    }
    report(arguments, making, jobs, seconds, planned);
}

int run_command(int count, char** words) {
    try {
        const std::vector<std::string> given(words + std::min(count, 1), words + count);
        if (const auto arguments = parse_arguments(given)) {
            catch_interrupts();
            decode(*arguments);
        }
        return 0;
    } catch (const ReaderLeft&) {
        return broken_pipe;
    } catch (const core::Failure& failure) {
        if (failure.status() == PID_ERROR_CANCELLED)
            return fail("interrupted", interrupted);
        return fail(failure.what());
    } catch (const std::filesystem::filesystem_error& error) {
        return fail("cannot use " + error.path1().string() + ": " + error.code().message());
    } catch (const std::bad_alloc&) {
        return fail("expected more memory, but there is none left; decode a smaller latent");
    }
}

} // namespace
} // namespace pid::cli

// NOLINTNEXTLINE(bugprone-exception-escape): only of bugs, which may end the process
int main(int count, char** words) {
    return pid::cli::run_command(count, words);
}
