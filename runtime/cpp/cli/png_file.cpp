#include "png_file.h"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>

#include <png.h>
#include <strings.h>
#include <unistd.h>
#include <zlib.h>

#include "errors.h"

namespace pid::cli {
namespace {

using core::refuse;

// A file that is removed again unless it was renamed. What processes that run no more left of the
// same target is removed first.
class Aside {
public:
    explicit Aside(const std::filesystem::path& target) {
        const std::filesystem::path folder =
            target.has_parent_path() ? target.parent_path() : std::filesystem::path(".");
        const std::string begin = "." + target.filename().string() + ".", end = ".part";
        std::error_code ignored;
        for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
            const std::string name = entry.path().filename().string();
            if (name.size() <= begin.size() + end.size() || name.rfind(begin, 0) != 0 ||
                name.substr(name.size() - end.size()) != end)
                continue;
            const long pid = std::strtol(name.c_str() + begin.size(), nullptr, 10);
            if (pid > 0 && kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH)
                std::filesystem::remove(entry.path(), ignored);
        }
        path_ = target.parent_path() / core::text_of(begin, getpid(), end);
    }
    ~Aside() {
        std::error_code ignored;
        std::filesystem::remove(path_, ignored);
    }
    Aside(const Aside&) = delete;
    Aside& operator=(const Aside&) = delete;

    const std::filesystem::path& path() const { return path_; }

private:
    std::filesystem::path path_;
};

struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
};

[[noreturn]] void refuse_write(const std::filesystem::path& path, int error,
                               const char* otherwise) {
    if (error == ENOSPC || error == EDQUOT)
        refuse("no space left on ", path.string(), "; free some and run it again");
    refuse("cannot write ", path.string(), ": ", error != 0 ? std::strerror(error) : otherwise);
}

std::string big_endian(std::uint32_t number) {
    std::string bytes(4, '\0');
    for (std::size_t i = 0; i < 4; ++i)
        bytes[i] = static_cast<char>(number >> (8 * (3 - i)));
    return bytes;
}

// An iTXt chunk: keyword, no compression, no language, no translated keyword, text.
std::string text_chunk(const std::string& keyword, const std::string& text) {
    const std::string body = "iTXt" + keyword + std::string(5, '\0') + text;
    const auto* bytes = reinterpret_cast<const Bytef*>(body.data());
    const auto size = static_cast<std::uint32_t>(body.size());
    return big_endian(size - 4) + body +
           big_endian(static_cast<std::uint32_t>(crc32(0, bytes, size)));
}

// libpng's simplified interface, which this uses, knows no texts: they are put behind the header.
constexpr std::size_t header_bytes = 8 + 25;

} // namespace

void check_image_path(const std::filesystem::path& path) {
    const std::filesystem::path folder =
        path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
    if (strcasecmp(path.extension().c_str(), ".png") != 0)
        refuse("expected an image name ending in .png, but got '", path.string(), "'");
    if (!std::filesystem::is_directory(folder))
        refuse("expected a folder to write ", path.filename().string(), " in, but got '",
               folder.string(), "', which is not one");
    if (std::filesystem::is_directory(path))
        refuse("expected an image's name, but got the folder '", path.string(), "'");
    if (access(folder.c_str(), W_OK | X_OK) != 0)
        refuse("expected a writable folder, but got '", folder.string(), "'");
}

void save_png(const std::filesystem::path& path, const std::uint8_t* pixels, std::size_t height,
              std::size_t width, const PngTexts& texts) {
    const Aside aside(path);
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    image.width = static_cast<png_uint_32>(width);
    image.height = static_cast<png_uint_32>(height);
    image.format = PNG_FORMAT_RGB;
    png_alloc_size_t bytes = PNG_IMAGE_PNG_SIZE_MAX(image);
    std::vector<char> png(bytes);
    if (png_image_write_to_memory(&image, png.data(), &bytes, 0, pixels, 0, nullptr) == 0)
        refuse("cannot write ", path.string(), ": ", image.message);
    std::string chunks;
    for (const auto& [keyword, text] : texts)
        chunks += text_chunk(keyword, text);
    errno = 0;
    std::unique_ptr<std::FILE, Close> file(std::fopen(aside.path().c_str(), "wb"));
    if (!file)
        refuse_write(path, errno, "");
    const auto write = [&](const char* data, std::size_t size) {
        if (std::fwrite(data, 1, size, file.get()) != size)
            refuse_write(path, errno, "");
    };
    write(png.data(), header_bytes);
    write(chunks.data(), chunks.size());
    write(png.data() + header_bytes, bytes - header_bytes);
    if (std::fclose(file.release()) != 0)
        refuse_write(path, errno, "");
    std::error_code error;
    std::filesystem::rename(aside.path(), path, error);
    if (error)
        refuse_write(path, error.value(), "");
}

} // namespace pid::cli
