// Sizes of a decode, and slices of a chunked one.
#include "bundle/sizes.h"

#include "interpreter.h"
#include "test_support.h"

namespace {

using pid::core::Sizes;
using pid::core::SymbolicShape;
using pid::core::too_much;

constexpr std::uint64_t one = 1, three = 3;
const pid::core::Network network{16, 12, 32, 16, 2};

TEST(Sizes, OfARequest) {
    const Sizes sizes = Sizes::of_request(network, 3, 2, 5, 7, 4);
    const std::vector<std::pair<const char*, std::uint64_t>> wanted{
        {"B", 3},   {"T", 7},  {"h", 2},  {"w", 5}, {"Hs", 4},  {"Ws", 10}, {"H", 64},
        {"W", 160}, {"L", 40}, {"S", 47}, {"N", 4}, {"row", 0}, {"step", 0}};
    for (const auto& [symbol, value] : wanted)
        EXPECT_EQ(sizes.value(std::string(symbol)), value) << symbol;
    EXPECT_EQ(sizes.shape({"B", three, "H", "W"}), (pid::core::Shape{3, 3, 64, 160}));
    EXPECT_EQ(sizes.bytes(pid::core::DType::float16, {"B", "L", three}), 2U * 3 * 40 * 3);
}

TEST(Sizes, LargestOfABucket) {
    const Sizes column = Sizes::of_column(network, 5, 10), row = Sizes::of_row(network, 5, 10);
    EXPECT_EQ(column.value(std::string("h")), 3U); // ceil(10 / 4)
    EXPECT_EQ(column.value(std::string("H")), 160U);
    EXPECT_EQ(column.value(std::string("W")), 16U);
    EXPECT_EQ(column.value(std::string("S")), 22U);
    EXPECT_EQ(row.value(std::string("W")), 160U);
    EXPECT_EQ(row.value(std::string("Hs")), 1U);
    EXPECT_EQ(row.value(std::string("step")), 4U);
}

TEST(Sizes, OfATile) {
    const Sizes sizes = Sizes::of_request(network, 3, 9, 8, 7, 4);
    EXPECT_EQ(sizes.resized(2, 5), Sizes::of_request(network, 3, 2, 5, 7, 4));
}

TEST(Sizes, IndexOfAStart) {
    const Sizes sizes = Sizes::of_request(network, 1, 1, 1, 7, 4);
    const SymbolicShape shape{"B", "S", three};
    EXPECT_EQ(sizes.index(shape, {}), 0U);
    EXPECT_EQ(sizes.index(shape, {std::uint64_t{0}, "T", one}), 7U * 3 + 1);
}

TEST(Sizes, SymbolsOfAGraphTakeTheirPlace) {
    const Sizes sizes = Sizes::of_request(network, 1, 1, 1, 7, 4);
    const Sizes local = sizes.extended({{"Q", "S"}, {"L", "T"}});
    EXPECT_EQ(local.count({"Q", "L"}), sizes.count({"S", "T"}));
    EXPECT_FALSE(local == sizes);
}

TEST(Sizes, DoNotOverflow) {
    const std::uint64_t huge = std::uint64_t{1} << 40U;
    EXPECT_EQ(pid::core::product(huge, huge), too_much);
    EXPECT_EQ(pid::core::product(huge, 0), 0U);
    EXPECT_EQ(pid::core::product(0, huge), 0U);
    EXPECT_EQ(pid::core::product(too_much, 2), too_much);
    EXPECT_EQ(pid::core::sum(too_much, too_much), too_much);
    EXPECT_EQ(pid::core::sum(~std::uint64_t{0}, 1), too_much);
    const Sizes sizes = Sizes::of_request(network, huge, huge, huge, 1, 1);
    EXPECT_GE(sizes.count({"B", "L", "H", "W"}), too_much);
}

TEST(Slices, AreFewEvenAndWhole) {
    for (std::uint64_t count = 1; count < 70; ++count) {
        for (std::uint64_t largest = 1; largest < 30; ++largest) {
            const auto slices = pid::core::even_slices(count, largest);
            ASSERT_EQ(slices.size(), (count + largest - 1) / largest);
            std::uint64_t at = 0;
            for (const auto& [begin, end] : slices) {
                ASSERT_EQ(begin, at);
                ASSERT_LE(end - begin, largest);
                ASSERT_GE(end - begin, count / slices.size());
                at = end;
            }
            ASSERT_EQ(at, count);
        }
    }
}

} // namespace
