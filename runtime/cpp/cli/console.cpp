#include "console.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>

#include <unistd.h>

#include "errors.h"

namespace pid::cli {
namespace {

constexpr std::size_t bar_width = 40;

std::atomic<bool> was_interrupted{false};
std::atomic<std::atomic<bool>*> running{nullptr};

static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<void*>::is_always_lock_free,
              "a signal handler may use them");

extern "C" void interrupt(int) {
    was_interrupted = true;
    if (std::atomic<bool>* cancelled = running)
        *cancelled = true;
}

} // namespace

void print_line(const std::string& line) {
    if (std::fputs((line + "\n").c_str(), stdout) >= 0 && std::fflush(stdout) == 0)
        return;
    if (errno == EPIPE)
        throw ReaderLeft();
    core::refuse("cannot write the result to stdout");
}

void print_note(const std::string& line) {
    std::fputs((line + "\n").c_str(), stderr);
}

void print_warning(const std::string& line) {
    std::fputs(("warning: " + line + "\n").c_str(), stderr);
}

int fail(const std::string& message, int code) {
    std::fputs(("pid-decode-cpp: " + core::first_line(message) + "\n").c_str(), stderr);
    return code;
}

void catch_interrupts() {
    std::signal(SIGINT, interrupt);
    std::signal(SIGTERM, interrupt);
    std::signal(SIGPIPE, SIG_IGN); // writing then fails instead
}

void cancel_when_interrupted(std::atomic<bool>* cancelled) {
    running = cancelled;
    if (cancelled != nullptr && was_interrupted) // before the handler knew of it
        *cancelled = true;
}

void throw_if_interrupted() {
    if (was_interrupted)
        throw core::Failure(PID_ERROR_CANCELLED, "interrupted");
}

Progress::Progress(double total, bool quiet)
    : total_(total), shown_(!quiet && isatty(STDERR_FILENO) != 0) {
    show();
}

Progress::~Progress() {
    if (shown_)
        std::fputs("\n", stderr);
}

void Progress::advance(double amount) {
    done_ += amount;
    show();
}

void Progress::show() const {
    if (!shown_)
        return;
    const double part = std::min(done_ / total_ + 1e-9, 1.0); // of a sum of fractions
    const auto filled = static_cast<std::size_t>(part * bar_width);
    const std::string bar = std::string(filled, '#') + std::string(bar_width - filled, '.');
    std::fprintf(stderr, "\rDecoding %s %3d%%", bar.c_str(), static_cast<int>(100 * part));
    std::fflush(stderr);
}

} // namespace pid::cli
