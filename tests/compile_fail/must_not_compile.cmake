# cmake -DCOMPILER=.. -DSOURCE=.. -DINCLUDE=.. -P must_not_compile.cmake
file(STRINGS "${SOURCE}" first_line LIMIT_COUNT 1)
if(NOT first_line MATCHES "^// expect: (.+)$")
  message(FATAL_ERROR "${SOURCE}: the first line is not `// expect: TEXT`")
endif()
set(text "${CMAKE_MATCH_1}")

execute_process(
  COMMAND "${COMPILER}" -std=c++20 -fsyntax-only "-I${INCLUDE}" "${SOURCE}"
  RESULT_VARIABLE result
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output)
if(result EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiles, but must not")
endif()
# Compilers quote the source line of an error; the expected text there would prove nothing.
string(REPLACE "${first_line}" "" output "${output}")
string(FIND "${output}" "fatal error:" fatal)
if(NOT fatal EQUAL -1)
  message(FATAL_ERROR "${SOURCE} fails for another reason:\n${output}")
endif()
string(FIND "${output}" "${text}" found)
if(found EQUAL -1)
  message(FATAL_ERROR "${SOURCE} fails without saying \"${text}\":\n${output}")
endif()
