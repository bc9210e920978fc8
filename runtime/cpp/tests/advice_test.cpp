// Advice against that of the Python runtime, which wrote advice.json.
#include "advice.h"

#include "bundle/manifest_json.h"
#include "test_json.h"

namespace {

using Advice = pid::test::WithData;

TEST_F(Advice, IsThatOfPython) {
    const auto cases = pid::test::read_json(pid::test::data_folder() / "advice.json");
    ASSERT_GT(cases.size(), 50U);
    for (const auto& each : cases) {
        const auto model = pid::core::read_model(each["model"], "model");
        const auto got = pid::core::advice(model, each["width"], each["height"], each["sigma"],
                                           each["has_caption"]);
        EXPECT_EQ(got, each["lines"].get<std::vector<std::string>>()) << each;
    }
}

} // namespace
