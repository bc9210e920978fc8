#include "arguments.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <functional>
#include <limits>
#include <regex>
#include <string_view>
#include <system_error>
#include <tuple>

#include <CLI/CLI.hpp>

#include "bundle/manifest.h"
#include "console.h"
#include "errors.h"

namespace pid::cli {
namespace {

using core::refuse;

constexpr const char* try_help = "; try pid-decode-cpp --help";
constexpr std::uint64_t most_threads = 4096;
constexpr std::uint64_t most_steps = 1000;
constexpr std::uint64_t most_overlap = std::uint64_t{1} << 24U;
constexpr std::size_t help_column = 30;

constexpr const char* examples =
    R"(examples:
  pid-decode-cpp flux-2k --latent latent.safetensors --caption caption.safetensors -o image.png
  pid-decode-cpp flux-2k --latents latents/ --captions captions/ --seed 7 -o images/
  pid-decode-cpp flux-2k --latent latent.safetensors -o image.png --backend tensorrt
  pid-decode-cpp flux-2k --latent large.safetensors -o large.png --tile auto
  pid-decode-cpp flux-any --latent latent.safetensors --caption caption.safetensors \
      --negative caption.safetensors --guidance 5 -o image.png

files:
  A latent file has one tensor, or one named "latent": [C, h, w] or [B, C, h, w] in float32,
  float16 or bfloat16, normalised as the bundle's manifest says. It may also hold "caption",
  [T, D] or [B, T, D], and "sigma", a number or [B]. ComfyUI's .latent files are known, and
  normalised. A batch makes image-0.png, image-1.png, .. .npy files are read too.
  Image b of a file is decoded with seed + b, so a file gives the same images alone or among
  others. Every input is checked before the first decode, and images appear whole or not at all.
  --latent-form says what a file does not: raw, as a VAE's encoder gives it;
  raw:flux2_ae.safetensors, of FLUX.2, which is normalised by statistics in its VAE's file; or
  packed, tokens [B, n, width] of a square picture or of another, packed:1024x768.)";

// A value that cannot be read, to be told with the option's name.
struct Unusable {
    std::string wanted;
};

double number(const std::string& text) {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    const bool starts = !text.empty() &&
                        std::string_view("+-.0123456789ni").find(text[0]) != std::string_view::npos;
    if (!starts || *end != '\0')
        throw Unusable{"a number"};
    return value;
}

std::uint64_t integer(const std::string& text, std::uint64_t least, std::uint64_t most,
                      const char* most_text) {
    std::uint64_t value = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stop != end || value < least || value > most)
        throw Unusable{core::text_of("a whole number from ", least, " to ", most_text)};
    return value;
}

std::vector<double> times(const std::string& text) {
    std::vector<double> values;
    for (std::size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
        end = text.find(',', begin);
        values.push_back(number(text.substr(begin, end - begin)));
    }
    return values;
}

LatentForm latent_form(const std::string& text) {
    static const std::regex pattern("(auto|normalised|raw|packed)|raw:(.+)|"
                                    "packed:([0-9]{1,8})[xX]([0-9]{1,8})");
    std::smatch found;
    if (!std::regex_match(text, found, pattern))
        throw Unusable{"auto, normalised, raw, packed, raw:FILE or packed:1024x768"};
    LatentForm form;
    form.kind = text.substr(0, text.find(':'));
    form.statistics = found[2].str();
    if (found[3].matched)
        form.size = {std::stoll(found[3]), std::stoll(found[4])};
    return form;
}

pid_rule rule(const std::string& text) {
    const auto found = std::find(core::rules.begin(), core::rules.end(), text);
    if (found == core::rules.end())
        throw Unusable{core::joined(core::rules)};
    return static_cast<pid_rule>(found - core::rules.begin());
}

// Width and height.
std::pair<std::int64_t, std::int64_t> tile(const std::string& text) {
    if (text == "auto")
        return {PID_TILE_AUTO, PID_TILE_AUTO};
    static const std::regex pattern("([0-9]{1,8})[xX]([0-9]{1,8})");
    std::smatch found;
    if (!std::regex_match(text, found, pattern))
        throw Unusable{"auto or a size such as 2048x2048"};
    const std::pair<std::int64_t, std::int64_t> size{std::stoll(found[1]), std::stoll(found[2])};
    if (size.first == 0 && size.second == 0) // which stands for no tiles
        throw Unusable{"auto or a size such as 2048x2048"};
    return size;
}

void check_format(const std::string& text) {
    if (text == "jpg" || text == "webp" || text == "tiff")
        refuse("expected --format png, as this command writes no other, but got '", text,
               "'; use pid-decode");
    if (text != "png")
        throw Unusable{"png"};
}

// A word such as --seed, but not a negative number.
bool is_option(const std::string& word) {
    return word.size() > 1 && word[0] == '-' &&
           std::string_view(".0123456789").find(word[1]) == std::string_view::npos;
}

// Declares the options of a CLI11 parser and has what they say put into `to`.
class Parser {
public:
    Parser() : app_("Decode latents to images with a bundle made by pid-export.") {
        app_.name("pid-decode-cpp");
        app_.usage(
            "usage: pid-decode-cpp [options] bundle (--latent FILE | --latents DIR) -o OUTPUT");
        app_.footer(examples);
        app_.get_formatter()->column_width(help_column);
        app_.allow_extras();
        app_.option_defaults()->take_last();
        app_.set_version_flag("--version", "pid-decode-cpp " PID_VERSION, "show the version");

        bundle_ = value("bundle", "DIR", "the bundle's folder", path(to_.bundle));
        app_.add_flag("--quiet", to_.quiet, "no progress bar")->disable_flag_override();
        app_.add_flag("--json", to_.json, "print the result as JSON")->disable_flag_override();
        value("--latent", "FILE", "a latent file", path(to_.latents));
        value("--latents", "DIR", "a folder of latent files", path(to_.latents));
        output_ = value("-o,--output", "OUTPUT", "a PNG image, or with --latents a folder",
                        path(to_.output));
        value("--caption", "FILE", "one caption for all", path(to_.caption));
        value("--captions", "DIR", "a folder of captions named as the latents", path(to_.captions));
        value("--latent-key", "NAME", "the latent's tensor, if it has another name",
              word(to_.latent_key));
        value("--latent-form", "FORM",
              "auto, normalised, raw, packed; raw:FILE says whose statistics normalise it, "
              "packed:1024x768 of which picture it is (default: auto)",
              [this](const std::string& text) { to_.latent_form = latent_form(text); });
        value("--caption-key", "NAME", "the caption's tensor, if it has another name",
              word(to_.caption_key));
        value("--sigma", "SIGMA", "noise level of the latents, 0 to 1 (default: the files', or 0)",
              [this](const std::string& text) { to_.sigma = static_cast<float>(number(text)); });
        value("--seed", "SEED", "of the first image of every file (default: 0)",
              [this](const std::string& text) {
                  to_.seed =
                      integer(text, 0, std::numeric_limits<std::uint64_t>::max(), "2^64 - 1");
              });
        value("--steps", "STEPS", "1, 2 or 4; undistilled 1 to 100 (default: what the bundle says)",
              [this](const std::string& text) {
                  to_.steps = static_cast<int>(integer(text, 1, most_steps, "1000"));
              });
        value("--times", "TIMES", "for bundles of any times: 1.0,0.75,0.5,0.25,0",
              [this](const std::string& text) { to_.times = times(text); });
        value("--rule", "{sde,ode,dpm++2m}",
              "sde, which adds noise between steps, ode, or dpm++2m (default: what the bundle "
              "says)",
              [this](const std::string& text) { to_.rule = rule(text); });
        value("--negative", "FILE", "undistilled: a caption to stay away from", path(to_.negative));
        value("--guidance", "G",
              "undistilled: how far, 1 for not at all (default: what the bundle says)",
              [this](const std::string& text) { to_.guidance = number(text); });
        value("--tile", "WxH",
              "decode in tiles of so many pixels of the result, or auto: where it has to be",
              [this](const std::string& text) {
                  std::tie(to_.tile_width, to_.tile_height) = tile(text);
              });
        value(
            "--overlap", "N", "of tiles, in pixels of the result", [this](const std::string& text) {
                to_.overlap = static_cast<std::int64_t>(integer(text, 0, most_overlap, "16777216"));
            });
        value("--format", "{png}", "of the images in a folder: png (default: png)", check_format);
        value("--sheet", "FILE", "not here: pid-decode makes sheets", [](const std::string&) {
            refuse("expected no --sheet, whose labels need a font that this command does not have; "
                   "use pid-decode");
        });
        app_.add_flag("--plan", to_.plan, "say what decoding would take, and stop")
            ->disable_flag_override();
        app_.add_flag("--overwrite", to_.overwrite, "replace images that exist")
            ->disable_flag_override();
        app_.add_flag("--skip-existing", to_.skip_existing,
                      "keep images that exist, and make the others")
            ->disable_flag_override();
        off("--no-metadata", to_.metadata, "do not write into images how they were made");
        value("--backend", "BACKEND", "onnxruntime, tensorrt, tensorrt-rtx (default: onnxruntime)",
              word(to_.backend));
        value("--device,--provider", "NAME",
              "cpu, cuda:0, or an ONNX Runtime provider (default: cpu; of tensorrt cuda:0)",
              word(to_.device));
        value("--provider-library", "FILE", "onnxruntime: the library of a plug-in provider",
              word(to_.provider_library));
        value("--engines", "NAME", "tensorrt: the engine set (default: the first that fits)",
              word(to_.engine_set));
        value("--threads", "N", "on the CPU (default: all cores)", [this](const std::string& text) {
            to_.threads = integer(text, 1, most_threads, "4096");
        });
        off("--no-cuda-graphs", to_.cuda_graphs, "tensorrt: do not record and replay steps");
        off("--no-verify", to_.verify, "do not hash the bundle's files first");
    }
    Parser(const Parser&) = delete;
    Parser& operator=(const Parser&) = delete;

    std::optional<Arguments> parse(std::vector<std::string> words) {
        std::reverse(words.begin(), words.end()); // CLI11 takes them from the end
        try {
            app_.parse(words);
        } catch (const CLI::CallForHelp&) {
            print_line(app_.help());
            return std::nullopt;
        } catch (const CLI::CallForVersion& version) {
            print_line(version.what());
            return std::nullopt;
        } catch (const CLI::ArgumentMismatch& error) { // such as "--seed: 1 required SEED missing"
            const std::string what = error.what();
            const std::string name = what.substr(0, what.find_first_of(": "));
            if (what.find("flag override") != std::string::npos)
                refuse("argument --", name, ": expected no value", try_help);
            refuse("argument ", name, ": expected one argument", try_help);
        } catch (const CLI::ParseError& error) {
            refuse(core::first_line(error.what()), try_help);
        }
        check();
        to_.many = app_.count("--latents") > 0;
        return to_;
    }

private:
    template <typename Set>
    CLI::Option* value(const char* names, const char* shown, const char* help, Set set) {
        const std::string name = std::string(names).substr(std::string_view(names).rfind(',') + 1);
        const auto read = [name, set](const std::string& text) {
            if (is_option(text))
                refuse("argument ", name, ": expected one argument", try_help);
            try {
                set(text);
            } catch (const Unusable& unusable) {
                refuse("argument ", name, ": expected ", unusable.wanted, ", but got ",
                       core::shown(text), try_help);
            }
        };
        return app_.add_option_function<std::string>(names, read, help)->type_name(shown);
    }

    void off(const char* name, bool& member, const char* help) {
        app_.add_flag_callback(name, [&member] { member = false; }, help)->disable_flag_override();
    }

    static std::function<void(const std::string&)> path(Path& member) {
        return [&member](const std::string& text) { member = text; };
    }

    static std::function<void(const std::string&)> word(std::string& member) {
        return [&member](const std::string& text) { member = text; };
    }

    void exclude(const char* first, const char* second) const {
        if (app_.count(first) > 0 && app_.count(second) > 0)
            refuse("argument ", second, ": not allowed with argument ", first, try_help);
    }

    // What CLI11 could check too, in the words of pid-decode.
    void check() const {
        const std::vector<std::string> others = app_.remaining();
        if (!others.empty())
            refuse("unrecognized arguments: ", CLI::detail::join(others, " ").substr(0, 80),
                   try_help);
        exclude("--latent", "--latents");
        exclude("--caption", "--captions");
        exclude("--steps", "--times");
        exclude("--overwrite", "--skip-existing");
        std::string missing = bundle_->count() > 0 ? "" : "bundle";
        if (output_->count() == 0 && !to_.plan)
            missing += missing.empty() ? "-o/--output" : ", -o/--output";
        if (!missing.empty())
            refuse("the following arguments are required: ", missing, try_help);
        if (app_.count("--latent") + app_.count("--latents") == 0)
            refuse("one of the arguments --latent --latents is required", try_help);
        for (const char* name : {"--captions", "--format"})
            if (app_.count(name) > 0 && app_.count("--latents") == 0)
                refuse("expected ", name, " with --latents, but got --latent; drop it");
    }

    CLI::App app_;
    CLI::Option* bundle_;
    CLI::Option* output_;
    Arguments to_;
};

} // namespace

std::optional<Arguments> parse_arguments(const std::vector<std::string>& words) {
    return Parser().parse(words);
}

} // namespace pid::cli
