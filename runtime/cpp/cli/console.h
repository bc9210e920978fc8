// Results on stdout; progress, warnings and errors on stderr; interrupts.
#pragma once

#include <atomic>
#include <cstddef>
#include <string>

namespace pid::cli {

constexpr int bad_input = 2, interrupted = 130, broken_pipe = 141;

// Nobody reads stdout any more.
struct ReaderLeft {};

// Print a result on stdout. Throws ReaderLeft.
void print_line(const std::string& line);
void print_note(const std::string& line);
void print_warning(const std::string& line);
// Print "pid-decode-cpp: " and a message, and give the exit code back.
int fail(const std::string& message, int code = bad_input);

// From now on SIGINT and SIGTERM cancel a decode in place of ending the process.
void catch_interrupts();
// What they set, to cancel a decode; nullptr for nothing. It must stay until that is told.
void cancel_when_interrupted(std::atomic<bool>* cancelled);
// Throw what a cancelled decode throws, if there was an interrupt.
void throw_if_interrupted();

// How much is done of all, on one line of stderr; nothing when that is no terminal.
class Progress {
public:
    Progress(double total, bool quiet);
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    void advance(double amount);

private:
    void show() const;

    double total_;
    double done_ = 0;
    bool shown_;
};

} // namespace pid::cli
