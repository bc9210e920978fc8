// How pictures are cut into tiles, as Python cuts them.
#include "tiles.h"

#include "pid/pid_runtime.h"
#include "refusal.h"
#include "test_json.h"

namespace {

using nlohmann::json;
using pid::core::cut;
using pid::core::Manifest;
using pid::core::TileAxis;

using Tiles = pid::test::WithData;
using Starts = std::vector<std::uint64_t>;

// As much of a manifest as tiles follow from: 32 pixels per pixel of the latent.
Manifest manifest_of(const json& each) {
    Manifest manifest{};
    manifest.network = {16, 12, 32, 16, 2};
    manifest.model.variant = each.value("variant", "");
    for (const json& size : each.value("trained_sizes", json::array()))
        manifest.model.trained_sizes.emplace_back(size[0], size[1]);
    manifest.buckets["only"].max_tokens = each.at("max_tokens").get<std::uint64_t>();
    return manifest;
}

pid_decode_params params_of(const json& each) {
    pid_decode_params params = pid_decode_default_params();
    const auto tile = each.at("tile").get<std::vector<std::int64_t>>();
    params.tile_width = tile[0];
    params.tile_height = tile[1];
    params.overlap = each.value("overlap", std::int64_t{-1});
    return params;
}

TEST_F(Tiles, AreThoseOfPython) {
    const json cases = pid::test::read_json(pid::test::data_folder() / "tilings.json");
    ASSERT_GT(cases.size(), 25U);
    for (const json& each : cases) {
        SCOPED_TRACE(each.dump());
        const auto tiling = [&] {
            return tiling_of(manifest_of(each), each["height"].get<std::uint64_t>(),
                             each["width"].get<std::uint64_t>(), params_of(each));
        };
        if (each.contains("message")) {
            EXPECT_EQ(pid::test::refusal(tiling), each["message"].get<std::string>());
            continue;
        }
        const auto got = tiling();
        const json& wanted = each["wanted"];
        ASSERT_EQ(got.has_value(), !wanted.is_null());
        if (!got)
            continue;
        EXPECT_EQ(got->rows.tile, wanted["latent"][0].get<std::uint64_t>());
        EXPECT_EQ(got->columns.tile, wanted["latent"][1].get<std::uint64_t>());
        EXPECT_EQ(got->rows.starts, wanted["rows"].get<Starts>());
        EXPECT_EQ(got->columns.starts, wanted["columns"].get<Starts>());
        EXPECT_EQ(got->reason, wanted["reason"].get<std::string>());
        EXPECT_EQ(described(*got, 32), wanted["text"].get<std::string>());
        const std::size_t last = got->rows.starts.size() - 1;
        EXPECT_EQ(got->rows.weights(last, 3), wanted["weights"].get<std::vector<float>>());
    }
}

TEST(TileWeights, SumToOne) {
    for (const auto& [size, tile, overlap] : std::vector<std::array<std::uint64_t, 3>>{
             {12, 8, 3}, {300, 7, 3}, {64, 64, 0}, {17, 5, 2}, {99, 10, 0}}) {
        const TileAxis axis = cut(size, tile, overlap);
        EXPECT_EQ(axis.starts.back(), size - tile);
        std::vector<float> total(size * 4);
        for (std::size_t index = 0; index < axis.starts.size(); ++index) {
            const std::vector<float> weights = axis.weights(index, 4);
            ASSERT_EQ(weights.size(), tile * 4);
            for (std::size_t at = 0; at < weights.size(); ++at)
                total[axis.starts[index] * 4 + at] += weights[at];
        }
        for (const float sum : total)
            ASSERT_NEAR(sum, 1, 1e-6F);
    }
}

TEST(TileWeights, FallInALineOverTheOverlap) {
    const TileAxis axis{12, 8, {0, 4}};
    const std::vector<float> first{1, 1, 1, 1, 0.875F, 0.625F, 0.375F, 0.125F};
    EXPECT_EQ(axis.weights(0, 1), first);
    EXPECT_EQ(axis.weights(1, 1), std::vector<float>(first.rbegin(), first.rend()));
}

} // namespace
