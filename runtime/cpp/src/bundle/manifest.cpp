#include "bundle/manifest.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <set>

#include "bundle/json_reader.h"
#include "bundle/manifest_check.h"
#include "bundle/manifest_json.h"
#include "errors.h"

namespace pid::core {
namespace {

// Major versions of the format that are read, any minor version of them.
constexpr std::uint64_t oldest_format = 1;
constexpr std::uint64_t newest_format = 2;

DType read_dtype(const Json& value, const std::string& where) {
    const std::string name = text(value, where);
    DType dtype{};
    if (!dtype_named(name, dtype))
        refuse("expected a dtype the manifest knows in ", where, ", but got ", shown(name));
    return dtype;
}

// A shape, or the start of an operand.
SymbolicShape read_shape(const Json& value, const std::string& where) {
    SymbolicShape shape;
    for (const Json& item : list(value, where)) {
        if (item.is_string())
            shape.emplace_back(item.get<std::string>());
        else
            shape.emplace_back(integer(item, where));
    }
    return shape;
}

std::map<std::string, Port> read_ports(const Json& value, const std::string& where) {
    std::map<std::string, Port> ports;
    for (const auto& [name, port] : object(value, where).items()) {
        object(port, where);
        ports[plain_name(name, where)] = {
            read_dtype(member(port, "dtype", where), where + ", dtype"),
            read_shape(member(port, "shape", where), where + ", shape")};
    }
    return ports;
}

Graph read_graph(const Json& value, const std::string& where) {
    object(value, where);
    Graph graph;
    graph.file = text(member(value, "file", where), where + ", file");
    if (const auto contrib = value.find("contrib_file");
        contrib != value.end() && !contrib->is_null())
        graph.contrib_file = text(*contrib, where + ", contrib_file");
    graph.stage = text(member(value, "stage", where), where + ", stage");
    for (const auto& [name, option] :
         object(member(value, "options", where), where + ", options").items())
        if (option.is_boolean() && option.get<bool>())
            graph.options.insert(name);
    graph.inputs = read_ports(member(value, "inputs", where), where + ", inputs");
    graph.outputs = read_ports(member(value, "outputs", where), where + ", outputs");
    graph.weights_bytes = integer(member(value, "weights_bytes", where), where + ", weights_bytes");
    graph.weights_sha256 = text(member(value, "weights_sha256", where), where + ", weights_sha256");
    return graph;
}

// The options of a table, where each has to be used.
struct Options {
    const Json& source;
    const std::string& what;

    void expect(std::initializer_list<const char*> names) const {
        for (const char* name : names)
            require(source.contains(name), text_of("an option ", name, " of ", what), "none");
        require(source.size() == names.size() + 1, "no other options of " + what, "some");
    }

    std::uint64_t size(const char* name, std::uint64_t divisor, std::uint64_t least) const {
        const Json& value = source[name];
        const std::uint64_t size = value.is_number_unsigned() ? value.get<std::uint64_t>() : 0;
        require(least <= size && size <= largest_size && size % divisor == 0,
                text_of("a usable ", name, " of ", what, ", a multiple of ", divisor,
                        " of at least ", least),
                shown(value));
        return size;
    }

    double factor(const char* name) const {
        const Json& value = source[name];
        const double factor = value.is_number() ? value.get<double>() : 0;
        require(1e-6 <= factor && factor <= 1e9, text_of("a usable ", name, " of ", what),
                shown(value));
        return factor;
    }
};

Source read_source(const std::string& kind, const Json& source, const std::string& what) {
    if (kind == "table")
        return read_table(source, what);
    if (kind == "constant")
        return read_constant(source, what);
    return {};
}

Buffer read_buffer(const std::string& name, const Json& value, const std::string& where) {
    object(value, where);
    Buffer buffer;
    buffer.dtype = read_dtype(member(value, "dtype", where), where + ", dtype");
    buffer.shape = read_shape(member(value, "shape", where), where + ", shape");
    buffer.kind = text(member(value, "kind", where), where + ", kind");
    const Json source =
        value.contains("source") ? object(value["source"], where + ", source") : Json::object();
    buffer.source = read_source(buffer.kind, source, "buffer '" + name + "'");
    return buffer;
}

Sampler read_sampler(const Json& value, const std::string& where) {
    object(value, where);
    Sampler sampler;
    sampler.steps = integer(member(value, "steps", where), where + ", steps");
    sampler.max_steps = integer(member(value, "max_steps", where), where + ", max_steps");
    for (const Json& time : list(member(value, "times", where), where + ", times"))
        sampler.times.push_back(number(time, where + ", times"));
    const std::string schedules = where + ", schedules";
    for (const auto& [steps, rows] : object(member(value, "schedules", where), schedules).items()) {
        auto& schedule = sampler.schedules[plain_name(steps, schedules)];
        for (const Json& row : list(rows, schedules))
            schedule.push_back(integer(row, schedules));
    }
    if (const auto rule = value.find("rule"); rule != value.end())
        sampler.rule = text(*rule, where + ", rule");
    if (const auto guidance = value.find("guidance"); guidance != value.end())
        sampler.guidance = number(*guidance, where + ", guidance");
    const std::string shift = where + ", flow_shift";
    if (const auto given = value.find("flow_shift"); given != value.end() && !given->is_null())
        sampler.flow_shift =
            FlowShift{number(member(object(*given, shift), "shift", shift), shift + ", shift"),
                      integer(member(*given, "size", shift), shift + ", size")};
    return sampler;
}

std::map<std::string, Operand> read_operands(const Json& value, const std::string& where) {
    std::map<std::string, Operand> operands;
    for (const auto& [port, operand] : object(value, where).items()) {
        Operand& read = operands[plain_name(port, where)];
        if (operand.is_string()) {
            read.buffer = operand.get<std::string>();
            continue;
        }
        object(operand, where);
        read.buffer = text(member(operand, "buffer", where), where + ", buffer");
        if (const auto start = operand.find("start"); start != operand.end())
            read.start = read_shape(*start, where + ", start");
    }
    return operands;
}

Run read_run(const Json& value, const std::string& where) {
    Run run;
    run.graph = text(member(value, "run", where), where + ", graph");
    run.inputs = read_operands(member(value, "inputs", where), where + ", inputs");
    run.outputs = read_operands(member(value, "outputs", where), where + ", outputs");
    if (const auto chunk = value.find("chunk"); chunk != value.end() && !chunk->is_null()) {
        run.chunk = text(*chunk, where + ", chunk");
        if (run.chunk.empty())
            refuse("expected a size to cut along in ", where, ", chunk, but got ''");
    }
    if (const auto dims = value.find("dims"); dims != value.end())
        for (const auto& [local, symbol] : object(*dims, where + ", dims").items())
            run.dims[plain_name(local, where + ", dims")] = text(symbol, where + ", dims");
    return run;
}

Instruction read_instruction(const Json& value, const std::string& where);

Each read_each(const Json& value, const std::string& where) {
    Each each;
    each.axis = text(value["each"], where + ", axis");
    const std::string parts = where + ", do";
    for (const Json& part : list(member(value, "do", where), parts)) {
        if (part.contains("each") || part.contains("noise"))
            refuse("expected run or copy in ", parts, ", but got ", shown(part));
        Instruction instruction = read_instruction(part, parts);
        if (auto* run = std::get_if<Run>(&instruction)) {
            if (!run->chunk.empty())
                refuse("expected no slices of '", run->graph, "' of its own in ", parts,
                       ", but the manifest has ", shown(run->chunk), "; export the bundle again");
            run->chunk = each.axis;
            each.parts.emplace_back(std::move(*run));
        } else {
            each.parts.emplace_back(std::get<Copy>(std::move(instruction)));
        }
    }
    return each;
}

Instruction read_instruction(const Json& value, const std::string& where) {
    object(value, where);
    const bool run = value.contains("run"), copy = value.contains("copy"),
               noise = value.contains("noise"), each = value.contains("each");
    if (run + copy + noise + each != 1)
        refuse("expected run, copy, noise or each in ", where, ", but got ", shown(value));
    if (run)
        return read_run(value, where);
    if (copy)
        return Copy{text(value["copy"], where + ", source"),
                    text(member(value, "to", where), where + ", target")};
    if (each)
        return read_each(value, where);
    return Noise{text(value["noise"], where + ", target"),
                 text(member(value, "image", where), where + ", image"),
                 text(member(value, "graph", where), where + ", graph")};
}

// A dimension of the network; whether it is a usable size is checked with the rest.
std::uint64_t read_dimension(const Json& network, const char* name) {
    const auto found = network.find(name);
    if (found == network.end() || !found->is_number_unsigned())
        refuse("expected a positive ", name, ", but the manifest has ",
               found == network.end() ? "none" : shown(*found), "; export the bundle again");
    return found->get<std::uint64_t>();
}

void check_version(const Json& raw) {
    if (!raw.is_object() || !raw.contains("format") || raw["format"] != "pid-bundle")
        refuse("expected a pid-bundle manifest, but ", manifest_file, " is none");
    const std::string where = "format_version";
    std::vector<std::uint64_t> version;
    for (const Json& number : list(member(raw, "format_version", manifest_file), where))
        version.push_back(integer(number, where));
    if (version.size() == 2 && oldest_format <= version[0] && version[0] <= newest_format)
        return;
    refuse("expected bundle format ", oldest_format, ".x or ", newest_format,
           ".x, but got version ", joined(version, ".").substr(0, 80),
           "; update pid-trt, or export the bundle again with this version");
}

// A list of so many numbers; nothing of anything else, since no decode needs it.
std::vector<double> numbers_or_none(const Json& value, const std::set<std::size_t>& counts) {
    if (!value.is_array() || counts.count(value.size()) == 0)
        return {};
    for (const Json& each : value)
        if (!each.is_number())
            return {};
    return value.get<std::vector<double>>();
}

void read_latents(Model& model, const Json& value, std::uint64_t channels) {
    const auto spread = numbers_or_none(value.value("latent_spread", Json()), {2});
    if (!spread.empty())
        model.latent_spread = {spread[0], spread[1]};
    const Json width = value.value("token_width", Json());
    model.token_width = width.is_number_unsigned() ? width.get<std::uint64_t>() : 0;
    model.is_euler = value.value("partly_denoised", Json()) == "euler";
    const Json rule = value.value("comfyui_latent", Json());
    if (!rule.is_object())
        return;
    const std::set<std::size_t> counts{1, channels};
    const auto factor = numbers_or_none(rule.value("factor", Json()), counts);
    const auto shift = numbers_or_none(rule.value("shift", Json()), counts);
    if (!factor.empty() && !shift.empty())
        model.comfyui_latent = {{factor.begin(), factor.end()}, {shift.begin(), shift.end()}};
}

} // namespace

Model read_model(const Json& value, const std::string& where) {
    object(value, where);
    const auto text_or_none = [&](const char* name) {
        const auto found = value.find(name);
        return found != value.end() && found->is_string() ? found->get<std::string>() : "";
    };
    Model model;
    model.name = text_or_none("name");
    model.space = text_or_none("space");
    model.variant = text_or_none("variant");
    const Json variants = value.value("variants", Json());
    if (variants.is_array() && std::all_of(variants.begin(), variants.end(),
                                           [](const Json& each) { return each.is_string(); }))
        model.variants = variants.get<std::vector<std::string>>();
    const Json scale = value.value("scale", Json());
    model.scale = scale.is_number_unsigned() ? scale.get<std::uint64_t>() : 0;
    model.latent_convention = text_or_none("latent_convention");
    model.weights_license = text_or_none("weights_license");
    model.captioned = value.value("captioned", Json(true)) != false;
    model.distilled = value.value("distilled", Json()) == true;
    const Json sizes = value.value("trained_sizes", Json::array());
    const bool usable =
        sizes.is_array() && std::all_of(sizes.begin(), sizes.end(), [](const Json& size) {
            return size.is_array() && size.size() == 2 && size[0].is_number_unsigned() &&
                   size[1].is_number_unsigned() && size[0] != 0 && size[1] != 0;
        });
    if (usable)
        for (const Json& size : sizes)
            model.trained_sizes.emplace_back(size[0], size[1]);
    model.json = value.dump();
    return model;
}

namespace {

// The buffers whose contents from before an instruction uses, and those it writes.
struct Uses {
    std::set<std::string> reads;
    std::set<std::string> writes;

    void read(const std::string& name) {
        if (writes.count(name) == 0)
            reads.insert(name);
    }
    void add(const Run& run) {
        for (const auto& [port, operand] : run.inputs)
            read(operand.buffer);
        for (const auto& [port, operand] : run.outputs)
            writes.insert(operand.buffer);
    }
    void add(const Copy& copy) {
        read(copy.source);
        writes.insert(copy.target);
    }
};

// A member of the manifest that is an object of parts, each read by `read`.
template <typename Part, typename Read>
std::map<std::string, Part> read_parts(const Json& raw, const std::string& whole, const char* name,
                                       Read read) {
    const std::string where = whole + ", " + name;
    std::map<std::string, Part> parts;
    for (const auto& [key, value] : object(member(raw, name, whole), where).items())
        parts.emplace(plain_name(key, where), read(value, where));
    return parts;
}

} // namespace

SymbolicShape Each::slice_of(const Buffer& buffer) const {
    SymbolicShape shape = buffer.shape;
    std::replace(shape.begin(), shape.end(), Size(chunk_symbol), Size(axis));
    return shape;
}

std::vector<Run> runs_of(const Instruction& instruction) {
    if (const auto* run = std::get_if<Run>(&instruction))
        return {*run};
    if (const auto* noise = std::get_if<Noise>(&instruction))
        return {noise->patchify()};
    std::vector<Run> runs;
    if (const auto* each = std::get_if<Each>(&instruction))
        for (const auto& part : each->parts)
            if (const auto* run = std::get_if<Run>(&part))
                runs.push_back(*run);
    return runs;
}

Run Noise::patchify() const {
    return {graph, {{"image", {image, {}}}}, {{"tokens", {target, {}}}}, "", {}};
}

Bucket read_bucket(const Json& value, const std::string& where) {
    object(value, where);
    Bucket bucket;
    bucket.max_tokens = integer(member(value, "max_tokens", where), where + ", max_tokens");
    bucket.chunk_tokens = integer(member(value, "chunk_tokens", where), where + ", chunk_tokens");
    bucket.arena_bytes = integer(member(value, "arena_bytes", where), where + ", arena_bytes");
    const std::string offsets = where + ", offsets";
    for (const auto& [name, offset] : object(member(value, "offsets", where), offsets).items())
        bucket.offsets[plain_name(name, offsets)] = integer(offset, offsets);
    return bucket;
}

std::map<std::string, Buffer> read_buffers(const Json& raw, const std::string& where) {
    const std::string buffers = where + ", buffers";
    std::map<std::string, Buffer> read;
    for (const auto& [name, value] : object(member(raw, "buffers", where), buffers).items())
        read.emplace(plain_name(name, buffers), read_buffer(name, value, buffers));
    return read;
}

std::map<std::string, std::vector<Instruction>> read_program(const Json& raw,
                                                             const std::string& where) {
    return read_parts<std::vector<Instruction>>(
        raw, where, "program", [](const Json& section, const std::string& at) {
            std::vector<Instruction> instructions;
            for (const Json& instruction : list(section, at))
                instructions.push_back(read_instruction(instruction, at));
            return instructions;
        });
}

Table read_table(const Json& source, const std::string& what) {
    const auto found = source.find("table");
    const std::string name =
        found != source.end() && found->is_string() ? found->get<std::string>() : "";
    const Function function =
        name == "rope_2d_cos" || name == "rope_1d_cos" ? Function::cos : Function::sin;
    const Options options{source, what};
    if (name == "rope_2d_cos" || name == "rope_2d_sin") {
        options.expect({"head_dim", "reference", "extent", "theta"});
        return Rope2d{function, options.size("head_dim", 4, 8), options.factor("reference"),
                      options.factor("extent"), options.factor("theta")};
    }
    if (name == "rope_1d_cos" || name == "rope_1d_sin") {
        options.expect({"head_dim", "theta"});
        return Rope1d{function, options.size("head_dim", 2, 2), options.factor("theta")};
    }
    if (name == "pixel_axis") {
        options.expect({"axis", "size", "patch_size", "theta"});
        const Json& axis = source["axis"];
        require(axis == "column" || axis == "row", "a usable axis of " + what, shown(axis));
        return PixelAxis{axis == "column" ? Axis::column : Axis::row, options.size("size", 4, 4),
                         options.size("patch_size", 1, 1), options.factor("theta")};
    }
    refuse("expected a table the manifest knows, but got ", shown(name));
}

Constant read_constant(const Json& source, const std::string& what) {
    const auto tensor = source.find("tensor");
    require(tensor != source.end() && tensor->is_string(), "a tensor for " + what, "none");
    return {tensor->get<std::string>()};
}

Manifest Manifest::parse(std::string_view text_of_file) {
    std::vector<std::string> sets; // in the order of the file
    std::string part;
    const Json raw =
        parse_json(text_of_file, manifest_file, [&](int depth, const std::string& name) {
            if (depth == 1)
                part = name;
            if (depth == 1 && name == "engines")
                sets.clear(); // of two members of one name, the last counts
            else if (depth == 2 && part == "engines")
                sets.push_back(name);
        });
    check_version(raw);
    const std::string where = manifest_file;
    Manifest manifest;
    manifest.producer = text(member(raw, "producer", where), where + ", producer");
    manifest.model = read_model(member(raw, "model", where), where + ", model");
    manifest.precision = text(member(raw, "precision", where), where + ", precision");
    const Json& network = object(member(raw, "network", where), where + ", network");
    manifest.network = {
        read_dimension(network, "patch_size"), read_dimension(network, "text_max_length"),
        read_dimension(network, "text_dim"), read_dimension(network, "latent_channels"),
        integer(member(raw, "tokens_per_latent", where), where + ", tokens_per_latent")};
    for (const auto& [name, value] : network.items())
        if (value.is_number_unsigned())
            manifest.dimensions[name] = value.get<std::uint64_t>();
    if (const auto gate = network.find("latent_gate"); gate != network.end() && gate->is_string())
        manifest.latent_gate = gate->get<std::string>();
    read_latents(manifest.model, raw["model"], manifest.network.latent_channels);
    const Json down = network.value("latent_down", Json());
    manifest.model.latent_down = down.is_number_unsigned() ? down.get<std::uint64_t>() : 0;
    manifest.sampler = read_sampler(member(raw, "sampler", where), where + ", sampler");
    manifest.files =
        read_parts<File>(raw, where, "files", [](const Json& file, const std::string& at) {
            return File{integer(member(object(file, at), "bytes", at), at + ", bytes"),
                        text(member(file, "sha256", at), at + ", sha256")};
        });
    manifest.graphs = read_parts<Graph>(raw, where, "graphs", read_graph);
    manifest.buffers = read_buffers(raw, where);
    manifest.buckets = read_parts<Bucket>(raw, where, "buckets", read_bucket);
    manifest.program = read_program(raw, where);
    if (raw.contains("engines")) {
        Json engines = object(raw["engines"], where + ", engines");
        for (const std::string& name : sets)
            if (const auto set = engines.find(name); set != engines.end()) {
                manifest.engines.emplace_back(name, set->dump());
                engines.erase(set); // of two of one name, the first has the place
            }
    }
    check_manifest(manifest);
    return manifest;
}

const std::pair<const std::string, Bucket>& Manifest::bucket_for(std::uint64_t tokens) const {
    const auto* smallest = smallest_bucket(buckets, tokens);
    if (smallest == nullptr)
        refuse("expected an image of at most ", megapixels(most_tokens(buckets)),
               ", the largest bucket of this bundle, but got ", megapixels(tokens),
               "; export with --buckets large=", tokens, ", or decode a smaller latent");
    return *smallest;
}

std::vector<std::size_t> Manifest::dependent(const std::string& section,
                                             std::set<std::string> inputs) const {
    std::vector<std::size_t> found;
    const std::vector<Instruction>& instructions = program.at(section);
    for (std::size_t index = 0; index < instructions.size(); ++index) {
        Uses uses;
        if (const auto* run = std::get_if<Run>(&instructions[index]))
            uses.add(*run);
        else if (const auto* copy = std::get_if<Copy>(&instructions[index]))
            uses.add(*copy);
        else if (const auto* each = std::get_if<Each>(&instructions[index]))
            for (const auto& part : each->parts)
                std::visit([&](const auto& one) { uses.add(one); }, part);
        const bool follows =
            std::any_of(uses.reads.begin(), uses.reads.end(),
                        [&](const std::string& name) { return inputs.count(name) > 0; });
        if (!follows)
            continue;
        inputs.insert(uses.writes.begin(), uses.writes.end());
        found.push_back(index);
    }
    return found;
}

std::string Manifest::megapixels(std::uint64_t tokens) const {
    const double pixels =
        static_cast<double>(tokens) * std::pow(static_cast<double>(network.patch_size), 2);
    std::array<char, 64> text{};
    std::snprintf(text.data(), text.size(), "%.3g megapixels", pixels / 1e6);
    return text.data();
}

} // namespace pid::core
