// SHA-256 against vectors of NIST (FIPS 180-4 examples and CAVP).
#include "bundle/files.h"

#include <utility>

#include "refusal.h"

namespace {

using pid::core::Sha256;

const std::vector<std::pair<std::string, std::string>> vectors{
    {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    {"\xbd", "68325720aabd7c82f30f554b313d0570c95accbb7dc4b5aae11204c08ffe732b"},
    {"\xc9\x8c\x8e\x55", "7abc22c0ae5af26ce93dbb94433a0e0b2e119d014f8e7f65bd56c61ccccd9504"},
    {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
    {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnop"
     "qrsmnopqrstnopqrstu",
     "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
    {std::string(55, '\0'), "02779466cdec163811d078815c633f21901413081449002f24aa3e80f0b88ef7"},
    {std::string(56, '\0'), "d4817aa5497628e7c77e6b606107042bbba3130888c5f47a375e6179be789fbb"},
    {std::string(57, '\0'), "65a16cb7861335d5ace3c60718b5052e44660726da4cd13bb745381b235a1785"},
    {std::string(64, '\0'), "f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"},
    {std::string(1000, '\0'), "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53"},
    {std::string(1000, 'A'), "c2e686823489ced2017f6059b8b239318b6364f6dcd835d0a519105a1eadd6e4"},
    {std::string(1000000, 'a'),
     "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};

TEST(Sha256, VectorsAtOnceAndInParts) {
    for (const auto& [message, digest] : vectors) {
        for (const std::size_t part : {message.size() + 1, std::size_t{63}, std::size_t{200}}) {
            Sha256 hash;
            for (std::size_t at = 0; at < message.size(); at += part)
                hash.add(message.data() + at, std::min(part, message.size() - at));
            EXPECT_EQ(hash.hex(), digest) << message.size() << " bytes, " << part << " at a time";
        }
    }
}

TEST(Sha256File, IsThatOfItsContents) {
    const pid::test::Folder folder;
    for (const auto& [message, digest] : vectors) {
        pid::test::write_bytes(folder.path() / "file", message);
        EXPECT_EQ(pid::core::file_sha256(folder.path() / "file"), digest);
    }
    pid::test::refusal([&] { pid::core::file_sha256(folder.path() / "absent"); });
}

} // namespace
