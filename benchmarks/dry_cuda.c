// A CUDA runtime, driver, cuBLAS and NCCL of H200s that computes nothing: see dry_cuda.py, which adds the functions that
// are not named here (they return 0, success). DRY_DEVICES: how many H200s; DRY_NCCL: a file for a line a collective. Device memory is address space that is never touched; small copies between
// host and device are made, kernels are not run, events keep the host's time.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "cuda_runtime_api.h"

#define MEMORY ((size_t)141 << 30)
#define PAGE ((size_t)2 << 20)
#define COPIED ((size_t)64 << 20)
#define ROOM 65536

// --- memory ---------------------------------------------------------------------------------------------------------

typedef struct {
  char *start;
  size_t size;
  int host, device;
} Block;

static __thread int current_device;

static Block blocks[ROOM];
static int count;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t take(void **out, size_t size, int host) {
  size = (size + 4095) / 4096 * 4096 + 4096;
  pthread_mutex_lock(&lock);
  char *start = MAP_FAILED;
  if (count < ROOM && (host || used + size <= MEMORY))
    start = mmap(0, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  int good = start != MAP_FAILED;
  if (good) {
    *out = (void *)(((uintptr_t)start + PAGE - 1) & ~(PAGE - 1));
    blocks[count++] = (Block){*out, size, host, current_device};
    used += host ? 0 : size;
  }
  pthread_mutex_unlock(&lock);
  return good ? cudaSuccess : cudaErrorMemoryAllocation;
}

static cudaError_t give(void *start) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < count; i++)
    if (blocks[i].start == start) {
      if (blocks[i].host < 2) munmap(start, blocks[i].size);
      used -= blocks[i].host ? 0 : blocks[i].size;
      blocks[i] = blocks[--count];
      break;
    }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

static Block block_of(const void *address) {  // host: 0 device, 1 and 2 pinned, -1 neither
  Block found = {0, 0, -1, 0};
  pthread_mutex_lock(&lock);
  for (int i = 0; i < count && found.host < 0; i++)
    if ((char *)address >= blocks[i].start && (char *)address < blocks[i].start + blocks[i].size) found = blocks[i];
  pthread_mutex_unlock(&lock);
  return found;
}
static int place(const void *address) { return block_of(address).host; }

static cudaError_t copy(void *to, const void *from, size_t size) {
  int within = place(to) == 0 && place(from) == 0;
  if (size <= (within ? 65536 : COPIED)) memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t n) { return take(p, n, 0); }
cudaError_t cudaFree(void *p) { return give(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return take(p, n, 1); }
cudaError_t cudaFreeHost(void *p) { return give(p); }
cudaError_t cudaHostUnregister(void *p) { return give(p); }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned flags) {
  pthread_mutex_lock(&lock);
  if (count < ROOM) blocks[count++] = (Block){p, n, 2, current_device};
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
  *all = MEMORY, *left = MEMORY - used;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { return copy(to, from, n); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) {
  return copy(to, from, n);
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s) {
  if (n <= 65536) memset(p, value, n);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *facts, const void *p) {
  memset(facts, 0, sizeof *facts);
  Block found = block_of(p);
  int host = found.host;
  facts->device = found.device;
  facts->type = host < 0 ? cudaMemoryTypeUnregistered : host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  facts->devicePointer = (void *)p;
  facts->hostPointer = host > 0 ? (void *)p : 0;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { return take(p, 4096, 0); }

// --- the device -----------------------------------------------------------------------------------------------------

static int devices(void) {
  char *number = getenv("DRY_DEVICES");
  return number ? atoi(number) : 1;
}
cudaError_t cudaGetDeviceCount(int *n) { return *n = devices(), cudaSuccess; }
cudaError_t cudaGetDevice(int *n) { return *n = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int n) { return current_device = n, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  *p = (struct cudaDeviceProp){
      .name = "NVIDIA H200", .totalGlobalMem = MEMORY, .major = 9, .minor = 0, .multiProcessorCount = 132,
      .warpSize = 32, .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048, .regsPerMultiprocessor = 65536,
      .regsPerBlock = 65536, .sharedMemPerBlock = 49152, .sharedMemPerBlockOptin = 232448,
      .sharedMemPerMultiprocessor = 233472, .l2CacheSize = 60 << 20, .maxGridSize = {2147483647, 65535, 65535},
      .maxThreadsDim = {1024, 1024, 64}, .textureAlignment = 512, .unifiedAddressing = 1, .canMapHostMemory = 1};
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device) {
  switch (what) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  return snprintf(id, size, "0000:0%d:00.0", device), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -5, cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *facts, const void *kernel) {
  *facts = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 64, .binaryVersion = 90, .ptxVersion = 90};
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *kernel, int threads, size_t shared) {
  return *n = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *k, int t, size_t s, unsigned f) {
  return *n = 2, cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t error) { return "an error of a CUDA runtime that computes nothing"; }
const char *cudaGetErrorName(cudaError_t error) { return "dry"; }

// --- events, streams, kernels ---------------------------------------------------------------------------------------

static int make(void **handle) { return *handle = calloc(1, 4096), 0; }

cudaError_t cudaEventCreate(cudaEvent_t *e) { return make((void **)e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return make((void **)e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *(double *)e = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  double passed = *(double *)to - *(double *)from;
  return *ms = passed > 1e-3 ? passed : 1e-3, cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return make((void **)s); }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { return *c = 0, cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *n) {
  *status = 0;
  if (id) *id = 0;
  if (n) *n = 0;
  return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[64];
  return handle;
}
int __cudaGetKernel(void **kernel, const void *function) { return *kernel = (void *)function, 0; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}

// --- the driver, as Triton and PyTorch's launchers call it ------------------------------------------------------------

int cuDeviceGet(int *device, int n) { return *device = n, 0; }
int cuDeviceGetCount(int *n) { return *n = devices(), 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { return cudaDeviceGetAttribute(value, what, device); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return make(context); }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
int cuCtxGetDevice(int *device) { return *device = current_device, 0; }
int cuModuleLoad(void **module, const char *file) { return make(module); }
int cuModuleLoadData(void **module, const void *image) { return make(module); }
int cuModuleLoadDataEx(void **m, const void *image, unsigned n, void *options, void *values) { return make(m); }
int cuModuleGetFunction(void **function, void *module, const char *name) { return make(function); }
int cuModuleGetGlobal_v2(void **p, size_t *size, void *m, const char *name) { return make(p); }
int cuFuncGetAttribute(int *value, int what, void *f) { return *value = what == 0 ? 1024 : what == 4 ? 64 : 0, 0; }
int cuPointerGetAttribute(void *out, int what, uint64_t p) { return what == 3 ? (*(uint64_t *)out = p, 0) : 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int threads, size_t shared) { return *n = 2, 0; }
int cuOccupancyMaxActiveClusters(int *n, void *f, void *config) { return *n = 16, 0; }
int cuDriverGetVersion(int *version) { return *version = CUDART_VERSION, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "dry", 0; }

// --- cuBLAS and NCCL --------------------------------------------------------------------------------------------------

int cublasCreate_v2(void **handle) { return make(handle); }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0, 0; }
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { return make(d); }
int cublasLtMatrixLayoutCreate(void **d, int type, uint64_t rows, uint64_t columns, int64_t ld) { return make(d); }
int cublasLtMatmulPreferenceCreate(void **p) { return make(p); }
int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *d, void *a, void *b, void *c, void *out, void *preference, int wanted, void *results, int *n) {
  return memset(results, 0, 96), *n = 1, 0;  // one algorithm, that needs no workspace
}
size_t cublasLtGetVersion(void) { return 130100; }

// --- NCCL: nothing is sent, and what would be is written down, the same on all ranks where they would meet --------------

typedef struct {
  char bytes[128];
} Id;
typedef struct {
  int size, rank;
} Comm;

static void note(const char *what, Comm *comm, size_t numbers, int type, int op) {
  static FILE *file;
  if (!getenv("DRY_NCCL")) return;
  if (!file) setlinebuf(file = fopen(getenv("DRY_NCCL"), "w"));
  const char *thread = getpid() == syscall(SYS_gettid) ? "" : ", not the main thread";
  int size = comm ? comm->size : 0;  // below 0: of a part of so many, and how large it is was not told
  const char *part = size < 0 ? "part of " : "";
  fprintf(file, "%s in %s%d: %zu of type %d, op or root %d%s\n", what, part, abs(size), numbers, type, op, thread);
}
static int begin(void **out, int size, int rank) {
  Comm *comm = calloc(1, 4096);
  *comm = (Comm){size, rank}, *out = comm;
  return note("begin", comm, 0, 0, 0), 0;
}
int ncclGetVersion(int *version) { return *version = 22809, 0; }
int ncclGetUniqueId(char *id) { return memset(id, 1, 128), 0; }
int ncclCommInitRankConfig(void **c, int ranks, Id id, int rank, void *config) { return begin(c, ranks, rank); }
int ncclCommInitRankScalable(void **c, int ranks, int rank, int n, Id *id, void *config) { return begin(c, ranks, rank); }
int ncclCommSplit(Comm *from, int color, int key, void **c, void *config) {  // color < 0: the rank is not in it
  note("split", from, 0, 0, 0);
  return color < 0 ? (*c = 0, 0) : begin(c, -abs(from->size), key);
}
int ncclCommCount(Comm *c, int *n) { return *n = c->size, 0; }
int ncclCommUserRank(Comm *c, int *n) { return *n = c->rank, 0; }
int ncclCommCuDevice(Comm *c, int *n) { return *n = current_device, 0; }
int ncclAllReduce(void *a, void *b, size_t n, int t, int op, Comm *c, void *s) { return note("all_reduce", c, n, t, op), 0; }
int ncclBroadcast(void *a, void *b, size_t n, int t, int root, Comm *c, void *s) { return note("broadcast", c, n, t, root), 0; }
int ncclBcast(void *b, size_t n, int t, int root, Comm *c, void *s) { return note("broadcast", c, n, t, root), 0; }
int ncclAllGather(void *a, void *b, size_t n, int t, Comm *c, void *s) { return note("all_gather", c, n, t, 0), 0; }
int ncclReduceScatter(void *a, void *b, size_t n, int t, int op, Comm *c, void *s) {
  return note("reduce_scatter", c, n, t, op), 0;
}
int ncclSend(void *a, size_t n, int t, int peer, Comm *c, void *s) { return note("send", c, n, t, peer), 0; }
int ncclRecv(void *a, size_t n, int t, int peer, Comm *c, void *s) { return note("receive", c, n, t, peer), 0; }
int ncclCommDestroy(Comm *c) { return note("end", c, 0, 0, 0), 0; }
int ncclCommGetAsyncError(void *comm, int *error) { return *error = 0, 0; }
const char *ncclGetErrorString(int error) { return "dry"; }
const char *ncclGetLastError(void *comm) { return ""; }
