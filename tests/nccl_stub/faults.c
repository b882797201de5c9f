/* Injected faults: a comma separated list of
 *   fail:R:K         the K-th operation of rank R returns ncclSystemError at the call
 *   async:R:K[:CODE] the K-th operation of rank R sets the async error CODE (6, or as given) on its
 * communicator hang:R:K         the K-th operation of rank R never completes hang-init:R      rank
 * R never comes out of ncclCommInitRank fail-init:R      ncclCommInitRank returns ncclSystemError
 * on rank R and ncclRemoteError on the others progress:R:N     ncclCommGetAsyncError returns
 * ncclInProgress N times on rank R R is the rank in a communicator, operations are counted per
 * communicator, from 1. */

#define _GNU_SOURCE
#include "stub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *at_run_time; /* NULL: the environment's */

static bool take(const char *kind, unsigned long number, int code, Faults *faults) {
    if (strcmp(kind, "fail") == 0)
        faults->fail_at = number;
    else if (strcmp(kind, "hang") == 0)
        faults->hang_at = number;
    else if (strcmp(kind, "progress") == 0)
        faults->in_progress = number;
    else if (strcmp(kind, "async") == 0) {
        faults->async_at = number;
        faults->async_code = code ? (ncclResult_t)code : ncclRemoteError;
    } else
        return false;
    return number > 0;
}

static bool parse(const char *item, int rank, Faults *faults) {
    char kind[16], rest;
    unsigned long number = 0;
    int named, code = 0;
    Faults ignored;
    int fields = sscanf(item, "%15[a-z-]:%d:%lu:%d%c", kind, &named, &number, &code, &rest);
    if (fields < 2 || fields > 4 || named < 0)
        return false;
    if (fields == 4 && (strcmp(kind, "async") != 0 || code < 1 || code > 6))
        return false;
    faults = named == rank ? faults : &ignored;
    if (fields == 2 && strcmp(kind, "hang-init") == 0)
        return faults->hang_init = true;
    if (fields == 2 && strcmp(kind, "fail-init") == 0)
        return faults->fail_init = true;
    return fields >= 3 && take(kind, number, code, faults);
}

static ncclResult_t read_text(const char *text, int rank, Faults *faults) {
    ncclResult_t result = ncclSuccess;
    char *copy = strdup(text), *rest = NULL;
    memset(faults, 0, sizeof *faults);
    for (char *item = strtok_r(copy, ",", &rest); item && !result;
         item = strtok_r(NULL, ",", &rest))
        if (!parse(item, rank, faults))
            result =
                refuse(ncclInvalidArgument, "'%s' is not an injected fault (see faults.c)", item);
    free(copy);
    return result;
}

ncclResult_t faults_read(int rank, Faults *faults) {
    pthread_mutex_lock(&lock);
    const char *environment = getenv("NCCL_STUB_FAULTS");
    const char *text = at_run_time ? at_run_time : environment ? environment : "";
    ncclResult_t result = read_text(text, rank, faults);
    pthread_mutex_unlock(&lock);
    return result;
}

static void tell(Comm *comm) {
    pthread_mutex_lock(&comm->lock);
    if (faults_read(comm->rank, &comm->faults) == ncclSuccess)
        comm->operations = 0;
    pthread_mutex_unlock(&comm->lock);
}

/* Sets the faults of this process's communicators, those that there are and those to come, and
 * counts operations from here; NULL is the environment's list again. */
EXPORT int nccl_stub_faults(const char *text) {
    Faults ignored;
    ncclResult_t result = read_text(text ? text : "", -1, &ignored);
    if (result)
        return result;
    pthread_mutex_lock(&lock);
    free(at_run_time);
    at_run_time = text ? strdup(text) : NULL;
    pthread_mutex_unlock(&lock);
    Comm *comm;
    for (uint64_t index = 1; (comm = comm_at(index)); index++)
        tell(comm);
    return ncclSuccess;
}
