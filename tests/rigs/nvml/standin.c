/* Stands in for libnvidia-ml.so.1 and libcuda.so.1: their own C interface over figures in a text file.
 *
 * GPUMETER_STANDIN names the file, which is read anew by every call: lines `name value`. `fail.FUNCTION code` makes a
 * call return that error, `hang.FUNCTION milliseconds` makes it wait, `crash.FUNCTION 1` ends the process, `lost 1` is
 * NVML_ERROR_GPU_IS_LOST from every call about a device. A figure that the file lacks is not supported.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SUCCESS 0
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7
#define GPU_IS_LOST 15

typedef struct Device { int instance; } Device;
static Device gpu = {0}, instance = {1};

static int find(const char *name, char *text, size_t size) {
    const char *path = getenv("GPUMETER_STANDIN");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    size_t length = strlen(name);
    int found = 0;
    if (!file) return 0;
    while (!found && fgets(line, sizeof line, file)) {
        if (strncmp(line, name, length) == 0 && line[length] == ' ') {
            line[strcspn(line, "\n")] = 0;
            snprintf(text, size, "%s", line + length + 1);
            found = 1;
        }
    }
    fclose(file);
    return found;
}

static int number(const char *name, long long *value) {
    char text[64];
    if (!find(name, text, sizeof text)) return 0;
    *value = atoll(text);
    return 1;
}

/* What the file says of a call, whatever it is about. */
static int scripted(const char *function) {
    char name[128];
    long long value;
    snprintf(name, sizeof name, "hang.%s", function);
    if (number(name, &value)) usleep((useconds_t)value * 1000);
    snprintf(name, sizeof name, "crash.%s", function);
    if (number(name, &value)) raise(SIGSEGV);
    snprintf(name, sizeof name, "fail.%s", function);
    return number(name, &value) ? (int)value : SUCCESS;
}

static int about_device(const char *function) {
    long long value;
    if (number("lost", &value) && value) return GPU_IS_LOST;
    return scripted(function);
}

#define SCRIPTED { int code = scripted(__func__); if (code) return code; }
#define DEVICE { int code = about_device(__func__); if (code) return code; }
#define FIGURE(name) long long value; DEVICE if (!number(name, &value)) return NOT_SUPPORTED;

int nvmlInitWithFlags(unsigned flags) { (void)flags; SCRIPTED return SUCCESS; }
int nvmlInit_v2(void) { SCRIPTED return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    switch (code) {
        case 9: return "Driver Not Loaded";
        case 15: return "GPU is lost";
        default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    SCRIPTED
    return find("driver", version, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    SCRIPTED
    long long value = 1;
    number("count", &value);
    *count = (unsigned)value;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    DEVICE
    if (index) return NOT_FOUND;
    *device = &gpu;
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned size) {
    DEVICE
    return find(device->instance ? "mig.uuid" : "uuid", uuid, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    DEVICE
    char own[128];
    if (find("uuid", own, sizeof own) && strcmp(own, uuid) == 0) *device = &gpu;
    else if (find("mig.uuid", own, sizeof own) && strcmp(own, uuid) == 0) *device = &instance;
    else return NOT_FOUND;
    return SUCCESS;
}

int nvmlDeviceGetName(Device *device, char *name, unsigned size) {
    DEVICE
    return find(device->instance ? "mig.name" : "name", name, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceIsMigDeviceHandle(Device *device, unsigned *is) { DEVICE *is = (unsigned)device->instance; return SUCCESS; }

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *mig, Device **device) {
    DEVICE
    (void)mig;
    *device = &gpu;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *now, unsigned *pending) {
    FIGURE("mig.mode")
    (void)device;
    *now = *pending = (unsigned)value;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) { DEVICE (void)device; *count = 7; return SUCCESS; }

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **mig) {
    FIGURE("mig.index") /* which of the seven this container was given */
    (void)device;
    if ((long long)index != value) return NOT_FOUND;
    *mig = &instance;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(Device *device, unsigned rates[2]) {
    long long gpu_percent, memory_percent;
    DEVICE
    if (device->instance || !number("gpu", &gpu_percent) || !number("memory", &memory_percent)) return NOT_SUPPORTED;
    rates[0] = (unsigned)gpu_percent;
    rates[1] = (unsigned)memory_percent;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device *device, unsigned long long info[3]) { /* total, free, used */
    long long total, used, reserved = 0;
    DEVICE
    if (!number(device->instance ? "mig.total" : "total", &total) || !number("used", &used)) return NOT_SUPPORTED;
    number("reserved", &reserved);
    info[0] = (unsigned long long)total;
    info[1] = (unsigned long long)(total - used - reserved);
    info[2] = (unsigned long long)(used + reserved);
    return SUCCESS;
}

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;

int nvmlDeviceGetMemoryInfo_v2(Device *device, Memory2 *info) {
    long long total, used, reserved = 0;
    DEVICE
    if (!number(device->instance ? "mig.total" : "total", &total) || !number("used", &used)) return NOT_SUPPORTED;
    number("reserved", &reserved);
    info->total = (unsigned long long)total;
    info->reserved = (unsigned long long)reserved;
    info->free = (unsigned long long)(total - used - reserved);
    info->used = (unsigned long long)used;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned *power) { FIGURE("power_mw") (void)device; *power = (unsigned)value; return SUCCESS; }

int nvmlDeviceGetTotalEnergyConsumption(Device *device, unsigned long long *energy) {
    FIGURE("energy_mj")
    (void)device;
    *energy = (unsigned long long)value;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(Device *device, unsigned sensor, unsigned *temperature) {
    FIGURE("temperature_c")
    (void)device; (void)sensor;
    *temperature = (unsigned)value;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(Device *device, unsigned kind, unsigned *clock) { /* 1: SM, 2: memory */
    FIGURE(kind == 1 ? "sm_mhz" : "memory_mhz")
    (void)device;
    *clock = (unsigned)value;
    return SUCCESS;
}

int nvmlDeviceGetComputeMode(Device *device, unsigned *mode) { FIGURE("compute_mode") (void)device; *mode = (unsigned)value; return SUCCESS; }

typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } Process;

static int listed(const char *name, unsigned *count, Process *processes) {
    long long value = 0;
    if (!number(name, &value)) return NOT_SUPPORTED;
    if (*count < (unsigned)value) { *count = (unsigned)value; return INSUFFICIENT_SIZE; }
    for (long long index = 0; index < value; index++) processes[index] = (Process){(unsigned)(100 + index), 1 << 20, 0, 0};
    *count = (unsigned)value;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *processes) {
    DEVICE
    (void)device;
    return listed("processes", count, processes);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(Device *device, unsigned *count, Process *processes) {
    DEVICE
    (void)device;
    return listed("mps_clients", count, processes);
}

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    unsigned kind;
    int result;
    union { double real; unsigned long long whole; } value;
} Field;

int nvmlDeviceGetFieldValues(Device *device, int count, Field *fields) {
    DEVICE
    (void)device;
    for (int index = 0; index < count; index++) {
        long long value;
        int sent = fields[index].field == 138, received = fields[index].field == 139;
        if ((sent || received) && number(sent ? "nvlink_sent_kib" : "nvlink_received_kib", &value)) {
            fields[index].value.whole = (unsigned long long)value;
            fields[index].result = SUCCESS;
        } else fields[index].result = NOT_SUPPORTED;
    }
    return SUCCESS;
}

/* libcuda: the few calls of a probe that makes no context. */

int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuInit(unsigned flags) { (void)flags; SCRIPTED return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index ? 101 : 0; }

int cuDeviceGetName(char *name, int size, int device) {
    long long value;
    (void)device;
    return find(number("mig.index", &value) ? "mig.name" : "name", name, (size_t)size) ? 0 : 1;
}

int cuDeviceTotalMem_v2(size_t *total, int device) {
    long long value = 0, index;
    (void)device;
    number(number("mig.index", &index) ? "mig.total" : "total", &value);
    *total = (size_t)value;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) { (void)device; *value = attribute == 75 ? 8 : 0; return 0; }

int cuDeviceGetUuid_v2(unsigned char *bytes, int device) {
    char text[128], *place;
    long long index;
    (void)device;
    SCRIPTED
    if (!find(number("mig.index", &index) ? "mig.uuid" : "uuid", text, sizeof text)) return 1;
    place = strchr(text, '-');
    for (int count = 0; place && *place && count < 16;) {
        unsigned byte;
        if (*place == '-') { place++; continue; }
        if (sscanf(place, "%2x", &byte) != 1) return 1;
        bytes[count++] = (unsigned char)byte;
        place += 2;
    }
    return 0;
}

int cuGetErrorName(int code, const char **name) { (void)code; *name = "CUDA_ERROR_UNKNOWN"; return 0; }
