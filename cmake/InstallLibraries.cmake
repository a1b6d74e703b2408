# `cmake --install` puts the kernels where engines in C++ find them: headers, static libraries and a package, so that
# find_package(lkv) gives lkv::cpu and, where nvcc was there, lkv::cuda. The Python package is a component of its own.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(LKV_LIBRARIES lkv_cpu)
if(LKV_WITH_CUDA)
  list(APPEND LKV_LIBRARIES lkv_cuda)
endif()
foreach(library ${LKV_LIBRARIES})
  string(REPLACE "lkv_" "" name ${library})
  set_target_properties(${library} PROPERTIES EXPORT_NAME ${name})
  add_library(lkv::${name} ALIAS ${library})
endforeach()

set(LKV_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/lkv)
install(TARGETS ${LKV_LIBRARIES} EXPORT lkv COMPONENT cpp
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/csrc/include/lkv DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(EXPORT lkv NAMESPACE lkv:: FILE lkv-targets.cmake DESTINATION ${LKV_PACKAGE_DIR} COMPONENT cpp)

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/lkv-config.cmake.in lkv-config.cmake
                              INSTALL_DESTINATION ${LKV_PACKAGE_DIR})
write_basic_package_version_file(lkv-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/lkv-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/lkv-config-version.cmake
        DESTINATION ${LKV_PACKAGE_DIR} COMPONENT cpp)
