// Position tables against those of the Python runtime, which wrote tables.json.
#include "tables.h"

#include <cmath>

#include "bundle/manifest_json.h"
#include "test_json.h"

namespace {

using Tables = pid::test::WithData;

TEST_F(Tables, AreThoseOfPython) {
    const auto cases = pid::test::read_json(pid::test::data_folder() / "tables.json");
    ASSERT_GT(cases.size(), 10U);
    for (const auto& each : cases) {
        const auto size = [&](const char* name) {
            return each["sizes"][name].get<std::uint64_t>();
        };
        const pid::core::Network dimensions{size("patch_size"), size("T"), 1, 1,
                                            size("tokens_per_latent")};
        const auto sizes =
            pid::core::Sizes::of_request(dimensions, 1, size("h"), size("w"), size("T"), 1);
        const auto table = pid::core::read_table(each["source"], "a table");
        const auto got = pid::core::compute_table(table, sizes);
        const auto wanted = each["values"].get<std::vector<float>>();
        ASSERT_EQ(got.size(), wanted.size()) << each["source"];
        float largest = 0;
        for (std::size_t i = 0; i < got.size(); ++i)
            largest = std::max(largest, std::abs(got[i] - wanted[i]));
        EXPECT_LE(largest, each["tolerance"].get<float>()) << each["source"] << each["sizes"];
    }
}

} // namespace
