# kvlean_warnings: linked PRIVATE to our own executables, never to kvlean itself.
# clang++ has -Wsign-conversion in -Wconversion; named, g++ finds the same faults.
include_guard(GLOBAL)

add_library(kvlean_warnings INTERFACE)
target_compile_options(
  kvlean_warnings
  INTERFACE -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef
            $<$<BOOL:${KVLEAN_WARNINGS_AS_ERRORS}>:-Werror>)
