// What pid-decode-cpp is to do: found and checked in full before the first decode.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "arguments.h"
#include "bundle/manifest.h"
#include "errors.h"
#include "latent_files.h"
#include "plan.h"

namespace pid::cli {

// A latent file and the file of its caption, "" if that is not another one.
struct Source {
    Path latent;
    Path caption;
};

// The content of a source, with what the arguments say in its place.
using Inputs = LatentFile;
Inputs read_source(const core::Manifest& manifest, const Source& source,
                   const Arguments& arguments);

// Parameters of a decode of some images of these inputs, which they borrow.
// first, count: which images of the batch; count is 1 or all of them.
pid_decode_params decode_params(const Arguments& arguments, const Inputs& inputs, std::size_t first,
                                std::size_t count, const std::uint64_t& seed);

// A failure, with the latent it is about in front of its message.
core::Failure about(const Source& source, const core::Failure& failure);

// One image to decode.
struct Job {
    Source source;
    std::size_t index; // of the image in its file
    Path target;
    std::int64_t width;
    std::int64_t height;
    std::uint64_t seed;
    float sigma;
    bool has_caption;
    core::Plan plan; // of the decode of this one image
};

// Pair latents with captions; the latents of a folder in the order of their names.
// Refuses a folder without latents, or a latent without its caption file.
std::vector<Source> find_sources(const Arguments& arguments);

// What to say of files in a folder of latents that find_sources() leaves out; "" if there are none.
std::string skipped_files(const Arguments& arguments);

// Read every source, check it against the bundle, and list the images to make of it.
// Refuses an input that does not fit. on_device: whether they are made on a GPU.
std::vector<Job> plan_jobs(const core::Manifest& manifest, const std::vector<Source>& sources,
                           const Arguments& arguments, bool on_device);

// The jobs whose image is not there yet.
std::vector<Job> without_existing(std::vector<Job> jobs);

// Refuse unless every image may be written, under a name of its own.
void check_targets(const std::vector<Job>& jobs, bool overwrite);

} // namespace pid::cli
