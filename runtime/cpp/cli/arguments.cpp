#include "arguments.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <functional>
#include <limits>
#include <set>
#include <string_view>
#include <system_error>

#include "console.h"
#include "errors.h"
#include "json_reader.h"

namespace pid::cli {
namespace {

using core::refuse;

constexpr const char* try_help = "; try pid-decode-cpp --help";
constexpr std::uint64_t most_threads = 4096;
constexpr std::uint64_t most_steps = 1000;

constexpr const char* help =
    R"(usage: pid-decode-cpp [options] bundle (--latent FILE | --latents DIR) -o OUTPUT

Decode latents to images with a bundle made by pid-export.

positional arguments:
  bundle                the bundle's folder

options:
  -h, --help            show this help and exit
  --version             show the version and exit
  --quiet               no progress bar
  --json                print the result as JSON
  --latent FILE         a latent file
  --latents DIR         a folder of latent files
  -o, --output OUTPUT   a PNG image, or with --latents a folder
  --caption FILE        one caption for all
  --captions DIR        a folder of captions named as the latents
  --latent-key NAME     the latent's tensor, if it has another name
  --caption-key NAME    the caption's tensor, if it has another name
  --sigma SIGMA         noise level of the latents, 0 to 1 (the files', or 0)
  --seed SEED           of the first image of every file (0)
  --steps STEPS         1, 2 or 4 (what the bundle says)
  --times TIMES         for bundles of any times: 1.0,0.75,0.5,0.25,0
  --rule {sde,ode}      sde adds noise between steps (sde)
  --overwrite           replace images that exist
  --backend BACKEND     onnxruntime, tensorrt (onnxruntime)
  --device, --provider NAME
                        cpu, cuda:0, or an ONNX Runtime provider (cpu; with tensorrt cuda:0)
  --provider-library FILE
                        onnxruntime: the library of a plug-in provider
  --engines NAME        tensorrt: the engine set (the first that fits)
  --threads N           CPU threads (all)
  --no-verify           do not hash the bundle's files first

examples:
  pid-decode-cpp flux-2k --latent latent.safetensors --caption caption.safetensors -o image.png
  pid-decode-cpp flux-2k --latents latents/ --captions captions/ --seed 7 -o images/
  pid-decode-cpp flux-2k --latent latent.safetensors -o image.png --backend tensorrt

files:
  A latent file has one tensor, or one named "latent": [C, h, w] or [B, C, h, w] in float32,
  float16 or bfloat16, normalised as the bundle's manifest says. It may also hold "caption",
  [T, D] or [B, T, D], and "sigma", a number or [B]. A batch makes image-0.png, image-1.png, ..
  Image b of a file is decoded with seed + b, so a file gives the same images alone or among
  others. Every input is checked before the first decode, and images appear whole or not at all.)";

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

float sigma(const std::string& text) {
    const double value = number(text);
    if (!(value >= 0 && value <= 1))
        throw Unusable{"a number in [0, 1]"};
    return static_cast<float>(value);
}

std::vector<double> times(const std::string& text) {
    std::vector<double> values;
    for (std::size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
        end = text.find(',', begin);
        values.push_back(number(text.substr(begin, end - begin)));
    }
    return values;
}

pid_rule rule(const std::string& text) {
    if (text != "sde" && text != "ode")
        throw Unusable{"sde or ode"};
    return text == "sde" ? PID_SDE : PID_ODE;
}

struct Option {
    // All names, the first for messages.
    std::vector<std::string> names;
    bool takes_value;
    std::function<void(Arguments&, const std::string&)> set;
};

std::vector<Option> make_options() {
    const auto path = [](Path Arguments::* member) {
        return [member](Arguments& to, const std::string& text) { to.*member = text; };
    };
    const auto word = [](std::string Arguments::* member) {
        return [member](Arguments& to, const std::string& text) { to.*member = text; };
    };
    const auto flag = [](bool Arguments::* member, bool value) {
        return [member, value](Arguments& to, const std::string&) { to.*member = value; };
    };
    return {
        {{"-h", "--help"}, false, nullptr},
        {{"--version"}, false, nullptr},
        {{"--quiet"}, false, flag(&Arguments::quiet, true)},
        {{"--json"}, false, flag(&Arguments::json, true)},
        {{"--latent"}, true, path(&Arguments::latents)},
        {{"--latents"},
         true,
         [](Arguments& to, const std::string& text) {
             to.latents = text;
             to.many = true;
         }},
        {{"-o/--output", "-o", "--output"}, true, path(&Arguments::output)},
        {{"--caption"}, true, path(&Arguments::caption)},
        {{"--captions"}, true, path(&Arguments::captions)},
        {{"--latent-key"}, true, word(&Arguments::latent_key)},
        {{"--caption-key"}, true, word(&Arguments::caption_key)},
        {{"--sigma"}, true, [](Arguments& to, const std::string& text) { to.sigma = sigma(text); }},
        {{"--seed"},
         true,
         [](Arguments& to, const std::string& text) {
             to.seed = integer(text, 0, std::numeric_limits<std::uint64_t>::max(), "2^64 - 1");
         }},
        {{"--steps"},
         true,
         [](Arguments& to, const std::string& text) {
             to.steps = static_cast<int>(integer(text, 1, most_steps, "1000"));
         }},
        {{"--times"}, true, [](Arguments& to, const std::string& text) { to.times = times(text); }},
        {{"--rule"}, true, [](Arguments& to, const std::string& text) { to.rule = rule(text); }},
        {{"--overwrite"}, false, flag(&Arguments::overwrite, true)},
        {{"--backend"}, true, word(&Arguments::backend)},
        {{"--device/--provider", "--device", "--provider"}, true, word(&Arguments::device)},
        {{"--provider-library"}, true, word(&Arguments::provider_library)},
        {{"--engines"}, true, word(&Arguments::engine_set)},
        {{"--threads"},
         true,
         [](Arguments& to, const std::string& text) {
             to.threads = integer(text, 1, most_threads, "4096");
         }},
        {{"--no-verify"}, false, flag(&Arguments::verify, false)},
    };
}

// A word such as --seed, -oFILE or --seed=7, but not a negative number.
bool is_option(const std::string& word) {
    return word.size() > 1 && word[0] == '-' &&
           std::string_view(".0123456789").find(word[1]) == std::string_view::npos;
}

// Reads words one by one.
class Parser {
public:
    explicit Parser(const std::vector<std::string>& words) : words_(words) {}

    std::optional<Arguments> parse() {
        for (; next_ < words_.size(); ++next_) {
            const std::string& word = words_[next_];
            if (only_positional_ || !is_option(word))
                positional(word);
            else if (word == "--")
                only_positional_ = true;
            else if (!option(word))
                return std::nullopt;
        }
        check();
        return arguments_;
    }

private:
    void positional(const std::string& word) {
        if (has_bundle_)
            refuse("unrecognized arguments: ", word.substr(0, 80), try_help);
        arguments_.bundle = word;
        has_bundle_ = true;
    }

    // Whether to go on.
    bool option(const std::string& word) {
        const bool is_long = word[1] == '-';
        const std::size_t cut = is_long ? word.find('=') : 2;
        const std::string name = word.substr(0, cut);
        const auto found = std::find_if(options_.begin(), options_.end(), [&](const Option& each) {
            return std::find(each.names.begin(), each.names.end(), name) != each.names.end();
        });
        const bool joined = cut != std::string::npos && cut < word.size();
        if (found == options_.end() || name.find('/') != std::string::npos)
            refuse("unrecognized arguments: ", word.substr(0, 80), try_help);
        const std::string& shown = found->names[0];
        if (!found->takes_value && joined)
            refuse("argument ", shown, ": expected no value", try_help);
        if (shown == "-h" || shown == "--version") {
            print_line(shown == "-h" ? help : "pid-decode-cpp " PID_VERSION);
            return false;
        }
        std::string value;
        if (joined) {
            value = word.substr(is_long ? cut + 1 : cut);
        } else if (found->takes_value) {
            if (next_ + 1 == words_.size() || is_option(words_[next_ + 1]))
                refuse("argument ", shown, ": expected one argument", try_help);
            value = words_[++next_];
        }
        given_.insert(shown);
        try {
            found->set(arguments_, value);
        } catch (const Unusable& unusable) {
            refuse("argument ", shown, ": expected ", unusable.wanted, ", but got ",
                   core::shown(value), try_help);
        }
        return true;
    }

    void exclude(const char* first, const char* second) {
        if (given_.count(first) > 0 && given_.count(second) > 0)
            refuse("argument ", second, ": not allowed with argument ", first, try_help);
    }

    void check() {
        exclude("--latent", "--latents");
        exclude("--caption", "--captions");
        exclude("--steps", "--times");
        std::string missing = has_bundle_ ? "" : "bundle";
        if (given_.count("-o/--output") == 0)
            missing += missing.empty() ? "-o/--output" : ", -o/--output";
        if (!missing.empty())
            refuse("the following arguments are required: ", missing, try_help);
        if (given_.count("--latent") + given_.count("--latents") == 0)
            refuse("one of the arguments --latent --latents is required", try_help);
    }

    const std::vector<std::string>& words_;
    const std::vector<Option> options_ = make_options();
    Arguments arguments_;
    std::set<std::string> given_;
    std::size_t next_ = 0;
    bool has_bundle_ = false;
    bool only_positional_ = false;
};

} // namespace

std::optional<Arguments> parse_arguments(const std::vector<std::string>& words) {
    return Parser(words).parse();
}

} // namespace pid::cli
