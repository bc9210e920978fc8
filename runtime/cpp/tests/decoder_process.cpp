// A decoder that does what lines of JSON on stdin say and answers each with a line, so that Python
// can compare and time the two runtimes:
//
//     {"open": "bundle", "threads": 2, "verify": false}             -> {"seconds": 0.2}
//     {"decode": {"latent": {"file": "l.f32", "shape": [1, 16, 2, 3]}, ..}, "seeds": [7],
//      "output": "uint8", "to": "image.u8"}                         -> {"seconds": .., "shape": ..}
//     {"plan": [480, 640], "batch": 2, "steps": 2}                  -> {"tiles": .., "text": ..}
//
// Files hold the values alone; with "state_to" there is one of the last state, before it is
// clamped. What fails is answered with {"error": .., "status": ..}.
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <pid/pid_runtime.hpp>

namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

// float32 tensors that a request names, kept while it runs.
class Tensors {
public:
    pid_tensor read(const json& described) {
        std::ifstream file(described.at("file").get<std::string>(), std::ios::binary);
        auto& bytes = contents_.emplace_back((std::istreambuf_iterator<char>(file)),
                                             std::istreambuf_iterator<char>());
        const auto shape = described.at("shape").get<std::vector<std::int64_t>>();
        return pid_host_tensor(bytes.data(), PID_FLOAT32, static_cast<std::int32_t>(shape.size()),
                               shape.data());
    }

private:
    std::vector<std::vector<char>> contents_;
};

json open(std::optional<pid::Decoder>& decoder, const json& line) {
    pid::DecoderOptions options;
    options.threads = line.value("threads", 0);
    options.verify = line.value("verify", true);
    decoder.reset();
    const auto begin = Clock::now();
    decoder.emplace(line["open"].get<std::string>(), options);
    return {{"seconds", seconds_since(begin)}};
}

// Of a request what plans look at too.
pid::DecodeRequest sampling(const json& line) {
    pid::DecodeRequest request;
    request.times = line.value("times", std::vector<double>());
    request.steps = line.value("steps", 0);
    const std::map<std::string, pid_rule> rules{
        {"", PID_DEFAULT_RULE}, {"sde", PID_SDE}, {"ode", PID_ODE}, {"dpm++2m", PID_DPMPP_2M}};
    request.rule = rules.at(line.value("rule", ""));
    request.guidance = line.value("guidance", 0.0);
    const auto tile = line.value("tile", std::vector<std::int64_t>{0, 0}); // -1, -1: automatic
    request.tile_width = tile.at(0);
    request.tile_height = tile.at(1);
    request.overlap = line.value("overlap", std::int64_t{-1});
    return request;
}

json plan(pid::Decoder& decoder, const json& line) {
    const auto size = line["plan"].get<std::vector<std::int64_t>>(); // height and width
    const pid_plan plan =
        decoder.plan(size.at(0), size.at(1), sampling(line), line.value("batch", std::int64_t{1}));
    return {{"width", plan.width},
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
            {"reason", plan.reason == nullptr ? json() : json(plan.reason)},
            {"text", plan.text}};
}

json decode(pid::Decoder& decoder, const json& line) {
    const json& given = line["decode"];
    Tensors tensors;
    pid::DecodeRequest request = sampling(line);
    request.latent = tensors.read(given.at("latent"));
    if (given.contains("caption"))
        request.caption = tensors.read(given["caption"]);
    if (given.contains("negative"))
        request.negative = tensors.read(given["negative"]);
    if (given.contains("noise"))
        request.noise = tensors.read(given["noise"]);
    for (const json& noise : given.value("step_noise", json::array()))
        request.step_noise.push_back(tensors.read(noise));
    request.sigma = line.value("sigma", std::vector<float>());
    request.seeds = line.value("seeds", std::vector<std::uint64_t>());
    request.output = line.value("output", "float32") == "uint8" ? PID_UINT8 : PID_FLOAT32;
    if (line.contains("state_to"))
        request.progress = [&](int done, int calls) {
            if (done < calls)
                return true;
            const pid::Array state = decoder.state();
            std::ofstream(line["state_to"].get<std::string>(), std::ios::binary)
                .write(state.data<char>(), static_cast<std::streamsize>(4 * state.count()));
            return true;
        };
    const auto begin = Clock::now();
    const pid::Array image = decoder.decode(request);
    const double seconds = seconds_since(begin);
    if (line.contains("to")) {
        std::ofstream file(line["to"].get<std::string>(), std::ios::binary);
        const std::size_t bytes = image.count() * pid_dtype_bytes(request.output);
        file.write(image.data<char>(), static_cast<std::streamsize>(bytes));
    }
    return {{"seconds", seconds}, {"shape", image.shape()}};
}

} // namespace

int main() {
    std::optional<pid::Decoder> decoder;
    for (std::string text; std::getline(std::cin, text);) {
        json answer;
        try {
            const json line = json::parse(text);
            if (line.contains("open"))
                answer = open(decoder, line);
            else if (line.contains("plan"))
                answer = plan(decoder.value(), line);
            else
                answer = decode(decoder.value(), line);
        } catch (const pid::Error& error) {
            answer = {{"error", error.what()}, {"status", pid_status_name(error.status())}};
        } catch (const std::exception& error) {
            answer = {{"error", error.what()}, {"status", "a wrong request"}};
        }
        std::cout << answer.dump() << std::endl;
    }
    return 0;
}
