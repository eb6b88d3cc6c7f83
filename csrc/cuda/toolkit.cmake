# Before a CUDA compiler is looked for: the one from PyPI, and the architectures.

# HALFBYTE_PIP_NVCC=1 (pyproject.toml) brings nvcc as wheels.  They keep their libraries in lib, where nvcc's
# profile looks in lib64, and are found through the build's Python, as they are not in its site-packages.
if(NOT HALFBYTE_CUDA STREQUAL "OFF" AND NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
  find_program(HALFBYTE_NVCC nvcc NO_CMAKE_SYSTEM_PATH)
  mark_as_advanced(HALFBYTE_NVCC)
  if(NOT HALFBYTE_NVCC)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import nvidia, pathlib; print(*[n for p in nvidia.__path__ for n in sorted(pathlib.Path(p).glob('cu*/bin/nvcc'))][-1:])"
      OUTPUT_VARIABLE pip_nvcc OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(pip_nvcc)
      get_filename_component(pip_cuda "${pip_nvcc}/../.." ABSOLUTE)
      set(CMAKE_CUDA_COMPILER "${pip_nvcc}")
      set(ENV{LIBRARY_PATH} "${pip_cuda}/lib:$ENV{LIBRARY_PATH}")
      set(CMAKE_CUDA_RUNTIME_LIBRARY_DIR "${pip_cuda}/lib")
      link_directories("${pip_cuda}/lib")
    endif()
  endif()
endif()

# What a release serves, as far as the toolkit knows it.  An "a" architecture runs on its own chip only, the
# others on later minor versions too; the last one keeps PTX, for chips to come.
function(halfbyte_cuda_archs compiler out)
  execute_process(COMMAND ${compiler} --list-gpu-arch OUTPUT_VARIABLE listed ERROR_QUIET)
  set(found)
  foreach(arch 70 75 80 86 89 90a 100 120)
    string(REGEX REPLACE "[a-z]" "" number ${arch})
    if(listed MATCHES "compute_${number}(\n|$)")
      list(APPEND found ${arch}-real)
    endif()
  endforeach()
  list(POP_BACK found last)
  string(REPLACE "-real" "" last "${last}")
  if(last MATCHES "a$")  # PTX of an "a" architecture runs on no other chip either
    string(REPLACE "a" "" plain "${last}")
    list(APPEND found ${last}-real ${plain}-virtual)
  else()
    list(APPEND found ${last})
  endif()
  set(${out} "${found}" PARENT_SCOPE)
endfunction()
