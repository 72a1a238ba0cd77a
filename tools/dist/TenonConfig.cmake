# find_package(Tenon CONFIG) gives the target Tenon::tenon. The files may be
# moved as a whole.

get_filename_component(_tenon_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET Tenon::tenon)
  add_library(Tenon::tenon SHARED IMPORTED)
  set_target_properties(Tenon::tenon PROPERTIES
    IMPORTED_LOCATION "${_tenon_prefix}/lib/libtenon.so.1"
    IMPORTED_SONAME "libtenon.so.1"
    INTERFACE_INCLUDE_DIRECTORIES "${_tenon_prefix}/include")
endif()

unset(_tenon_prefix)
