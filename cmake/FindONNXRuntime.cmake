# Finds ONNX Runtime's C API: target ONNXRuntime::ONNXRuntime, variables ONNXRuntime_FOUND and
# ONNXRuntime_VERSION (of the headers; the library may be a later one).
#
# Looked for, in this order:
#   PID_ONNXRUNTIME_INCLUDE_DIR, PID_ONNXRUNTIME_LIBRARY   a folder with onnxruntime_c_api.h and a
#       library, which need not be of one release
#   ONNXRuntime_ROOT                                       a release archive, unpacked
#   CMAKE_PREFIX_PATH and the system                       likewise, or a distribution's package

find_path(PID_ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h
          PATH_SUFFIXES include/onnxruntime include/onnxruntime/core/session onnxruntime
          DOC "Folder of onnxruntime_c_api.h")
find_library(PID_ONNXRUNTIME_LIBRARY
             NAMES onnxruntime libonnxruntime.so.1
             DOC "ONNX Runtime's library")
mark_as_advanced(PID_ONNXRUNTIME_INCLUDE_DIR PID_ONNXRUNTIME_LIBRARY)

set(ONNXRuntime_VERSION "")
if(PID_ONNXRUNTIME_INCLUDE_DIR)
  file(STRINGS "${PID_ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h" _onnxruntime_version
       REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX MATCH "[0-9]+" _onnxruntime_version "${_onnxruntime_version}")
  set(ONNXRuntime_VERSION "1.${_onnxruntime_version}")
endif()
if(PID_ONNXRUNTIME_LIBRARY MATCHES "^(.*/)libonnxruntime\\.so\\.1\\.[0-9.]+$"
   AND NOT EXISTS "${CMAKE_MATCH_1}libonnxruntime.so.1")
  message(FATAL_ERROR
    "expected ONNX Runtime's library beside libonnxruntime.so.1, a link to it by which programs find "
    "it, but got ${PID_ONNXRUNTIME_LIBRARY} (PID_ONNXRUNTIME_LIBRARY); run "
    "runtime/cpp/tools/get_dependencies.sh, which copies that of a Python package")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime
  REQUIRED_VARS PID_ONNXRUNTIME_LIBRARY PID_ONNXRUNTIME_INCLUDE_DIR
  VERSION_VAR ONNXRuntime_VERSION)

if(ONNXRuntime_FOUND AND NOT TARGET ONNXRuntime::ONNXRuntime)
  add_library(ONNXRuntime::ONNXRuntime UNKNOWN IMPORTED)
  set_target_properties(ONNXRuntime::ONNXRuntime PROPERTIES
    IMPORTED_LOCATION "${PID_ONNXRUNTIME_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${PID_ONNXRUNTIME_INCLUDE_DIR}")
endif()
