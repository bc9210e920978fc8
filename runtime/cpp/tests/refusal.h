// Refusals of the library's insides.
#pragma once

#include "errors.h"
#include "test_support.h"

namespace pid::test {

// The message of the refusal that a call must end with; "" if it does not.
template <typename Call>
std::string refusal(Call call) {
    try {
        call();
    } catch (const core::Failure& failure) {
        EXPECT_EQ(failure.status(), PID_ERROR_INPUT) << failure.what();
        expect_one_line(failure.what());
        return failure.what();
    }
    ADD_FAILURE() << "expected a refusal";
    return "";
}

} // namespace pid::test
