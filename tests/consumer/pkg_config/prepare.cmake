run("${CMAKE_COMMAND}" --install "${KVLEAN_BINARY}" --prefix "${BINARY}/prefix")
list(APPEND arguments "-DPREFIX=${BINARY}/prefix" "-DPKG_CONFIG=${PKG_CONFIG}")
