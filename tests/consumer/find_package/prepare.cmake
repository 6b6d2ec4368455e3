# Installs into a prefix of its own, and moves that: an installed tree must be relocatable.
run("${CMAKE_COMMAND}" --install "${KVLEAN_BINARY}" --prefix "${BINARY}/first place")
file(RENAME "${BINARY}/first place" "${BINARY}/prefix")
list(APPEND arguments "-DCMAKE_PREFIX_PATH=${BINARY}/prefix")
