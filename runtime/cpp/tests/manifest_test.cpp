// Manifests: what is read, and what is refused before anything is allocated. The cases are those of
// the Python runtime's tests, which tests/cpp writes down.
#include "bundle/manifest.h"

#include <algorithm>

#include "bundle/engines.h"
#include "bundle/folder.h"
#include "refusal.h"
#include "test_json.h"

namespace {

using pid::core::Manifest;
using pid::test::data_folder;
using pid::test::read_bytes;
using pid::test::refusal;
using pid::test::write_bytes;

using Manifests = pid::test::WithData;
using Bundles = pid::test::WithData;

TEST_F(Manifests, ValidOnesAreRead) {
    const auto cases = pid::test::read_json(data_folder() / "valid_manifests.json");
    ASSERT_GT(cases.size(), 2U);
    for (const auto& each : cases) {
        const Manifest manifest = Manifest::parse(each["text"].get<std::string>());
        EXPECT_EQ(manifest.buffers.size(), each["buffers"].get<std::size_t>());
        EXPECT_EQ(manifest.graphs.size(), each["graphs"].get<std::size_t>());
        EXPECT_EQ(manifest.program.at("step").size(), each["step"].get<std::size_t>());
        EXPECT_EQ(manifest.sampler.times.size(), each["times"].get<std::size_t>());
    }
}

TEST_F(Manifests, BrokenOnesAreRefused) {
    const auto cases = pid::test::read_json(data_folder() / "broken_manifests.json");
    ASSERT_GT(cases.size(), 150U);
    for (const auto& each : cases) {
        SCOPED_TRACE(each["name"].get<std::string>());
        const auto text = each["text"].get<std::string>();
        const std::string message = refusal([&] { Manifest::parse(text); });
        const auto& wanted = each["messages"];
        EXPECT_TRUE(std::any_of(wanted.begin(), wanted.end(),
                                [&](const auto& words) {
                                    return message.find(words.template get<std::string>()) !=
                                           std::string::npos;
                                }))
            << "wanted: " << wanted << "\ngot: " << message;
    }
}

TEST_F(Manifests, MutatedOnesAreJudgedAsInPython) {
    std::ifstream lines(data_folder() / "mutated_manifests.jsonl");
    std::size_t count = 0, refused = 0;
    for (std::string line; std::getline(lines, line); ++count) {
        const auto each = nlohmann::json::parse(line);
        const auto text = each["text"].get<std::string>();
        if (each["refused"].get<bool>()) {
            ++refused;
            SCOPED_TRACE(each["name"].get<std::string>());
            refusal([&] { Manifest::parse(text); });
        } else {
            EXPECT_NO_THROW(Manifest::parse(text)) << each["name"];
        }
    }
    EXPECT_GT(count, 200U);
    EXPECT_GT(refused, count / 4);
    EXPECT_LT(refused, count);
}

TEST_F(Manifests, EngineSetsAreReadAndRefusedAsInPython) {
    const auto cases = pid::test::read_json(data_folder() / "engine_sets.json");
    ASSERT_GT(cases.size(), 5U);
    for (const auto& each : cases) {
        const Manifest manifest = Manifest::parse(each["text"].get<std::string>());
        if (each.contains("messages")) {
            const auto& wanted = each["messages"];
            const std::string message = refusal([&] { pid::core::read_engine_sets(manifest); });
            EXPECT_TRUE(std::any_of(wanted.begin(), wanted.end(),
                                    [&](const auto& words) {
                                        return message.find(words.template get<std::string>()) !=
                                               std::string::npos;
                                    }))
                << "wanted: " << wanted << "\ngot: " << message;
            continue;
        }
        const auto sets = pid::core::read_engine_sets(manifest);
        ASSERT_EQ(sets.size(), each["sets"].size());
        for (std::size_t i = 0; i < sets.size(); ++i) {
            const auto& wanted = each["sets"][i];
            const Manifest run = sets[i].run_by(manifest);
            EXPECT_EQ(sets[i].name, wanted["name"].get<std::string>());
            EXPECT_EQ(run.program.at("step").size(), wanted["step"].get<std::size_t>());
            EXPECT_EQ(run.buffers.size(), wanted["buffers"].get<std::size_t>());
            EXPECT_EQ(sets[i].buckets.at("tiny").arena_bytes, wanted["arena"].get<std::uint64_t>());
        }
    }
}

TEST_F(Manifests, BucketsAreChosenByTokens) {
    const auto cases = pid::test::read_json(data_folder() / "valid_manifests.json");
    const Manifest manifest = Manifest::parse(cases[0]["text"].get<std::string>());
    EXPECT_EQ(manifest.bucket_for(1).first, "tiny");
    EXPECT_EQ(manifest.bucket_for(32).first, "tiny");
    EXPECT_EQ(manifest.bucket_for(33).first, "small");
    EXPECT_EQ(manifest.bucket_for(64).first, "small");
    EXPECT_NE(refusal([&] { manifest.bucket_for(65); }).find("at most 0.0164 megapixels"),
              std::string::npos);
}

// Files

Manifest read(const std::filesystem::path& bundle, bool verify = true) {
    return pid::core::read_manifest(bundle, verify, 2);
}

TEST_F(Bundles, AreReadWithTheirConstants) {
    const auto bundle = data_folder() / "v1";
    const Manifest manifest = read(bundle);
    const auto constants = pid::core::read_constants(bundle, manifest);
    EXPECT_FALSE(constants.empty());
    for (const auto& [name, values] : constants)
        EXPECT_EQ(values.size(), pid::core::Sizes().count(manifest.buffers.at(name).shape)) << name;
}

TEST_F(Bundles, ThatAreNone) {
    const pid::test::Folder folder;
    for (const char* name : {"", "absent"})
        EXPECT_NE(refusal([&] { read(folder.path() / name); }).find("expected a bundle"),
                  std::string::npos);
    std::filesystem::create_directory(folder.path() / "manifest.json");
    refusal([&] { read(folder.path()); });
}

TEST_F(Bundles, WhoseManifestIsNoText) {
    const pid::test::Folder folder;
    for (const std::string& text : {std::string("\xff\xfe"), std::string(), std::string("{"),
                                    std::string(1000, '['), std::string(4, '\0')}) {
        write_bytes(folder.path() / "manifest.json", text);
        refusal([&] { read(folder.path()); });
    }
    write_bytes(folder.path() / "manifest.json", "{}");
    std::filesystem::resize_file(folder.path() / "manifest.json",
                                 pid::core::manifest_max_bytes + 1);
    EXPECT_NE(refusal([&] { read(folder.path()); }).find("at most"), std::string::npos);
}

TEST_F(Bundles, ThatLackAFile) {
    for (const char* name : {"latent.onnx", "weights.safetensors"}) {
        const pid::test::Folder folder;
        const auto bundle = folder.copy_of("v1");
        std::filesystem::remove(bundle / name);
        const std::string wanted = std::string("has no file ") + name;
        EXPECT_NE(refusal([&] { read(bundle); }).find(wanted), std::string::npos);
        std::filesystem::create_directory(bundle / name);
        EXPECT_NE(refusal([&] { read(bundle, false); }).find(wanted), std::string::npos);
    }
}

TEST_F(Bundles, ThatWereAltered) {
    const pid::test::Folder folder;
    const auto bundle = folder.copy_of("v1");
    const auto file = bundle / "latent.onnx";
    std::string bytes = read_bytes(file);
    bytes.back() = static_cast<char>(bytes.back() ^ 1);
    write_bytes(file, bytes);
    EXPECT_NE(refusal([&] { read(bundle); }).find("was altered"), std::string::npos);
    EXPECT_NO_THROW(read(bundle, false));
    bytes.pop_back();
    write_bytes(file, bytes);
    EXPECT_NE(refusal([&] { read(bundle, false); }).find("bytes, but it has"), std::string::npos);
}

TEST_F(Bundles, WhoseWeightsLackTheConstants) {
    const pid::test::Folder folder;
    const auto bundle = folder.copy_of("v1");
    const Manifest manifest = read(bundle);
    const auto weights = bundle / "weights.safetensors";
    std::string bytes = read_bytes(weights);
    const std::size_t at = bytes.find("table.modulation");
    ASSERT_NE(at, std::string::npos);
    std::string renamed = bytes;
    renamed[at] = 'T';
    write_bytes(weights, renamed);
    EXPECT_NE(
        refusal([&] { pid::core::read_constants(bundle, manifest); }).find("cannot read constants"),
        std::string::npos);
    write_bytes(weights, "no safetensors");
    refusal([&] { pid::core::read_constants(bundle, manifest); });
}

TEST_F(Bundles, WhoseConstantsHaveAnotherShape) {
    const auto bundle = data_folder() / "v1";
    Manifest manifest = read(bundle);
    auto& shape = manifest.buffers.at("modulation").shape;
    std::swap(shape[0], shape[1]);
    EXPECT_NE(refusal([&] {
                  pid::core::read_constants(bundle, manifest);
              }).find("expected constant 'modulation'"),
              std::string::npos);
}

} // namespace
