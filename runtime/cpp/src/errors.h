// What goes wrong, as an exception inside the library; the C API turns it into a status.
#pragma once

#include <cstdint>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

#include "pid/pid_runtime.h"

namespace pid::core {

class Failure : public std::runtime_error {
public:
    Failure(pid_status status, const std::string& message)
        : std::runtime_error(message), status_(status) {}

    pid_status status() const noexcept { return status_; }

private:
    pid_status status_;
};

// Memory that ran out, in the words of a library or of the system: whoever knows what it was for
// says that too.
class Shortage : public Failure {
public:
    explicit Shortage(const std::string& message) : Failure(PID_ERROR_MEMORY, message) {}
};

// Whether a library's message means that memory ran out.
bool says_memory_ran_out(const std::string& message);

// All parts one after the other, whatever the process's locale.
template <typename... Parts>
std::string text_of(const Parts&... parts) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    (text << ... << parts);
    return text.str();
}

// Parts as text, with `between` them.
template <typename Parts>
std::string joined(const Parts& parts, const char* between = ", ") {
    std::string text;
    for (const auto& part : parts)
        text += text_of(text.empty() ? "" : between, part);
    return text;
}

// Bad input. The message is one line: what was expected, what came, and how to mend it.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    throw Failure(PID_ERROR_INPUT, text_of(parts...));
}

// Text of others for a message: on one line, and cut.
std::string cut(std::string text);
// The same in quotes.
std::string shown(const std::string& text);
// A number as Python writes it, such as 1.0.
std::string shown(double number);

// Such as "1.25 GB".
std::string gigabytes(std::uint64_t bytes);

// The first line of a message of another library.
std::string first_line(const std::string& text);

// Remember a failure for this thread's pid_last_error().
void set_last_error(const std::string& message) noexcept;
const char* last_error() noexcept;

} // namespace pid::core
