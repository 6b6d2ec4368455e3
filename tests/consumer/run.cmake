# Configures, builds and tests the project SOURCE in BINARY. `prepare.cmake` beside the project's
# CMakeLists.txt, where there is one, runs first; it may add to `arguments`, the configure arguments.
cmake_minimum_required(VERSION 3.21)

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "failed (${result}): ${ARGV}")
  endif()
endfunction()

file(REMOVE_RECURSE "${BINARY}")
foreach(entry IN LISTS ENTRIES)
  string(FIND "${entry}" "=" equals)
  string(SUBSTRING "${entry}" 0 ${equals} name)
  math(EXPR equals "${equals} + 1")
  string(SUBSTRING "${entry}" ${equals} -1 ${name})
endforeach()

set(arguments "-DKVLEAN_SOURCE=${KVLEAN}")
if(EXISTS "${SOURCE}/prepare.cmake")
  include("${SOURCE}/prepare.cmake")
endif()
run("${CMAKE_COMMAND}" -S "${SOURCE}" -B "${BINARY}" -G "${GENERATOR}" "-DCMAKE_CXX_COMPILER=${CXX}"
    -DCMAKE_BUILD_TYPE=Release ${arguments})
run("${CMAKE_COMMAND}" --build "${BINARY}" --config Release)
run("${CTEST}" --test-dir "${BINARY}" -C Release --output-on-failure --no-tests=error)
