#include "test_support.h"

#include <cstdlib>

namespace pid::test {

Path data_folder() {
    const char* folder = std::getenv("PID_TEST_DATA");
    return folder == nullptr ? Path() : Path(folder);
}

std::string read_bytes(const Path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file)
        throw std::runtime_error("cannot read " + path.string());
    std::ostringstream bytes;
    bytes << file.rdbuf();
    return bytes.str();
}

void write_bytes(const Path& path, const std::string& bytes) {
    std::ofstream file(path, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!file.flush())
        throw std::runtime_error("cannot write " + path.string());
}

Folder::Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "pid-test-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr)
        throw std::runtime_error("cannot make a temporary folder");
    path_ = name;
}

Folder::~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
}

Path Folder::copy_of(const std::string& bundle) const {
    const Path copy = path_ / bundle;
    std::filesystem::copy(data_folder() / bundle, copy, std::filesystem::copy_options::recursive);
    return copy;
}

void expect_one_line(const std::string& message) {
    EXPECT_GT(message.size(), 10U);
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_LT(message.size(), 1000U) << message;
}

void WithData::SetUp() {
    if (data_folder().empty())
        GTEST_SKIP() << "PID_TEST_DATA is not set: run it by tests/cpp";
}

} // namespace pid::test
