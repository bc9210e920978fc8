set(PID_SANITIZE "" CACHE STRING "Sanitizers to build with: address,undefined or thread")

function(pid_sanitize target)
  if(PID_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${PID_SANITIZE} -fno-omit-frame-pointer
                                             -fno-sanitize-recover=all)
    target_link_options(${target} PUBLIC -fsanitize=${PID_SANITIZE})
  endif()
endfunction()
