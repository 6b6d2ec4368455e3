# Source trees laid out as upstream's, made of the installed headers.
file(COPY "${CATCH2_INCLUDE}/catch2" DESTINATION "${BINARY}/sources/catch2/single_include")
if(CATCH_MODULE)
  get_filename_component(module_dir "${CATCH_MODULE}" DIRECTORY)
  file(COPY "${CATCH_MODULE}" "${module_dir}/CatchAddTests.cmake"
       DESTINATION "${BINARY}/sources/catch2/contrib")
endif()
file(COPY "${EIGEN3_INCLUDE}/Eigen" DESTINATION "${BINARY}/sources/eigen3")
file(COPY "${JSON_INCLUDE}/nlohmann" DESTINATION "${BINARY}/sources/nlohmann_json/include")
file(COPY "${CLI11_INCLUDE}/CLI" DESTINATION "${BINARY}/sources/cli11/include")

list(APPEND arguments -DFETCHCONTENT_FULLY_DISCONNECTED=ON)
foreach(package IN ITEMS Catch2 Eigen3 nlohmann_json CLI11)
  string(TOLOWER "${package}" lower)
  string(TOUPPER "${package}" upper)
  list(APPEND arguments "-DCMAKE_DISABLE_FIND_PACKAGE_${package}=ON"
       "-DFETCHCONTENT_SOURCE_DIR_${upper}=${BINARY}/sources/${lower}")
endforeach()

# First the whole project as a developer without these packages would configure it. Google Benchmark
# is a compiled library, of which no sources are installed, so the kernel benchmarks keep theirs.
run("${CMAKE_COMMAND}" -S "${KVLEAN}" -B "${BINARY}/whole" -G "${GENERATOR}"
    "-DCMAKE_CXX_COMPILER=${CXX}" ${arguments})
