// The engines of a bundle: `engines` of the manifest, and which engine runs what.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "bundle/manifest.h"
#include "bundle/sizes.h"

namespace pid::core {

// Sizes an engine takes: smallest, best and largest of every symbol but B, which is always 1.
using Profile = std::map<std::string, std::array<std::uint64_t, 3>>;

// One engine file.
struct Engine {
    // Its name in the set's folder.
    std::string file;
    std::uint64_t bytes;
    std::string sha256;
    // SHA-256 of all it was built from.
    std::string key;
    std::string graph_sha256;
    std::string weights_sha256;
    // Its optimisation profiles, in the engine's order.
    std::vector<Profile> profiles;
    // Device memory of its weights.
    std::uint64_t weights_bytes;
    // Device memory an execution context works in, per profile.
    std::vector<std::uint64_t> scratch_bytes;
    bool bf16_island;
};

// A bucket as engines run it: its arena has a place for every instruction's scratch too, where no
// buffer is in use while the instruction runs.
struct EngineBucket : Bucket {
    // Device memory of a decode of one image: weights and arena.
    std::uint64_t peak_device_bytes;
};

// Engines of every graph, built together.
struct EngineSet {
    std::string name;
    // "tensorrt" or "tensorrt-rtx"
    std::string flavor;
    // Of the library that built it: 1.7.1.116.
    std::string version;
    // GPU architectures it runs on: sm86.
    std::vector<std::string> targets;
    // Later versions of the library run it too.
    bool version_compatible;
    std::map<std::string, std::vector<Engine>> graphs;
    // The buckets it was built for.
    std::map<std::string, EngineBucket> buckets;
    // What it runs in place of the bundle's program, and its buffers; empty if it runs that one.
    std::map<std::string, Buffer> buffers;
    std::map<std::string, std::vector<Instruction>> program;

    // The bundle's manifest with the buffers and the program that this set runs.
    Manifest run_by(const Manifest& manifest) const;

    // The command that builds such a set anew.
    std::string build_command(const std::filesystem::path& bundle) const;
};

// An engine, and the number of its profile.
struct EngineUse {
    const Engine* engine;
    int profile;
};

// The first engine, and profile, for a call of a graph at these sizes. Refuses sizes that are in no
// profile.
EngineUse engine_for(const EngineSet& set, const std::string& graph, const Sizes& sizes);

// The folder of an engine set's files.
std::filesystem::path engine_folder(const std::filesystem::path& bundle, const std::string& set);

// The engine sets of a manifest, in its order, without those of flavors this version does not know.
// Refuses a section that contradicts itself or the bundle.
std::vector<EngineSet> read_engine_sets(const Manifest& manifest);

// The first engine set that a library and a GPU run; with `wanted`, that one. Refuses when there is
// none, and a set that is not of the bundle as it is. version: of the library. target: the GPU's
// architecture. verify: hash the files; otherwise only their sizes are compared.
EngineSet choose_engines(const std::filesystem::path& bundle, const Manifest& manifest,
                         const std::string& wanted, const std::string& flavor,
                         const std::string& version, const std::string& target, bool verify);

} // namespace pid::core
