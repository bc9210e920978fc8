#include "png_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>

#include <png.h>
#include <strings.h>
#include <unistd.h>

#include "errors.h"

namespace pid::cli {
namespace {

using core::refuse;

// A file that is removed again unless it was renamed.
class Aside {
public:
    explicit Aside(const std::filesystem::path& target)
        : path_(target.parent_path() /
                core::text_of(".", target.filename().string(), ".", getpid(), ".part")) {}
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
              std::size_t width) {
    const Aside aside(path);
    errno = 0;
    std::unique_ptr<std::FILE, Close> file(std::fopen(aside.path().c_str(), "wb"));
    if (!file)
        refuse_write(path, errno, "");
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    image.width = static_cast<png_uint_32>(width);
    image.height = static_cast<png_uint_32>(height);
    image.format = PNG_FORMAT_RGB;
    errno = 0;
    if (png_image_write_to_stdio(&image, file.get(), 0, pixels, 0, nullptr) == 0)
        refuse_write(path, errno, image.message);
    if (std::fclose(file.release()) != 0)
        refuse_write(path, errno, "");
    std::error_code error;
    std::filesystem::rename(aside.path(), path, error);
    if (error)
        refuse_write(path, error.value(), "");
}

} // namespace pid::cli
