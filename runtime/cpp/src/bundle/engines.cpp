#include "bundle/engines.h"

#include <algorithm>
#include <set>
#include <system_error>
#include <utility>

#include "bundle/files.h"
#include "bundle/json_reader.h"
#include "bundle/manifest_check.h"
#include "bundle/manifest_json.h"
#include "errors.h"

namespace pid::core {
namespace {

std::string command_for(const std::filesystem::path& bundle, const std::string& flavor,
                        const std::string& targets) {
    return "pid-build " + bundle.string() + " --flavor " + flavor + " --target " + targets;
}

template <typename Got>
void expect(bool condition, const std::string& wanted, const Got& got) {
    require(condition, wanted, got, "build the engines again with pid-build BUNDLE --force");
}

// Whether a text is an architecture such as sm86.
bool is_target(const std::string& text) {
    return (text.size() == 4 || text.size() == 5) && text.rfind("sm", 0) == 0 &&
           std::all_of(text.begin() + 2, text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

Profile read_profile(const Json& value, const std::string& where) {
    Profile profile;
    for (const auto& [symbol, sizes] : object(value, where).items()) {
        std::array<std::uint64_t, 3> range{};
        expect(list(sizes, where).size() == range.size(),
               "smallest, best and largest sizes of " + where, sizes.size());
        for (std::size_t i = 0; i < range.size(); ++i)
            range[i] = integer(sizes[i], where);
        profile[plain_name(symbol, where)] = range;
    }
    return profile;
}

Engine read_engine(const Json& value, const std::string& where) {
    object(value, where);
    const auto text_member = [&](const char* name) {
        return text(member(value, name, where), where + ", " + name);
    };
    const auto integer_member = [&](const char* name) {
        return integer(member(value, name, where), where + ", " + name);
    };
    Engine engine;
    engine.file = text_member("file");
    engine.bytes = integer_member("bytes");
    engine.sha256 = text_member("sha256");
    engine.key = text_member("key");
    engine.graph_sha256 = text_member("graph_sha256");
    engine.weights_sha256 = text_member("weights_sha256");
    const std::string profiles = where + ", profiles";
    for (const Json& profile : list(member(value, "profiles", where), profiles))
        engine.profiles.push_back(read_profile(profile, profiles));
    engine.weights_bytes = integer_member("weights_bytes");
    const std::string scratch = where + ", scratch_bytes";
    for (const Json& bytes : list(member(value, "scratch_bytes", where), scratch))
        engine.scratch_bytes.push_back(integer(bytes, scratch));
    const Json& island = member(value, "bf16_island", where);
    if (!island.is_boolean())
        refuse("expected true or false in ", where, ", bf16_island, but got ", shown(island));
    engine.bf16_island = island.get<bool>();
    return engine;
}

void check_engine(const std::string& what, const Graph& graph, const Engine& engine) {
    expect(is_plain_name(engine.file), "a plain file name for " + what, shown(engine.file));
    for (const std::string* digest :
         {&engine.sha256, &engine.key, &engine.graph_sha256, &engine.weights_sha256})
        expect(is_sha256(*digest), "SHA-256 hashes of " + what, shown(*digest));
    expect(!engine.profiles.empty(), "profiles of " + what, "none");
    expect(engine.scratch_bytes.size() == engine.profiles.size(), "scratch per profile of " + what,
           "other");
    const auto has = [](const std::map<std::string, Port>& ports, const std::string& symbol) {
        return std::any_of(ports.begin(), ports.end(),
                           [&](const auto& port) { return has_symbol(port.second.shape, symbol); });
    };
    for (const Profile& profile : engine.profiles) {
        for (const auto& [symbol, sizes] : profile) {
            expect(symbol != "B" && (has(graph.inputs, symbol) || has(graph.outputs, symbol)),
                   "profiles over sizes of " + what, shown(symbol));
            expect(0 < sizes[0] && sizes[0] <= sizes[1] && sizes[1] <= sizes[2],
                   "smallest, best and largest sizes of " + what,
                   text_of(sizes[0], ", ", sizes[1], ", ", sizes[2]));
        }
    }
}

// An engine set's bucket, checked.
EngineBucket read_engine_bucket(const Manifest& manifest, const std::string& name,
                                const Json& value, const std::string& what) {
    EngineBucket bucket{read_bucket(value, what), 0};
    const std::string where = what + ", scratch";
    std::uint64_t count = 0;
    for (const auto& [section, offsets] : object(member(value, "scratch", what), where).items()) {
        std::vector<std::uint64_t>& scratch = bucket.scratch[plain_name(section, where)];
        for (const Json& offset : list(offsets, where))
            scratch.push_back(integer(offset, where));
        count += scratch.size();
    }
    const std::uint64_t largest =
        integer(member(value, "scratch_bytes", what), what + ", scratch_bytes");
    bucket.peak_device_bytes =
        integer(member(value, "peak_device_bytes", what), what + ", peak_device_bytes");

    const auto known = manifest.buckets.find(name);
    expect(known != manifest.buckets.end(), "buckets of the bundle in " + what, shown(name));
    expect(bucket.max_tokens == known->second.max_tokens,
           text_of(known->second.max_tokens, " tokens in ", what), "others");
    const bool complete =
        std::equal(manifest.program.begin(), manifest.program.end(), bucket.scratch.begin(),
                   bucket.scratch.end(), [](const auto& instructions, const auto& offsets) {
                       return instructions.first == offsets.first &&
                              instructions.second.size() == offsets.second.size();
                   });
    expect(complete, "a scratch of " + what + " for every instruction", "others");
    for (const auto& [section, offsets] : bucket.scratch)
        for (const std::uint64_t offset : offsets)
            expect(lies_in_arena(bucket, offset, 0), "aligned scratch in the arena of " + what,
                   offset);
    check_bucket(manifest, what, bucket, product(largest, count));
    return bucket;
}

EngineSet read_engine_set(const Manifest& manifest, const std::string& name, const Json& value,
                          const std::string& where) {
    EngineSet set;
    set.name = name;
    set.flavor = text(member(value, "flavor", where), where + ", flavor");
    set.version = text(member(value, "version", where), where + ", version");
    for (const Json& target : list(member(value, "targets", where), where + ", targets"))
        set.targets.push_back(text(target, where + ", targets"));
    const Json& flags = object(member(value, "flags", where), where + ", flags");
    set.version_compatible = flags.value("version_compatible", Json(false)) == true;
    expect(!set.targets.empty(), "targets of " + where, "none");
    for (const std::string& target : set.targets)
        expect(is_target(target), "targets such as sm86 of " + where, shown(target));
    for (const auto& [graph, engines] : object(member(value, "graphs", where), where).items()) {
        const auto described = manifest.graphs.find(graph);
        expect(described != manifest.graphs.end(), "graphs of the bundle in " + where,
               shown(graph));
        const std::string what = shown(graph) + " of " + where;
        std::vector<Engine>& read = set.graphs[graph];
        for (const Json& engine : list(engines, what)) {
            read.push_back(read_engine(engine, what));
            check_engine(what, described->second, read.back());
        }
    }
    if (value.contains("program") && !object(value["program"], where + ", program").empty()) {
        set.buffers = read_buffers(value, where);
        set.program = read_program(value, where);
        check_program(set.run_by(manifest));
    }
    const Manifest run = set.run_by(manifest);
    for (const auto& [bucket, plan] : object(member(value, "buckets", where), where).items())
        set.buckets.emplace(bucket, read_engine_bucket(run, bucket, plan,
                                                       "bucket " + shown(bucket) + " of " + where));
    return set;
}

// The numbers in a version.
std::vector<int> numbers_of(const std::string& version) {
    std::vector<int> numbers;
    bool inside = false;
    for (const char c : version) {
        const bool digit = c >= '0' && c <= '9';
        if (digit && !inside)
            numbers.push_back(0);
        if (digit && numbers.back() < 100'000'000)
            numbers.back() = 10 * numbers.back() + (c - '0');
        inside = digit;
    }
    return numbers;
}

// Whether a version of the library runs a set.
bool runs_with(const EngineSet& set, const std::string& version) {
    if (!set.version_compatible)
        return version == set.version;
    const std::vector<int> own = numbers_of(set.version), other = numbers_of(version);
    return !own.empty() && !other.empty() && own[0] == other[0] && own <= other;
}

// Why a set does not run here; "" if it does.
std::string obstacle(const EngineSet& set, const std::string& flavor, const std::string& version,
                     const std::string& target) {
    if (set.flavor != flavor)
        return "is of flavor " + set.flavor + ", not " + flavor;
    if (!runs_with(set, version))
        return "was built by version " + set.version + ", not " + version;
    if (std::find(set.targets.begin(), set.targets.end(), target) != set.targets.end())
        return "";
    return "was built for " + joined(set.targets);
}

// How the bundle differs from the one an engine was built from; "" if it does not.
std::string change(const Manifest& manifest, const std::string& name, const Engine& engine) {
    const Graph& graph = manifest.graphs.at(name);
    if (engine.graph_sha256 != manifest.files.at(graph.file).sha256)
        return "graph '" + name + "' has changed since they were built";
    if (engine.weights_sha256 != graph.weights_sha256)
        return "the weights of graph '" + name + "' have changed since they were built";
    return "";
}

// How an engine's file differs from the one that was built; "" if it does not.
std::string damage(const std::filesystem::path& path, const Engine& engine, bool verify) {
    std::error_code error;
    const std::uintmax_t bytes = std::filesystem::file_size(path, error);
    if (error)
        return path.string() + " is missing";
    if (bytes != engine.bytes)
        return text_of(path.string(), " has ", bytes, " bytes instead of ", engine.bytes);
    if (verify && file_sha256(path) != engine.sha256)
        return path.string() + " was altered, its SHA-256 is not the manifest's";
    return "";
}

void check_engines(const std::filesystem::path& bundle, const Manifest& manifest,
                   const EngineSet& set, bool verify) {
    const std::string rebuild = "build them again: " + set.build_command(bundle);
    for (const auto& [graph, described] : manifest.graphs) {
        const auto engines = set.graphs.find(graph);
        if (engines == set.graphs.end() || engines->second.empty())
            refuse("engines ", set.name, " have none for graph '", graph, "'; ", rebuild);
        for (const Engine& engine : engines->second) {
            std::string problem = change(manifest, graph, engine);
            if (problem.empty())
                problem = damage(engine_folder(bundle, set.name) / engine.file, engine, verify);
            if (!problem.empty())
                refuse("engines ", set.name, " do not fit this bundle: ", problem, "; ", rebuild);
        }
    }
}

} // namespace

std::string EngineSet::build_command(const std::filesystem::path& bundle) const {
    return command_for(bundle, flavor, joined(targets, ","));
}

Manifest EngineSet::run_by(const Manifest& manifest) const {
    Manifest run = manifest;
    if (!program.empty()) {
        run.buffers = buffers;
        run.program = program;
    }
    return run;
}

EngineUse engine_for(const EngineSet& set, const std::string& graph, const Sizes& sizes) {
    const std::vector<Engine>& engines = set.graphs.at(graph);
    for (const Engine& engine : engines) {
        for (std::size_t index = 0; index < engine.profiles.size(); ++index) {
            const Profile& profile = engine.profiles[index];
            const bool holds = std::all_of(profile.begin(), profile.end(), [&](const auto& range) {
                const std::uint64_t size = sizes.value(range.first);
                return range.second[0] <= size && size <= range.second[2];
            });
            if (holds)
                return {&engine, static_cast<int>(index)};
        }
    }
    std::set<std::string> symbols;
    for (const Engine& engine : engines)
        for (const Profile& profile : engine.profiles)
            for (const auto& [symbol, range] : profile)
                symbols.insert(symbol);
    std::vector<std::string> wanted, built;
    for (const std::string& symbol : symbols)
        wanted.push_back(text_of(symbol, "=", sizes.value(symbol)));
    for (const auto& [name, bucket] : set.buckets)
        built.push_back(name);
    refuse("expected an engine of graph '", graph, "' for ", joined(wanted),
           ", but these engines were built for buckets ", built.empty() ? "none" : joined(built),
           "; build the bucket with pid-build --buckets");
}

std::filesystem::path engine_folder(const std::filesystem::path& bundle, const std::string& set) {
    return bundle / "engines" / set;
}

std::vector<EngineSet> read_engine_sets(const Manifest& manifest) {
    std::vector<EngineSet> sets;
    for (const auto& [name, text] : manifest.engines) {
        const std::string where = "engines " + shown(name);
        expect(is_plain_name(name), "a plain name of " + where, shown(name));
        const Json value = parse_json(text, where);
        object(value, where);
        const auto flavor = value.find("flavor");
        if (flavor == value.end() || !flavor->is_string() || *flavor == "tensorrt" ||
            *flavor == "tensorrt-rtx")
            sets.push_back(read_engine_set(manifest, name, value, where));
    }
    return sets;
}

EngineSet choose_engines(const std::filesystem::path& bundle, const Manifest& manifest,
                         const std::string& wanted, const std::string& flavor,
                         const std::string& version, const std::string& target, bool verify) {
    std::vector<std::string> known, reasons;
    for (EngineSet& set : read_engine_sets(manifest)) {
        known.push_back(set.name);
        if (!wanted.empty() && set.name != wanted)
            continue;
        const std::string reason = obstacle(set, flavor, version, target);
        if (reason.empty()) {
            check_engines(bundle, manifest, set, verify);
            return std::move(set);
        }
        reasons.push_back(set.name + " " + reason);
    }
    if (!wanted.empty() && reasons.empty())
        refuse("expected engines of ", bundle.string(), " (",
               known.empty() ? "none" : joined(known), "), but got ", shown(wanted),
               "; build them with pid-build");
    refuse("expected ", bundle.string(), " to have engines for ", flavor, " ", version, " on ",
           target, ", but ", reasons.empty() ? "it has none" : joined(reasons, "; "),
           "; build them: ", command_for(bundle, flavor, target));
}

} // namespace pid::core
