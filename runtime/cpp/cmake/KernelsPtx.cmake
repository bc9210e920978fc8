# Writes kernels_ptx.h, which has the kernels for GPUs as text. Compilers take short literals only.
function(pid_embed_kernels source output)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")
  file(READ "${source}" rest)
  set(literals "")
  string(LENGTH "${rest}" length)
  while(length GREATER 0)
    string(SUBSTRING "${rest}" 0 8000 part)
    string(APPEND literals "\n    R\"PTX(${part})PTX\"")
    if(length GREATER 8000)
      string(SUBSTRING "${rest}" 8000 -1 rest)
    else()
      set(rest "")
    endif()
    string(LENGTH "${rest}" length)
  endwhile()
  file(CONFIGURE OUTPUT "${output}" @ONLY CONTENT [[
#pragma once

namespace pid::core {

constexpr const char* kernels_ptx =@literals@;

} // namespace pid::core
]])
endfunction()
