/* Communicators: their lives, their errors, and the functions of NCCL that ask them. */

#define _GNU_SOURCE
#include "stub.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Errors */

static pthread_mutex_t text_lock = PTHREAD_MUTEX_INITIALIZER;
static char last_text[TEXT_BYTES];

static void remember(const char *text) {
    pthread_mutex_lock(&text_lock);
    snprintf(last_text, sizeof last_text, "%s", text);
    pthread_mutex_unlock(&text_lock);
}

/* Keeps a text for ncclGetLastError and returns the code. */
ncclResult_t refuse(ncclResult_t code, const char *format, ...) {
    char text[TEXT_BYTES];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    remember(text);
    return code;
}

void complain(const char *format, ...) {
    char text[TEXT_BYTES];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    remember(text);
    fprintf(stderr, "nccl stub: %s\n", text);
}

EXPORT const char *ncclGetLastError(ncclComm_t comm) {
    static _Thread_local char copy[TEXT_BYTES];
    (void)comm; /* as in NCCL, the last error of the process */
    pthread_mutex_lock(&text_lock);
    memcpy(copy, last_text, sizeof copy);
    pthread_mutex_unlock(&text_lock);
    return copy;
}

EXPORT const char *ncclGetErrorString(ncclResult_t code) {
    static const char *const TEXTS[] = {
        "no error",
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        "unhandled system error (run with NCCL_DEBUG=INFO for details)",
        "internal error - please report this issue to the NCCL developers",
        "invalid argument (run with NCCL_DEBUG=WARN for details)",
        "invalid usage (run with NCCL_DEBUG=WARN for details)",
        "remote process exited or there was a network error",
        "NCCL operation in progress",
    };
    return code <= ncclInProgress ? TEXTS[code] : "unknown result code";
}

static int version(void) {
    const char *text = getenv("NCCL_STUB_VERSION");
    return text ? atoi(text) : 23203;
}

EXPORT ncclResult_t ncclGetVersion(int *out) {
    if (!out)
        return refuse(ncclInvalidArgument, "GetVersion: version is NULL");
    *out = version();
    return ncclSuccess;
}

/* The table of communicators. None is ever freed, only what it holds: a late ticket or a second
 * destroy must find a communicator that says that it is gone. */

static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static Comm **table;
static uint64_t table_size;

static bool enter(Comm *comm) {
    pthread_mutex_lock(&table_lock);
    Comm **grown = realloc(table, (table_size + 1) * sizeof *table);
    if (grown) {
        table = grown;
        table[table_size++] = comm;
        comm->index = table_size;
    }
    pthread_mutex_unlock(&table_lock);
    return grown;
}

Comm *comm_at(uint64_t index) {
    pthread_mutex_lock(&table_lock);
    Comm *comm = index >= 1 && index <= table_size ? table[index - 1] : NULL;
    pthread_mutex_unlock(&table_lock);
    return comm;
}

/* Failures */

void comm_fail(Comm *comm, ncclResult_t code, const char *format, ...) {
    char text[TEXT_BYTES];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    if (comm->failure)
        return;
    comm->failure = code;
    complain("%s", text);
}

ncclResult_t comm_failure(Comm *comm) {
    int shared = comm->segment ? atomic_load(&comm->segment->failure) : 0;
    if (!comm->failure && shared > 0)
        comm_fail(comm, (ncclResult_t)shared, "%s", comm->segment->text);
    return comm->failure;
}

/* Lets go of what a communicator holds; what was still to be done fails with the code, or with an
 * earlier one. */
void comm_leave(Comm *comm, ncclResult_t code) {
    if (comm->state == GONE)
        return;
    comm->state = GONE;
    comm->failure = comm->failure ? comm->failure : code;
    for (Batch *batch = comm->queue, *next; batch; batch = next) {
        next = batch->next;
        batch_free(batch);
    }
    comm->queue = comm->last = NULL;
    segment_unmap(comm->segment);
    comm->segment = NULL;
}

ncclResult_t comm_check(Comm *comm, const char *function) {
    if (!comm)
        return refuse(ncclInvalidArgument, "%s: the communicator is NULL", function);
    pthread_mutex_lock(&comm->lock);
    bool gone = comm->state == GONE;
    pthread_mutex_unlock(&comm->lock);
    if (gone)
        return refuse(ncclInvalidArgument, "%s: the communicator was destroyed or aborted",
                      function);
    return ncclSuccess;
}

/* Birth */

static ncclResult_t join(Comm *comm) {
    RankCell *mine = &comm->segment->ranks[comm->rank];
    if (comm->faults.fail_init) {
        char text[TEXT_BYTES];
        snprintf(text, sizeof text, "CommInitRank failed on rank %d (injected fault)", comm->rank);
        segment_fail(comm->segment, ncclRemoteError, text);
        return refuse(ncclSystemError, "%s", text);
    }
    if (comm->faults.hang_init)
        return ncclSuccess;
    if (atomic_exchange(&mine->joined, true))
        return refuse(ncclInvalidUsage, "rank %d of this unique id is taken", comm->rank);
    mine->device = comm->device;
    atomic_fetch_add(&comm->segment->joined, 1);
    return ncclSuccess;
}

/* Joins without waiting for the others. Faults of initialisation strike ncclCommInitRank only. */
ncclResult_t comm_create(Comm **out, const ncclUniqueId *id, int size, int rank, int device,
                         bool init) {
    Comm *comm = calloc(1, sizeof *comm);
    if (!comm)
        return refuse(ncclSystemError, "no memory");
    *comm = (Comm){.rank = rank, .size = size, .device = device, .id = *id, .state = JOINING};
    pthread_mutex_init(&comm->lock, NULL);
    ncclResult_t result = faults_read(rank, &comm->faults);
    comm->faults.hang_init &= init;
    comm->faults.fail_init &= init;
    if (!result)
        result = segment_map(id, size, &comm->segment);
    if (result) {
        free(comm);
        return result;
    }
    result = join(comm);
    if (!result && enter(comm)) /* another thread may abort it while this one waits for the others */
        __atomic_store_n(out, comm, __ATOMIC_RELEASE);
    else {
        segment_unmap(comm->segment);
        free(comm);
    }
    return result;
}

/* Which two ranks share a device, where that is not allowed. */
static bool duplicates(const Comm *comm, int *a, int *b) {
    const char *allowed = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
    if (version() >= 23003 && allowed && strcmp(allowed, "1") == 0)
        return false;
    for (*b = 1; *b < comm->size; ++*b)
        for (*a = 0; *a < *b; ++*a)
            if (comm->segment->ranks[*a].device == comm->segment->ranks[*b].device)
                return true;
    return false;
}

static ncclResult_t poll_init(Comm *comm) {
    int a, b;
    if (comm_failure(comm))
        return comm->failure;
    if (comm->state != JOINING)
        return ncclSuccess;
    if (comm->faults.hang_init || atomic_load(&comm->segment->joined) < comm->size)
        return ncclInProgress;
    segment_close_descriptor(comm->segment, &comm->id);
    if (duplicates(comm, &a, &b)) {
        const char *cure = version() >= 23003 ? "; set NCCL_MULTI_RANK_GPU_ENABLE=1" : "";
        comm_fail(comm, ncclInvalidUsage,
                  "duplicate GPU: rank %d and rank %d are both on CUDA device %d%s", a, b,
                  comm->segment->ranks[a].device, cure);
        return comm->failure;
    }
    comm->state = READY;
    return ncclSuccess;
}

ncclResult_t comm_poll_init(Comm *comm) {
    pthread_mutex_lock(&comm->lock);
    ncclResult_t result = poll_init(comm);
    if (result && result != ncclInProgress)
        comm_leave(comm, result);
    pthread_mutex_unlock(&comm->lock);
    return result;
}

EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    return id ? segment_create(id) : refuse(ncclInvalidArgument, "GetUniqueId: uniqueId is NULL");
}

/* Death */

static ncclResult_t outstanding(Comm *comm, const char *function) {
    if (comm->failure || comm->issued == comm->finished)
        return ncclSuccess;
    complain("%s with %llu operations outstanding: wait for their streams first", function,
             (unsigned long long)(comm->issued - comm->finished));
    return ncclInvalidUsage;
}

EXPORT ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    ncclResult_t result = comm_check(comm, "CommFinalize");
    if (result)
        return result;
    pthread_mutex_lock(&comm->lock);
    result = outstanding(comm, "CommFinalize");
    if (!result && comm->state == READY)
        comm->state = FINALIZED;
    pthread_mutex_unlock(&comm->lock);
    return result;
}

/* NCCL would let the outstanding operations run to their end here. Nobody would drive them in the
 * stand-in, and their arrays may be gone; so this is told as the mistake that it nearly always is.
 */
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    ncclResult_t result = comm_check(comm, "CommDestroy");
    if (result)
        return result;
    pthread_mutex_lock(&comm->lock);
    result = outstanding(comm, "CommDestroy");
    comm_leave(comm, ncclInvalidUsage);
    pthread_mutex_unlock(&comm->lock);
    return result;
}

/* Peers learn nothing of it, as in life. */
EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm) {
    ncclResult_t result = comm_check(comm, "CommAbort");
    if (result)
        return result;
    pthread_mutex_lock(&comm->lock);
    comm_leave(comm, ncclInternalError);
    pthread_mutex_unlock(&comm->lock);
    return ncclSuccess;
}

/* Questions */

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *out) {
    ncclResult_t result = comm_check(comm, "CommGetAsyncError");
    if (result)
        return result;
    pthread_mutex_lock(&comm->lock);
    bool busy = comm->state == JOINING || comm->faults.in_progress > 0;
    comm->faults.in_progress -= comm->faults.in_progress > 0;
    ncclResult_t failure = comm_failure(comm);
    *out = failure ? failure : busy ? ncclInProgress : ncclSuccess;
    pthread_mutex_unlock(&comm->lock);
    return ncclSuccess;
}

static ncclResult_t ask(Comm *comm, const char *function, size_t field, int *out) {
    ncclResult_t result = comm_check(comm, function);
    if (!result)
        memcpy(out, (const char *)comm + field, sizeof *out);
    return result;
}

EXPORT ncclResult_t ncclCommCount(ncclComm_t comm, int *count) {
    return ask(comm, "CommCount", offsetof(Comm, size), count);
}

EXPORT ncclResult_t ncclCommCuDevice(ncclComm_t comm, int *device) {
    return ask(comm, "CommCuDevice", offsetof(Comm, device), device);
}

EXPORT ncclResult_t ncclCommUserRank(ncclComm_t comm, int *rank) {
    return ask(comm, "CommUserRank", offsetof(Comm, rank), rank);
}
