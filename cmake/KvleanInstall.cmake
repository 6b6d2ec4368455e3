# Installs the headers, the CMake package and the pkg-config file.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(kvlean_package_dir "${CMAKE_INSTALL_DATADIR}/cmake/kvlean")

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(TARGETS kvlean EXPORT kvleanTargets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT kvleanTargets NAMESPACE kvlean:: DESTINATION "${kvlean_package_dir}")

configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/kvleanConfig.cmake.in" "${PROJECT_BINARY_DIR}/kvleanConfig.cmake"
  INSTALL_DESTINATION "${kvlean_package_dir}")
# Before 1.0 a minor version may break, so only the same minor version is compatible.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/kvleanConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/kvleanConfig.cmake"
              "${PROJECT_BINARY_DIR}/kvleanConfigVersion.cmake"
        DESTINATION "${kvlean_package_dir}")

# The prefix is found from the file's own place, so an installed tree can be moved.
file(RELATIVE_PATH kvlean_pc_prefix "/${CMAKE_INSTALL_DATADIR}/pkgconfig" "/")
string(REGEX REPLACE "/$" "" kvlean_pc_prefix "${kvlean_pc_prefix}")
configure_file("${PROJECT_SOURCE_DIR}/cmake/kvlean.pc.in" "${PROJECT_BINARY_DIR}/kvlean.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/kvlean.pc"
        DESTINATION "${CMAKE_INSTALL_DATADIR}/pkgconfig")
