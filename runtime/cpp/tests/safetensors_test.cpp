// Safetensors files, whole and broken.
#include "bundle/safetensors.h"

#include <cstring>

#include "refusal.h"

namespace {

using pid::core::Safetensors;
using pid::test::Folder;
using pid::test::refusal;

std::string file_of(const std::string& header, const std::string& data) {
    std::string prefix;
    for (unsigned shift = 0; shift < 64; shift += 8)
        prefix += static_cast<char>(static_cast<std::uint64_t>(header.size()) >> shift & 0xFFU);
    return prefix + header + data;
}

template <typename Value>
std::string bytes_of(const std::vector<Value>& values) {
    std::string bytes(values.size() * sizeof(Value), '\0');
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  std::size_t begin, std::size_t end) {
    return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
           ",\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
}

TEST(SafetensorsFile, ReadsEveryFloatInAnyOrder) {
    const Folder folder;
    const auto path = folder.path() / "file.safetensors";
    const std::string header =
        "{\"__metadata__\":{\"a\":\"b\"}," + entry("bf16", "BF16", "[4]", 32, 40) + "," +
        entry("f32", "F32", "[2,2]", 0, 16) + "," + entry("f16", "F16", "[8]", 16, 32) + "," +
        entry("scalar", "F32", "[]", 40, 44) + "," + entry("none", "F32", "[0,3]", 44, 44) + "," +
        entry("whole", "I64", "[1]", 44, 52) + "}   ";
    pid::test::write_bytes(
        path, file_of(header, bytes_of<float>({1.5F, -2.0F, 1e-30F, 3e38F}) +
                                  bytes_of<std::uint16_t>({0x3C00, 0xC000, 0x0001, 0x8001, 0x7BFF,
                                                           0x0400, 0x03FF, 0x7C00}) +
                                  bytes_of<std::uint16_t>({0x3F80, 0xBF00, 0x0080, 0x7F7F}) +
                                  bytes_of<float>({42.0F}) + bytes_of<std::int64_t>({7})));
    const Safetensors file(path);
    EXPECT_EQ(file.entries().size(), 6U);
    EXPECT_EQ(file.find("absent"), nullptr);
    EXPECT_EQ(file.find("f32")->shape, (pid::core::Shape{2, 2}));
    EXPECT_EQ(file.find("whole")->dtype, "I64");
    EXPECT_EQ(file.read_float32("f32"), (std::vector<float>{1.5F, -2.0F, 1e-30F, 3e38F}));
    const float infinity = std::numeric_limits<float>::infinity();
    EXPECT_EQ(file.read_float32("f16"), (std::vector<float>{1, -2, 0x1p-24F, -0x1p-24F, 65504,
                                                            0x1p-14F, 0x1.ff8p-15F, infinity}));
    EXPECT_EQ(file.read_float32("bf16"), (std::vector<float>{1, -0.5F, 0x1p-126F, 0x1.fep127F}));
    EXPECT_EQ(file.read_float32("scalar"), (std::vector<float>{42}));
    EXPECT_TRUE(file.read_float32("none").empty());
}

struct Broken {
    const char* what;
    std::string bytes;
};

const std::string pair = entry("a", "F32", "[1]", 0, 4);

const std::vector<Broken> broken{
    {"empty", ""},
    {"text", "a latent, honestly"},
    {"no header", std::string(8, '\xff')},
    {"header longer than the file", file_of("{}", "").substr(0, 9)},
    {"header of absurd size", std::string("\x00\x00\x00\x00\x00\x00\x00\x40", 8) + "{}"},
    {"no JSON", file_of("{", "")},
    {"no object", file_of("[]", "")},
    {"no UTF-8", file_of("{\"\xff\":1}", "")},
    {"deep", file_of(std::string(100000, '['), "")},
    {"entry is none", file_of("{\"a\":3}", "")},
    {"no dtype", file_of("{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", "1234")},
    {"no shape", file_of("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", "1234")},
    {"no offsets", file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", "1234")},
    {"three offsets",
     file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,4]}}", "1234")},
    {"a negative offset",
     file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", "1234")},
    {"a negative size", file_of("{" + entry("a", "F32", "[-1]", 0, 4) + "}", "1234")},
    {"a size that is no integer", file_of("{" + entry("a", "F32", "[1.0]", 0, 4) + "}", "1234")},
    {"a huge size", file_of("{" + entry("a", "F32", "[9007199254740993]", 0, 4) + "}", "1234")},
    {"sizes whose product overflows",
     file_of("{" + entry("a", "F32", "[4294967296,4294967296,1]", 0, 0) + "}", "")},
    {"begins after its end", file_of("{" + entry("a", "F32", "[1]", 4, 0) + "}", "1234")},
    {"ends outside", file_of("{" + entry("a", "F32", "[2]", 0, 8) + "}", "1234")},
    {"another size than its shape", file_of("{" + entry("a", "F32", "[2]", 0, 4) + "}", "1234")},
    {"a gap", file_of("{" + entry("a", "F32", "[1]", 4, 8) + "}", "12345678")},
    {"an overlap", file_of("{" + pair + "," + entry("b", "F32", "[1]", 2, 6) + "}", "123456")},
    {"data left over", file_of("{" + pair + "}", "12345678")},
    {"cut", file_of("{" + pair + "}", "123")}};

TEST(SafetensorsFile, RefusesWhatIsBroken) {
    const Folder folder;
    const auto path = folder.path() / "file.safetensors";
    for (const Broken& each : broken) {
        SCOPED_TRACE(each.what);
        pid::test::write_bytes(path, each.bytes);
        refusal([&] { const Safetensors file(path); });
    }
    EXPECT_NE(refusal([&] { const Safetensors file(folder.path()); }).find("is none"),
              std::string::npos);
    refusal([&] { const Safetensors file(folder.path() / "absent"); });
}

TEST(SafetensorsFile, RefusesAFileThatBecameShorter) {
    const Folder folder;
    const auto path = folder.path() / "file.safetensors";
    pid::test::write_bytes(path, file_of("{" + pair + "}", "1234"));
    const Safetensors file(path);
    std::filesystem::resize_file(path, 8);
    EXPECT_NE(refusal([&] { file.read_float32("a"); }).find("shorter"), std::string::npos);
}

} // namespace
