# Finds TensorRT 11, or TensorRT for RTX: target TensorRT::TensorRT, variables TensorRT_FOUND,
# TensorRT_VERSION and TensorRT_FLAVOR ("tensorrt" or "tensorrt-rtx", as engine sets
# call it).
#
# Looked for, in this order:
#   PID_TENSORRT_INCLUDE_DIR, PID_TENSORRT_LIBRARY   a folder with NvInfer.h, and the library
#       (libnvinfer.so or libtensorrt_rtx.so)
#   TensorRT_ROOT                                    either SDK's archive, unpacked
#   CMAKE_PREFIX_PATH and the system                 a distribution's package
# Needs CUDA's headers as well (PID_CUDA_INCLUDE_DIR, CUDA_HOME), but not its libraries.

find_path(PID_TENSORRT_INCLUDE_DIR NvInfer.h
          DOC "Folder of NvInfer.h")
find_library(PID_TENSORRT_LIBRARY
             NAMES nvinfer tensorrt_rtx
             DOC "TensorRT's library")
find_path(PID_CUDA_INCLUDE_DIR cuda_runtime_api.h
          HINTS "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}" /usr/local/cuda
          PATH_SUFFIXES include targets/x86_64-linux/include
          DOC "Folder of cuda_runtime_api.h")
mark_as_advanced(PID_TENSORRT_INCLUDE_DIR PID_TENSORRT_LIBRARY PID_CUDA_INCLUDE_DIR)

set(TensorRT_VERSION "")
set(TensorRT_FLAVOR "")
if(PID_TENSORRT_INCLUDE_DIR)
  file(READ "${PID_TENSORRT_INCLUDE_DIR}/NvInferVersion.h" _tensorrt_header)
  set(TensorRT_FLAVOR tensorrt)
  if(_tensorrt_header MATCHES "define TRT_MAJOR_RTX +[0-9]")
    set(TensorRT_FLAVOR tensorrt-rtx)
  endif()
  foreach(_tensorrt_part MAJOR MINOR PATCH BUILD)
    # NV_TENSORRT_MAJOR may be a number, or one of these macros by flavor.
    if(_tensorrt_header MATCHES "define (NV_TENSORRT|TRT)_${_tensorrt_part}(_RTX|_ENTERPRISE)? +([0-9]+)")
      list(APPEND TensorRT_VERSION ${CMAKE_MATCH_3})
    endif()
  endforeach()
  list(JOIN TensorRT_VERSION "." TensorRT_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT
  REQUIRED_VARS PID_TENSORRT_LIBRARY PID_TENSORRT_INCLUDE_DIR PID_CUDA_INCLUDE_DIR
  VERSION_VAR TensorRT_VERSION)

if(TensorRT_FOUND AND NOT TARGET TensorRT::TensorRT)
  add_library(TensorRT::TensorRT UNKNOWN IMPORTED)
  set_target_properties(TensorRT::TensorRT PROPERTIES
    IMPORTED_LOCATION "${PID_TENSORRT_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${PID_TENSORRT_INCLUDE_DIR};${PID_CUDA_INCLUDE_DIR}")
endif()
