# Finds ONNX Runtime's C API: target ONNXRuntime::ONNXRuntime, variables ONNXRuntime_FOUND and
# ONNXRuntime_VERSION (of the headers; the library may be a later one).
#
# Looked for, in this order:
#   PID_ONNXRUNTIME_INCLUDE_DIR, PID_ONNXRUNTIME_LIBRARY   a folder with onnxruntime_c_api.h and a
#       library, which need not be of one release: a distribution's headers, say, and the
#       libonnxruntime.so.1.X.Y of the Python package
#   ONNXRUNTIME_ROOT                                       a release archive, unpacked
#   CMAKE_PREFIX_PATH and the system                       a distribution's package

find_path(PID_ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h
          HINTS "${ONNXRUNTIME_ROOT}" "$ENV{ONNXRUNTIME_ROOT}"
          PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime
          DOC "Folder of onnxruntime_c_api.h")
find_library(PID_ONNXRUNTIME_LIBRARY
             NAMES onnxruntime libonnxruntime.so.1
             HINTS "${ONNXRUNTIME_ROOT}" "$ENV{ONNXRUNTIME_ROOT}"
             PATH_SUFFIXES lib lib64
             DOC "ONNX Runtime's library")
mark_as_advanced(PID_ONNXRUNTIME_INCLUDE_DIR PID_ONNXRUNTIME_LIBRARY)

set(ONNXRuntime_VERSION "")
if(PID_ONNXRUNTIME_INCLUDE_DIR)
  file(STRINGS "${PID_ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h" _onnxruntime_version
       REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX MATCH "[0-9]+" _onnxruntime_version "${_onnxruntime_version}")
  set(ONNXRuntime_VERSION "1.${_onnxruntime_version}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime
  REQUIRED_VARS PID_ONNXRUNTIME_LIBRARY PID_ONNXRUNTIME_INCLUDE_DIR
  VERSION_VAR ONNXRuntime_VERSION)

if(ONNXRuntime_FOUND AND NOT TARGET ONNXRuntime::ONNXRuntime)
  set(_onnxruntime_library "${PID_ONNXRUNTIME_LIBRARY}")
  if(_onnxruntime_library MATCHES "libonnxruntime\\.so\\.1\\.[0-9.]+$")
    # The Python package has no file of the name that programs look for when they start, the soname.
    get_filename_component(_onnxruntime_folder "${_onnxruntime_library}" DIRECTORY)
    if(EXISTS "${_onnxruntime_folder}/libonnxruntime.so.1")
      set(_onnxruntime_library "${_onnxruntime_folder}/libonnxruntime.so.1")
    else()
      set(_onnxruntime_link "${CMAKE_BINARY_DIR}/onnxruntime/libonnxruntime.so.1")
      file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/onnxruntime")
      file(CREATE_LINK "${_onnxruntime_library}" "${_onnxruntime_link}" SYMBOLIC)
      set(_onnxruntime_library "${_onnxruntime_link}")
    endif()
  endif()
  add_library(ONNXRuntime::ONNXRuntime UNKNOWN IMPORTED)
  set_target_properties(ONNXRuntime::ONNXRuntime PROPERTIES
    IMPORTED_LOCATION "${_onnxruntime_library}"
    INTERFACE_INCLUDE_DIRECTORIES "${PID_ONNXRUNTIME_INCLUDE_DIR}")
endif()
