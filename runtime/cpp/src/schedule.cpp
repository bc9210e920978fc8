#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "errors.h"

namespace pid::core {
namespace {

constexpr std::uint64_t most_steps = 1000;
// Where shifted times begin; 1 is noise alone.
constexpr double first_time = 0.999;

double log_snr(double t) {
    return std::log((1 - t) / t);
}

using Mix = std::array<double, 4>;

// A step of DPM-Solver++(2M) from t to `after`; `before` is the time before t, 1 if there is none.
//
// Lu et al., "DPM-Solver++", arXiv 2211.01095, algorithm 2, for x_t = (1 - t) x0 + t noise:
// lambda = ln((1 - t) / t), h = lambda(after) - lambda(t), r = (lambda(t) - lambda(before)) / h;
// x' = after/t x - (1 - after) (e^-h - 1) D, D = x0 + (x0 - x0_before) / (2 r). The first step and
// the last are of first order, D = x0.
Mix dpm(double before, double t, double after) {
    if (after == 0)
        return {0, 1, 0, 0};
    const double decay = (1 - t) / t * after / (1 - after); // e^-h
    const double weight = (1 - after) * (1 - decay);
    double ahead = 0; // 1 / (2 r)
    if (before < 1)
        ahead = -std::log(decay) / (2 * (log_snr(t) - log_snr(before)));
    return {after / t, weight * (1 + ahead), -weight * ahead, 0};
}

template <std::size_t Count>
std::array<float, Count> as_floats(const std::array<double, Count>& numbers) {
    std::array<float, Count> rounded{};
    std::transform(numbers.begin(), numbers.end(), rounded.begin(),
                   [](double number) { return static_cast<float>(number); });
    return rounded;
}

std::string listed(const std::vector<double>& numbers) {
    std::vector<std::string> texts;
    for (const double number : numbers)
        texts.push_back(shown(number));
    return "[" + joined(texts) + "]";
}

// The numbers of steps a bundle knows, in ascending order: "1, 2, 4".
std::string known_steps(const Sampler& sampler) {
    std::vector<std::size_t> numbers;
    for (const auto& [steps, rows] : sampler.schedules)
        numbers.push_back(rows.size());
    std::sort(numbers.begin(), numbers.end());
    return joined(numbers);
}

// The times that are given. Refuses more than any bundle takes.
std::vector<double> given_times(const Sampler& sampler, const pid_decode_params& params) {
    if (params.time_count == 0 || params.times == nullptr)
        return {};
    const std::uint64_t most =
        sampler.times.empty() ? std::min(sampler.max_steps, most_steps) : most_steps;
    if (params.time_count - 1 > most)
        refuse("expected at most ", most, " steps, but got ", params.time_count - 1,
               "; leave out some times");
    return {params.times, params.times + params.time_count};
}

// The times of a bundle that takes any.
std::vector<double> visited_of_any(const Sampler& sampler, const pid_decode_params& params,
                                   const ImageSize* image) {
    std::vector<double> visited = given_times(sampler, params);
    if (!visited.empty()) {
        bool descending = visited.size() > 1 && visited.front() <= 1 && visited.back() == 0;
        for (std::size_t step = 0; step + 1 < visited.size(); ++step)
            descending = descending && visited[step] > visited[step + 1];
        if (!descending)
            refuse("expected times descending from at most 1 to 0, but got ", listed(visited),
                   "; the last is 0");
        if (params.steps != 0 && static_cast<std::size_t>(params.steps) != visited.size() - 1)
            refuse("expected ", params.steps, " steps, but got times of ", visited.size() - 1,
                   "; give the times alone");
        return visited;
    }
    const auto& shift = sampler.flow_shift;
    if (!shift)
        refuse("expected times, since this bundle takes any, but got none; give for example ",
               "1.0,0.75,0.5,0.25,0");
    const std::uint64_t steps =
        params.steps == 0 ? sampler.steps : static_cast<std::uint64_t>(params.steps);
    if (steps > sampler.max_steps)
        refuse("expected from 1 to ", sampler.max_steps, " steps, but got ", steps,
               "; choose another number");
    return shifted_times(steps, image != nullptr ? *image : ImageSize{shift->size, shift->size},
                         *shift);
}

pid_rule rule_of(const Sampler& sampler, pid_rule asked) {
    if (asked == PID_DEFAULT_RULE)
        return default_rule(sampler);
    if (asked < 0 || static_cast<std::size_t>(asked) >= rules.size())
        refuse("expected rule ", joined(rules), ", but got ", asked);
    return asked;
}

} // namespace

std::vector<std::array<float, 3>> Schedule::updates() const {
    std::vector<std::array<float, 3>> factors;
    for (std::size_t step = 0; step < steps(); ++step) {
        const double t = times[step], after = times[step + 1];
        // sde: x0 = x - t v, then (1 - after) x0 + after noise. ode: x + (after - t) v.
        factors.push_back(
            as_floats(rule == PID_ODE ? std::array<double, 3>{1, after - t, 0}
                                      : std::array<double, 3>{1 - after, -(1 - after) * t, after}));
    }
    return factors;
}

std::vector<std::array<float, 3>> Schedule::predictions() const {
    std::vector<std::array<float, 3>> factors;
    for (std::size_t step = 0; step < steps(); ++step)
        factors.push_back(as_floats(std::array<double, 3>{1, -times[step], 0}));
    return factors;
}

std::vector<std::array<float, 4>> Schedule::mixes() const {
    std::vector<std::array<float, 4>> factors;
    for (std::size_t step = 0; step < steps(); ++step) {
        const double t = times[step], after = times[step + 1];
        Mix mix{0, 1 - after, 0, after};
        if (rule == PID_ODE)
            mix = {after / t, 1 - after / t, 0, 0};
        else if (rule == PID_DPMPP_2M)
            mix = dpm(step > 0 ? times[step - 1] : 1, t, after);
        factors.push_back(as_floats(mix));
    }
    return factors;
}

std::vector<double> shifted_times(std::size_t steps, const ImageSize& image,
                                  const FlowShift& shift) {
    const double area = static_cast<double>(image.height) * static_cast<double>(image.width);
    const double factor =
        shift.shift * std::sqrt(std::sqrt(area) / static_cast<double>(shift.size));
    std::vector<double> times;
    for (std::size_t index = 0; index <= steps; ++index) {
        const double s = first_time * (1 - static_cast<double>(index) / static_cast<double>(steps));
        times.push_back(factor * s / (1 + (factor - 1) * s));
    }
    return times;
}

pid_rule default_rule(const Sampler& sampler) {
    return static_cast<pid_rule>(std::find(rules.begin(), rules.end(), sampler.rule) -
                                 rules.begin());
}

Schedule check_schedule(const Sampler& sampler, const pid_decode_params& params,
                        const ImageSize* image) {
    const pid_rule rule = rule_of(sampler, params.rule);
    if (params.steps < 0)
        refuse("expected at least one step, but got ", params.steps, "; 0 is the bundle's default");
    if (sampler.times.empty()) {
        Schedule schedule{visited_of_any(sampler, params, image), {}, rule, {}};
        for (std::size_t step = 0; step + 1 < schedule.times.size(); ++step) {
            schedule.rows.push_back(step);
            schedule.moments.push_back(static_cast<float>(1000 * schedule.times[step]));
        }
        return schedule;
    }
    if (params.time_count > 0)
        refuse("expected no times, since this bundle knows only its own, but got ",
               listed(given_times(sampler, params)),
               "; give steps, or export with --arbitrary-timesteps");
    const std::uint64_t steps =
        params.steps == 0 ? sampler.steps : static_cast<std::uint64_t>(params.steps);
    const auto found = sampler.schedules.find(std::to_string(steps));
    if (found == sampler.schedules.end())
        refuse("expected ", known_steps(sampler), " steps, but got ", steps,
               "; more steps need a bundle exported with --arbitrary-timesteps");
    Schedule schedule{{}, found->second, rule, {}};
    for (const std::uint64_t row : schedule.rows)
        schedule.times.push_back(sampler.times[row]);
    schedule.times.push_back(0);
    return schedule;
}

} // namespace pid::core
