# The dependencies of the tests, benchmarks and examples. The library itself needs none of them.
#
# Each kvlean_find_<name>() looks for an installed package first. If there is none and
# KVLEAN_FETCH_DEPENDENCIES is on, it fetches the upstream release that Debian 12 ships, pinned by
# hash. Without a network, point FETCHCONTENT_SOURCE_DIR_<NAME> (CATCH2, EIGEN3, NLOHMANN_JSON,
# CLI11, BENCHMARK) at an unpacked source tree. Fetched header-only projects are used as headers;
# their own build files are not run.
include_guard(GLOBAL)
include(FetchContent)

set(KVLEAN_DEPENDENCIES_DIR "${CMAKE_CURRENT_LIST_DIR}")

if(POLICY CMP0135)
  cmake_policy(SET CMP0135 NEW)  # an unpacked archive gets the time of unpacking
endif()

# Fetches `name` and defines the interface target `target` over the first folder under its source
# tree, out of `DIRS`, that holds `HEADER`.
function(kvlean_fetch_headers name target)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "URL;SHA256;HEADER" "DIRS")
  # A SOURCE_SUBDIR without a CMakeLists.txt keeps FetchContent from adding the project.
  FetchContent_Declare(
    ${name}
    URL "${arg_URL}"
    URL_HASH SHA256=${arg_SHA256}
    SOURCE_SUBDIR kvlean-uses-headers-only)
  FetchContent_MakeAvailable(${name})
  FetchContent_GetProperties(${name} SOURCE_DIR source_dir)
  foreach(dir IN LISTS arg_DIRS)
    if(EXISTS "${source_dir}/${dir}/${arg_HEADER}")
      add_library(kvlean_fetched_${name} INTERFACE)
      add_library(${target} ALIAS kvlean_fetched_${name})
      target_include_directories(kvlean_fetched_${name} SYSTEM INTERFACE "${source_dir}/${dir}")
      set(kvlean_${name}_SOURCE_DIR "${source_dir}" PARENT_SCOPE)
      message(STATUS "kvlean: ${name} from ${source_dir}")
      return()
    endif()
  endforeach()
  message(FATAL_ERROR "kvlean: no ${arg_HEADER} in the sources of ${name}, ${source_dir}")
endfunction()

function(kvlean_require_fetch name package)
  if(NOT KVLEAN_FETCH_DEPENDENCIES)
    message(FATAL_ERROR "kvlean: ${name} is not installed (Debian: apt-get install ${package}); "
                        "install it, or set KVLEAN_FETCH_DEPENDENCIES=ON to fetch it")
  endif()
endfunction()

# Eigen3::Eigen. The only one that may stay absent: then kvlean::eigen is not defined.
function(kvlean_find_eigen)
  if(TARGET Eigen3::Eigen)
    return()
  endif()
  find_package(Eigen3 QUIET CONFIG)
  if(TARGET Eigen3::Eigen OR NOT KVLEAN_FETCH_DEPENDENCIES)
    return()
  endif()
  kvlean_fetch_headers(
    eigen3 Eigen3::Eigen
    URL https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.bz2
    SHA256 b4c198460eba6f28d34894e3a5710998818515104d6e74e5cc331ce31e46e626
    HEADER Eigen/Core
    DIRS .)
endfunction()

# nlohmann_json::nlohmann_json
function(kvlean_find_json)
  if(TARGET nlohmann_json::nlohmann_json)
    return()
  endif()
  find_package(nlohmann_json QUIET CONFIG)
  if(TARGET nlohmann_json::nlohmann_json)
    return()
  endif()
  kvlean_require_fetch(nlohmann_json nlohmann-json3-dev)
  kvlean_fetch_headers(
    nlohmann_json nlohmann_json::nlohmann_json
    URL https://github.com/nlohmann/json/archive/refs/tags/v3.11.2.tar.gz
    SHA256 d69f9deb6a75e2580465c6c4c5111b89c4dc2fa94e3a85fcd2ffcd9a143d9273
    HEADER nlohmann/json.hpp
    DIRS single_include include)
endfunction()

# CLI11::CLI11
function(kvlean_find_cli11)
  if(TARGET CLI11::CLI11)
    return()
  endif()
  find_package(CLI11 QUIET CONFIG)
  if(TARGET CLI11::CLI11)
    return()
  endif()
  kvlean_require_fetch(CLI11 libcli11-dev)
  kvlean_fetch_headers(
    cli11 CLI11::CLI11
    URL https://github.com/CLIUtils/CLI11/archive/refs/tags/v2.1.2.tar.gz
    SHA256 26291377e892ba0e5b4972cdfd4a2ab3bf53af8dac1f4ea8fe0d1376b625c8cb
    HEADER CLI/CLI.hpp
    DIRS include)
endfunction()

# kvlean_catch: Catch2 of version 2 or 3 with a main(). Include "tests/support/catch.hpp".
# Sets KVLEAN_CATCH_MODULE to Catch's CMake module, or to an empty string where there is none.
macro(kvlean_find_catch2)
  set(KVLEAN_CATCH_MODULE "")
  if(NOT TARGET Catch2::Catch2)
    find_package(Catch2 QUIET CONFIG)
  endif()
  if(TARGET Catch2::Catch2)
    if(Catch2_DIR AND EXISTS "${Catch2_DIR}/Catch.cmake")
      set(KVLEAN_CATCH_MODULE "${Catch2_DIR}/Catch.cmake")
    endif()
  else()
    kvlean_require_fetch(Catch2 catch2)
    kvlean_fetch_headers(
      catch2 Catch2::Catch2
      URL https://github.com/catchorg/Catch2/archive/refs/tags/v2.13.10.tar.gz
      SHA256 d54a712b7b1d7708bc7a819a8e6e47b2fde9536f487b89ccbca295072a7d9943
      HEADER catch2/catch.hpp
      DIRS single_include)
    if(EXISTS "${kvlean_catch2_SOURCE_DIR}/contrib/Catch.cmake")
      set(KVLEAN_CATCH_MODULE "${kvlean_catch2_SOURCE_DIR}/contrib/Catch.cmake")
    endif()
  endif()
  if(NOT TARGET kvlean_catch)
    if(TARGET Catch2::Catch2WithMain AND Catch2_VERSION VERSION_GREATER_EQUAL 3)
      add_library(kvlean_catch INTERFACE)
      target_link_libraries(kvlean_catch INTERFACE Catch2::Catch2WithMain)
    else()
      # A packaged library of version 2 may be built for a C++ standard that lacks std::string_view,
      # and then fails to link against tests that print one. Hence our own main().
      add_library(kvlean_catch STATIC "${KVLEAN_DEPENDENCIES_DIR}/../tests/support/catch_main.cpp")
      target_compile_features(kvlean_catch PUBLIC cxx_std_20)
      target_link_libraries(kvlean_catch PUBLIC Catch2::Catch2)
      # Catch2 itself is not under test: without this it takes minutes to compile with sanitizers.
      target_compile_options(kvlean_catch PRIVATE -O1 -g0 -fno-sanitize=all)
    endif()
  endif()
endmacro()

# benchmark::benchmark. Google Benchmark is a compiled library, so its own build is used.
function(kvlean_find_benchmark)
  if(TARGET benchmark::benchmark)
    return()
  endif()
  find_package(benchmark QUIET CONFIG)
  if(TARGET benchmark::benchmark)
    return()
  endif()
  kvlean_require_fetch(benchmark libbenchmark-dev)
  set(BENCHMARK_ENABLE_TESTING OFF CACHE BOOL "" FORCE)
  set(BENCHMARK_ENABLE_INSTALL OFF CACHE BOOL "" FORCE)
  set(BENCHMARK_ENABLE_WERROR OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(
    benchmark
    URL https://github.com/google/benchmark/archive/refs/tags/v1.7.1.tar.gz
    URL_HASH SHA256=6430e4092653380d9dc4ccb45a1e2dc9259d581f4866dc0759713126056bc1d7)
  FetchContent_MakeAvailable(benchmark)
endfunction()
