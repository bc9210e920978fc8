// Philox and its normals against tests/golden/philox.json, the vectors of the format document.
#include "noise.h"

#include <cmath>
#include <string>

#include "test_json.h"

namespace {

using nlohmann::json;
using Words = std::array<std::uint32_t, 4>;

std::uint64_t hexadecimal(const json& text) {
    return std::stoull(text.get<std::string>(), nullptr, 16);
}

template <std::size_t Count>
std::array<std::uint32_t, Count> words_of(const json& list) {
    std::array<std::uint32_t, Count> words{};
    for (std::size_t i = 0; i < Count; ++i)
        words[i] = static_cast<std::uint32_t>(hexadecimal(list.at(i)));
    return words;
}

const json& golden() {
    static const json vectors = pid::test::read_json(PID_GOLDEN_FOLDER "/philox.json");
    return vectors;
}

std::vector<float> normals(std::uint64_t seed, std::uint32_t draw, std::uint64_t start,
                           std::size_t count, std::size_t threads = 1) {
    std::vector<float> values(count);
    pid::core::standard_normal(seed, draw, start, count, values.data(), threads);
    return values;
}

TEST(Philox, PublishedKnownAnswers) {
    ASSERT_EQ(golden()["known_answers"].size(), 3U);
    for (const json& entry : golden()["known_answers"])
        EXPECT_EQ(pid::core::philox(words_of<4>(entry["counter"]), words_of<2>(entry["key"])),
                  words_of<4>(entry["words"]));
}

TEST(Philox, WordsOfABlock) {
    for (const json& entry : golden()["blocks"]) {
        const std::uint64_t seed = hexadecimal(entry["seed"]), block = hexadecimal(entry["block"]);
        const Words counter{static_cast<std::uint32_t>(block),
                            static_cast<std::uint32_t>(block >> 32U),
                            entry["draw"].get<std::uint32_t>(), 0};
        EXPECT_EQ(pid::core::philox(counter, {static_cast<std::uint32_t>(seed),
                                              static_cast<std::uint32_t>(seed >> 32U)}),
                  words_of<4>(entry["words"]));
    }
}

TEST(Noise, Normals) {
    for (const json& entry : golden()["normals"]) {
        const auto wanted = entry["values"].get<std::vector<float>>();
        const auto got = normals(hexadecimal(entry["seed"]), entry["draw"].get<std::uint32_t>(),
                                 hexadecimal(entry["start"]), wanted.size());
        for (std::size_t i = 0; i < wanted.size(); ++i)
            EXPECT_NEAR(got[i], wanted[i], 1e-6) << entry["seed"] << " value " << i;
    }
}

TEST(Noise, ThreadsAndStartsDoNotShow) {
    const std::size_t count = (std::size_t{3} << 16U) + 7; // several chunks of work
    const auto whole = normals(5, 2, 0, count);
    EXPECT_EQ(normals(5, 2, 0, count, 3), whole);
    for (const std::size_t start : {1U, 2U, 3U, 4U, 65535U, 65537U, 190000U}) {
        const std::vector<float> rest(whole.begin() + static_cast<std::ptrdiff_t>(start),
                                      whole.end());
        EXPECT_EQ(normals(5, 2, start, count - start, 2), rest);
    }
    EXPECT_TRUE(normals(5, 2, 7, 0).empty());
}

TEST(Noise, IsStandardNormal) {
    const std::size_t count = 1U << 20U;
    double sum = 0, squares = 0;
    for (const float value : normals(7, 0, 0, count, 2)) {
        ASSERT_TRUE(std::isfinite(value));
        sum += value;
        squares += static_cast<double>(value) * value;
    }
    const double n = static_cast<double>(count);
    EXPECT_LT(std::abs(sum / n), 4 / std::sqrt(n));
    EXPECT_LT(std::abs(squares / n - 1), 4 * std::sqrt(2 / n));
}

} // namespace
