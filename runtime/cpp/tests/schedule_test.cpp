// Times and factors of the sampler, as Python computes them.
#include "schedule.h"

#include "pid/pid_runtime.h"
#include "refusal.h"
#include "test_json.h"

namespace {

using nlohmann::json;
using pid::core::Sampler;
using pid::core::Schedule;

using Schedules = pid::test::WithData;

Sampler sampler_of(const json& described) {
    Sampler sampler{};
    described.at("steps").get_to(sampler.steps);
    described.at("max_steps").get_to(sampler.max_steps);
    described.at("rule").get_to(sampler.rule);
    described.at("times").get_to(sampler.times);
    described.at("schedules").get_to(sampler.schedules);
    if (const json& shift = described.at("flow_shift"); !shift.is_null())
        sampler.flow_shift = {shift.at("shift").get<double>(),
                              shift.at("size").get<std::uint64_t>()};
    return sampler;
}

Schedule schedule_of(const json& each) {
    const auto times = each.value("times", std::vector<double>());
    pid_decode_params params = pid_decode_default_params();
    params.steps = each.value("steps", 0);
    params.times = times.data();
    params.time_count = times.size();
    params.rule = each.value("rule", static_cast<pid_rule>(PID_DEFAULT_RULE));
    const auto size = each.value("size", std::vector<std::uint64_t>());
    const pid::core::ImageSize image{size.empty() ? 0 : size[0], size.empty() ? 0 : size[1]};
    return check_schedule(sampler_of(each.at("sampler")), params, size.empty() ? nullptr : &image);
}

template <std::size_t Count>
void expect_near(const std::vector<std::array<float, Count>>& got, const json& wanted) {
    ASSERT_EQ(got.size(), wanted.size());
    for (std::size_t row = 0; row < got.size(); ++row)
        for (std::size_t i = 0; i < Count; ++i) {
            const auto value = wanted[row][i].get<float>();
            EXPECT_NEAR(got[row][i], value, 2e-7F * std::max(1.0F, std::abs(value)));
        }
}

TEST_F(Schedules, AreThoseOfPython) {
    const json cases = pid::test::read_json(pid::test::data_folder() / "schedules.json");
    ASSERT_GT(cases.size(), 15U);
    for (const json& each : cases) {
        SCOPED_TRACE(each.dump());
        if (each.contains("message")) {
            EXPECT_EQ(pid::test::refusal([&] { schedule_of(each); }),
                      each["message"].get<std::string>());
            continue;
        }
        const Schedule schedule = schedule_of(each);
        const json& wanted = each["wanted"];
        EXPECT_EQ(schedule.rows, wanted["rows"].get<std::vector<std::uint64_t>>());
        EXPECT_EQ(pid::core::rules[static_cast<std::size_t>(schedule.rule)], wanted["rule"]);
        const auto times = wanted["times"].get<std::vector<double>>();
        ASSERT_EQ(schedule.times.size(), times.size());
        for (std::size_t step = 0; step < times.size(); ++step)
            EXPECT_NEAR(schedule.times[step], times[step], 1e-14);
        EXPECT_EQ(schedule.moments, wanted["moments"].get<std::vector<float>>());
        expect_near(schedule.mixes(), wanted["mixes"]);
        expect_near(schedule.predictions(), wanted["predictions"]);
        if (schedule.rule != PID_DPMPP_2M)
            expect_near(schedule.updates(), wanted["updates"]);
    }
}

} // namespace
