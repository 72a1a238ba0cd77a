/* What Java needs to call libtenon: the natives of tenon/Native.java. It knows
 * no function of the library by name but tenon_model_load, whose callback has
 * to come back into Java; structs are built by Java in direct buffers. */

#include <dlfcn.h>
#include <jni.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "tenon.h"

static void* library = NULL; /* written once, under Tenon.load's lock */

/* JNI types are as wide as the ABI's on LP64, where a pointer and every integer
 * of tenon.h take one argument register. */
typedef char assert_lp64[sizeof(void*) == sizeof(jlong) ? 1 : -1];

static void* pointer(jlong address) { return (void*)(intptr_t)address; }

static jbyteArray bytes(JNIEnv* env, const char* text) {
  const jsize length = (jsize)strlen(text);
  jbyteArray result = (*env)->NewByteArray(env, length);
  if (result != NULL) {
    (*env)->SetByteArrayRegion(env, result, 0, length, (const jbyte*)text);
  }
  return result;
}

JNIEXPORT jbyteArray JNICALL Java_tenon_Native_open(JNIEnv* env, jclass self,
                                                    jlong path) {
  (void)self;
  library = dlopen(pointer(path), RTLD_NOW | RTLD_LOCAL);
  return library != NULL ? NULL : bytes(env, dlerror());
}

JNIEXPORT jlong JNICALL Java_tenon_Native_symbol(JNIEnv* env, jclass self,
                                                 jlong name) {
  (void)env;
  (void)self;
  return (jlong)(intptr_t)dlsym(library, pointer(name));
}

JNIEXPORT jintArray JNICALL Java_tenon_Native_layout(JNIEnv* env, jclass self) {
  (void)self;
  static const jint layout[] = {
#define STRUCT(type) (jint)sizeof(type),
#define FIELD(type, name) \
  (jint) offsetof(type, name), (jint)sizeof(((type*)0)->name),
#include "tenon_jni_layout.h"
#undef FIELD
#undef STRUCT
  };
  const jsize length = (jsize)(sizeof(layout) / sizeof(layout[0]));
  jintArray result = (*env)->NewIntArray(env, length);
  if (result != NULL) {
    (*env)->SetIntArrayRegion(env, result, 0, length, layout);
  }
  return result;
}

JNIEXPORT jlong JNICALL Java_tenon_Native_address(JNIEnv* env, jclass self,
                                                  jobject buffer) {
  (void)self;
  return (jlong)(intptr_t)(*env)->GetDirectBufferAddress(env, buffer);
}

JNIEXPORT jbyteArray JNICALL Java_tenon_Native_text(JNIEnv* env, jclass self,
                                                    jlong address) {
  (void)self;
  return bytes(env, pointer(address));
}

JNIEXPORT jlong JNICALL Java_tenon_Native_call(JNIEnv* env, jclass self,
                                               jlong function, jlong a, jlong b,
                                               jlong c, jlong d) {
  (void)env;
  (void)self;
  typedef jlong (*AnyFunction)(jlong, jlong, jlong, jlong);
  return ((AnyFunction)(intptr_t)function)(a, b, c, d);
}

/* ----------------------------------------------------- tenon_model_load */

typedef struct Listener {
  JNIEnv* env; /* tenon_model_load reports on the thread that called it */
  jobject reporter;
  jmethodID report;
} Listener;

static int32_t on_progress(void* user_data, int64_t bytes_done,
                           int64_t bytes_total) {
  const Listener* listener = user_data;
  JNIEnv* env = listener->env;
  const jint stop =
      (*env)->CallIntMethod(env, listener->reporter, listener->report,
                            (jlong)bytes_done, (jlong)bytes_total);
  return (*env)->ExceptionCheck(env) ? 1 : stop;
}

JNIEXPORT jint JNICALL Java_tenon_Native_load(JNIEnv* env, jclass self,
                                              jlong function, jlong args,
                                              jlong model, jlong error,
                                              jobject reporter) {
  (void)self;
  typedef int32_t (*LoadFunction)(const tenon_model_load_args*, tenon_model*,
                                  tenon_error*);
  Listener listener = {env, reporter, NULL};
  tenon_model_load_args* load_args = pointer(args);
  if (reporter != NULL) {
    jclass type = (*env)->GetObjectClass(env, reporter);
    listener.report = (*env)->GetMethodID(env, type, "report", "(JJ)I");
    if (listener.report == NULL) return TENON_INTERNAL; /* and an Error */
    load_args->progress = on_progress;
    load_args->progress_user_data = &listener;
  }
  const int32_t code = ((LoadFunction)(intptr_t)function)(
      load_args, pointer(model), pointer(error));
  load_args->progress_user_data = NULL;
  return code;
}
