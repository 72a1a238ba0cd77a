#include "loader.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static int check_version(const tenon_library* library, const char* path,
                         char* reason, size_t reason_size) {
  const uint32_t needed = TENON_ABI_MAJOR << 16 | TENON_ABI_MINOR;
  const uint32_t found = library->abi_version();
  if (found >= needed && found >> 16 == needed >> 16) return 0;
  snprintf(reason, reason_size,
           "%s has ABI %u.%u, but this program was compiled for %d.%d", path,
           (unsigned)(found >> 16), (unsigned)(found & 0xffff), TENON_ABI_MAJOR,
           TENON_ABI_MINOR);
  return -1;
}

/* dlsym() returns a data pointer, which C does not convert to a function's. */
static int find(void* handle, const char* path, const char* name,
                void* function, char* reason, size_t reason_size) {
  void* const symbol = dlsym(handle, name);
  if (symbol == NULL) {
    snprintf(reason, reason_size, "%s has no function %s", path, name);
    return -1;
  }
  memcpy(function, &symbol, sizeof(symbol));
  return 0;
}

int tenon_library_open(const char* path, tenon_library* library, char* reason,
                       size_t reason_size) {
  memset(library, 0, sizeof(*library));
  if (path == NULL) path = "libtenon.so.1";
  library->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library->handle == NULL) {
    snprintf(reason, reason_size, "%s", dlerror());
    return -1;
  }
  /* The version first: another one may lack functions. */
  int failed = find(library->handle, path, "tenon_abi_version",
                    &library->abi_version, reason, reason_size) ||
               check_version(library, path, reason, reason_size);
#define FIND(name)                                               \
  failed = failed || find(library->handle, path, "tenon_" #name, \
                          &library->name, reason, reason_size);
  TENON_FUNCTIONS(FIND)
#undef FIND
  if (!failed) return 0;
  tenon_library_close(library);
  return -1;
}

void tenon_library_close(tenon_library* library) {
  if (library->handle != NULL) dlclose(library->handle);
  memset(library, 0, sizeof(*library));
}
