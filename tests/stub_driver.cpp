// NVIDIA's driver without a GPU, for test_nvrtc.py. It keeps to the rules that the real one has about contexts, captures
// and shared memory, writes down what it is asked, and fails where a test tells it to.
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, CAPTURE_UNSUPPORTED = 900 };
constexpr int RELAXED = 2;
constexpr unsigned SHARED_BYTES_FOR_ALL = 48 * 1024;

struct Function { unsigned shared_bytes = SHARED_BYTES_FOR_ALL; };

std::mutex mutex;
std::string calls;
std::map<std::string, int> failures;
std::vector<unsigned char> arguments(64);
int version = 13000;
bool capturing = false, idle = false;
int devices[16];  // whose addresses are the contexts

thread_local std::vector<void*> contexts;
thread_local int capture_mode = 0;

int asked(const std::string& name, const std::string& details = "") {
    std::lock_guard<std::mutex> lock(mutex);
    calls += name + details + "\n";
    auto failure = failures.find(name);
    return failure == failures.end() ? SUCCESS : failure->second;
}

int loading(const char* name) {
    if (int status = asked(name)) return status;
    if (contexts.empty()) return INVALID_CONTEXT;
    return capturing && capture_mode != RELAXED ? CAPTURE_UNSUPPORTED : SUCCESS;
}

std::string number_of(void* context) {
    return " " + std::to_string(static_cast<int*>(context) - devices);
}

}  // namespace

extern "C" {

// What tests ask of the stub.
void stub_reset() {
    calls.clear();
    failures.clear();
    contexts.clear();
    version = 13000;
    capturing = idle = false;
}
const char* stub_calls() { return calls.c_str(); }
const unsigned char* stub_arguments() { return arguments.data(); }
void stub_fail(const char* name, int status) { failures[name] = status; }
void stub_set_version(int number) { version = number; }
void stub_be_idle() { idle = true; }  // launches take no time
void stub_set_capturing(bool on) { capturing = on; }
int stub_context() { return contexts.empty() ? -1 : static_cast<int*>(contexts.back()) - devices; }
int stub_capture_mode() { return capture_mode; }

int cuInit(unsigned) { return asked("cuInit"); }
int cuDriverGetVersion(int* out) { *out = version; return SUCCESS; }
int cuGetErrorString(int status, const char** out) {
    *out = status == CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing" : "as the test wants it";
    return SUCCESS;
}
int cuDeviceGet(int* out, int ordinal) { *out = ordinal; return asked("cuDeviceGet"); }
int cuDevicePrimaryCtxRetain(void** out, int device) { *out = devices + device; return asked("cuDevicePrimaryCtxRetain"); }
int cuCtxPushCurrent_v2(void* context) { contexts.push_back(context); return asked("cuCtxPushCurrent", number_of(context)); }
int cuCtxPopCurrent_v2(void** out) { *out = contexts.back(); contexts.pop_back(); return asked("cuCtxPopCurrent"); }
int cuCtxSetCurrent(void* context) {
    if (!contexts.empty()) contexts.pop_back();
    contexts.push_back(context);
    return asked("cuCtxSetCurrent", number_of(context));
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
    std::swap(*mode, capture_mode);
    return asked("cuThreadExchangeStreamCaptureMode", " " + std::to_string(capture_mode));
}
int cuModuleLoadData(void** out, const void* image) {
    if (int status = loading("cuModuleLoadData")) return status;
    if (std::memcmp(image, "\x7f" "ELF", 4) != 0) return INVALID_IMAGE;
    *out = new Function;  // a module has one function here
    return SUCCESS;
}
int cuModuleGetFunction(void** out, void* module, const char* name) {
    *out = module;
    return std::strcmp(name, "pyattn_kernel") ? INVALID_VALUE : loading("cuModuleGetFunction");
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    static_cast<Function*>(function)->shared_bytes = value;
    return asked("cuFuncSetAttribute", " " + std::to_string(attribute) + " " + std::to_string(value));
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void* stream, void** given, void** extra) {
    if (idle) return SUCCESS;
    std::string details;
    for (auto size : {grid_x, grid_y, grid_z, threads, block_y, block_z, shared_bytes}) details += " " + std::to_string(size);
    if (int status = asked("cuLaunchKernel", details + " " + std::to_string(reinterpret_cast<std::size_t>(stream))))
        return status;
    if (contexts.empty()) return INVALID_CONTEXT;
    if (shared_bytes > static_cast<Function*>(function)->shared_bytes || extra) return INVALID_VALUE;
    std::memcpy(arguments.data(), given[0], arguments.size());
    return SUCCESS;
}
}
