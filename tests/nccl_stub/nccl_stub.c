/* A stand-in for libnccl.so.2, for tests without a GPU: NCCL's functions on host memory, between
 * processes and threads of one machine, with checks that NCCL does not make and faults to order.
 *
 * This file takes the calls: single ones, groups, and the tickets of lazy execution. A single call
 * is a group of one. At the end of a group its operations become one batch per communicator.
 * Without a callback the batches run to their end in the call; with one, the caller of
 * nccl_stub_try drives them. */

#define _GNU_SOURCE
#include "stub.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { /* something to be waited for: the start of a communicator, or its batches up to a
                    number */
    Comm *comm;
    Comm **starts; /* where the handle lies that a failure takes back; NULL for batches */
    uint64_t upto;
    ncclResult_t result;
} Wait;

static _Thread_local struct {
    int depth;
    ncclResult_t error; /* the first in the group, which takes the whole group back */
    Operation *first;
    Wait *waits;
    size_t wait_count;
} group;

static _Thread_local int current_device;
static void (*_Atomic on_enqueue)(void *stream, unsigned long long ticket);

EXPORT void nccl_stub_on_enqueue(void (*callback)(void *stream, unsigned long long ticket)) {
    atomic_store(&on_enqueue, callback);
}

EXPORT void nccl_stub_set_device(int device) { current_device = device; }

/* Waiting */

static void wait_add(Comm *comm, Comm **starts, uint64_t upto) {
    group.waits = realloc(group.waits, (group.wait_count + 1) * sizeof *group.waits);
    group.waits[group.wait_count++] =
        (Wait){.comm = comm, .starts = starts, .upto = upto, .result = ncclInProgress};
}

static void wait_poll(Wait *wait) {
    Comm *comm = wait->comm;
    if (wait->starts) {
        wait->result = comm_poll_init(comm);
        if (wait->result && wait->result != ncclInProgress)
            *wait->starts = NULL;
        return;
    }
    pthread_mutex_lock(&comm->lock);
    wait->result = comm_advance(comm, wait->upto);
    pthread_mutex_unlock(&comm->lock);
}

static void back_off(int rounds) {
    struct timespec pause = {.tv_nsec = 50000};
    if (rounds < 100)
        sched_yield();
    else
        nanosleep(&pause, NULL);
}

/* Until all are done or have failed; an abort from another thread makes one fail. The first
 * failure. */
static ncclResult_t wait_all(void) {
    ncclResult_t result = ncclSuccess;
    Wait *waits = group.waits;
    size_t count = group.wait_count, left = count;
    group.waits = NULL;
    group.wait_count = 0;
    for (int rounds = 0; left; rounds++) {
        left = 0;
        for (size_t i = 0; i < count; i++) {
            if (waits[i].result == ncclInProgress)
                wait_poll(&waits[i]);
            left += waits[i].result == ncclInProgress;
        }
        if (left)
            back_off(rounds);
    }
    for (size_t i = 0; i < count && !result; i++)
        result = waits[i].result;
    free(waits);
    return result;
}

/* Groups */

typedef struct { /* a batch that was handed over: another thread may finish and free it at any time
                  */
    Comm *comm;
    Batch *batch;
    uint64_t number;
    bool blocks; /* a split has no ticket */
    cudaStream_t *streams;
    size_t stream_count;
} Entry;

/* A ticket is the communicator's number and the batch's, so that finished batches need not be kept.
 */
enum { TICKET_BITS = 40 };

static Operation *take_operations_of(Comm *comm) {
    Operation *taken = NULL, **end = &taken, *kept = NULL, **kept_end = &kept;
    for (Operation *op = group.first, *next; op; op = next) {
        next = op->next;
        op->next = NULL;
        Operation ***tail = op->comm == comm ? &end : &kept_end;
        **tail = op;
        *tail = &op->next;
    }
    group.first = kept;
    return taken;
}

static ncclResult_t check_self_messages(void) {
    for (const Operation *op = group.first; op; op = op->next) {
        int balance = 0;
        for (const Operation *other = group.first; other; other = other->next)
            if (other->comm == op->comm && other->call.root == op->comm->rank)
                balance += (other->call.function == SEND) - (other->call.function == RECV);
        if (balance)
            return refuse(ncclInvalidUsage,
                          "a rank's send to itself and its receive belong in one group");
    }
    return ncclSuccess;
}

static uint64_t ticket_of(const Entry *entry) {
    return entry->comm->index << TICKET_BITS | entry->number;
}

static bool has_stream(const Entry *entry, cudaStream_t stream) {
    for (size_t i = 0; i < entry->stream_count; i++)
        if (entry->streams[i] == stream)
            return true;
    return false;
}

static Entry describe(Comm *comm, const Operation *first) {
    size_t count = 0;
    for (const Operation *op = first; op; op = op->next)
        count++;
    Entry entry = {
        .comm = comm, .blocks = first->split, .streams = calloc(count, sizeof(cudaStream_t))};
    for (const Operation *op = first; op; op = op->next)
        if (!has_stream(&entry, op->stream))
            entry.streams[entry.stream_count++] = op->stream;
    return entry;
}

static Entry enqueue(Comm *comm, Operation *first) {
    Entry entry = describe(comm, first);
    Batch *batch = entry.batch = calloc(1, sizeof *batch);
    batch->first = first;
    pthread_mutex_lock(&comm->lock);
    entry.number = batch->number = ++comm->issued;
    if (comm->queue)
        comm->last->next = batch;
    else
        comm->queue = batch;
    comm->last = batch;
    pthread_mutex_unlock(&comm->lock);
    return entry;
}

/* A group's operations on one stream but several communicators get on together, as the ranks may
 * have named the communicators in different orders. Those on another stream do not: that stream may
 * not be there yet. */
static void make_siblings(const Entry *entry, const Entry *entries, size_t count) {
    uint64_t *tickets = calloc(count, sizeof *tickets);
    int found = 0;
    for (size_t i = 0; i < count; i++)
        if (entries + i != entry && has_stream(&entries[i], entry->streams[0]))
            tickets[found++] = ticket_of(&entries[i]);
    pthread_mutex_lock(&entry->comm->lock);
    if (entry->comm->state != GONE && entry->number > entry->comm->finished) {
        entry->batch->siblings = tickets;
        entry->batch->sibling_count = found;
        tickets = NULL;
    }
    pthread_mutex_unlock(&entry->comm->lock);
    free(tickets);
}

static void issue_entries(const Entry *entries, size_t count) {
    void (*callback)(void *, unsigned long long) = atomic_load(&on_enqueue);
    for (size_t i = 0; i < count && callback && count > 1; i++)
        make_siblings(&entries[i], entries, count);
    for (const Entry *entry = entries; entry < entries + count; entry++)
        if (!callback || entry->blocks)
            wait_add(entry->comm, NULL, entry->number);
        else
            for (size_t i = 0; i < entry->stream_count; i++)
                callback(entry->streams[i], ticket_of(entry));
}

static void drop_operations(void) {
    Batch *batch = calloc(1, sizeof *batch);
    batch->first = group.first;
    group.first = NULL;
    batch_free(batch);
}

/* The starts in a group with a mistake: the ranks that are missing will not come. */
static void drop_starts(void) {
    for (size_t i = 0; i < group.wait_count; i++) {
        Wait *wait = &group.waits[i];
        pthread_mutex_lock(&wait->comm->lock);
        comm_leave(wait->comm, ncclInternalError);
        pthread_mutex_unlock(&wait->comm->lock);
        *wait->starts = NULL;
    }
    group.wait_count = 0;
}

static ncclResult_t flush(void) {
    Entry *entries = NULL;
    size_t count = 0;
    ncclResult_t error = group.error ? group.error : check_self_messages();
    group.error = ncclSuccess;
    if (error) {
        drop_operations();
        drop_starts();
    }
    while (group.first) {
        Comm *comm = group.first->comm;
        entries = realloc(entries, (count + 1) * sizeof *entries);
        entries[count++] = enqueue(comm, take_operations_of(comm));
    }
    issue_entries(entries, count);
    for (size_t i = 0; i < count; i++)
        free(entries[i].streams);
    free(entries);
    ncclResult_t result = wait_all();
    return error ? error : result;
}

EXPORT ncclResult_t ncclGroupStart(void) {
    group.depth++;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGroupEnd(void) {
    if (group.depth == 0)
        return refuse(ncclInvalidUsage, "GroupEnd without GroupStart");
    return --group.depth ? ncclSuccess : flush();
}

/* Whatever may stand in a group is a group of its own outside one. */
static ncclResult_t group_leave(ncclResult_t result) {
    if (result && !group.error)
        group.error = result;
    ncclResult_t end = ncclGroupEnd();
    return result ? result : end;
}

/* Tickets */

static ncclResult_t advance(uint64_t ticket, uint64_t **siblings, int *count) {
    Comm *comm = comm_at(ticket >> TICKET_BITS);
    uint64_t number = ticket & (((uint64_t)1 << TICKET_BITS) - 1);
    if (!comm)
        return refuse(ncclInvalidArgument, "ticket %llu is unknown", (unsigned long long)ticket);
    pthread_mutex_lock(&comm->lock);
    ncclResult_t result = number > comm->issued ? ncclInvalidArgument : comm_advance(comm, number);
    Batch *batch = comm->queue;
    if (siblings && result == ncclInProgress && batch->number == number && batch->sibling_count) {
        *count = batch->sibling_count;
        *siblings = calloc(*count, sizeof **siblings);
        memcpy(*siblings, batch->siblings, *count * sizeof **siblings);
    }
    pthread_mutex_unlock(&comm->lock);
    return result;
}

/* 1: done, 0: not yet, -n: failed with ncclResult_t n. */
EXPORT int nccl_stub_try(unsigned long long ticket) {
    uint64_t *siblings = NULL;
    int count = 0;
    ncclResult_t result = advance(ticket, &siblings, &count);
    for (int i = 0; i < count; i++)
        advance(siblings[i], NULL, NULL);
    free(siblings);
    return result == ncclSuccess ? 1 : result == ncclInProgress ? 0 : -(int)result;
}

/* Operations */

static ncclResult_t check_call(const Comm *comm, const char *function, const Operation *op) {
    const Call *call = &op->call;
    int f = call->function;
    bool rooted = f == REDUCE || f == BROADCAST || f == SEND || f == RECV;
    bool sends = f != RECV && !(f == BROADCAST && call->root != comm->rank);
    bool receives = f != SEND && !(f == REDUCE && call->root != comm->rank);
    if (dtype_bytes(call->dtype) == 0)
        return refuse(ncclInvalidArgument, "%s: data type %d is unknown", function, call->dtype);
    if ((f == ALL_REDUCE || f == REDUCE || f == REDUCE_SCATTER) &&
        (call->reduction < 0 || call->reduction >= REDUCTIONS))
        return refuse(ncclInvalidArgument, "%s: reduction %d is unknown", function,
                      call->reduction);
    if (rooted && (call->root < 0 || call->root >= comm->size))
        return refuse(ncclInvalidArgument, "%s: root or peer %d is not a rank of 0..%d", function,
                      call->root, comm->size - 1);
    if (call->count && ((sends && !op->send) || (receives && !op->recv)))
        return refuse(ncclInvalidArgument, "%s: an array is NULL", function);
    return ncclSuccess;
}

static ncclResult_t check_state(Comm *comm, const char *function) {
    if (comm_failure(comm))
        return refuse(comm->failure, "%s: the communicator has failed before", function);
    if (comm->state != READY)
        return refuse(ncclInvalidUsage, "%s: the communicator is %s", function,
                      comm->state == JOINING ? "not ready" : "finalized");
    return ncclSuccess;
}

static ncclResult_t strike(Comm *comm, Operation *op) {
    unsigned long number = ++comm->operations;
    const Faults *faults = &comm->faults;
    op->hangs = number == faults->hang_at;
    op->fault = number == faults->async_at ? faults->async_code : ncclSuccess;
    if (number != faults->fail_at)
        return ncclSuccess;
    complain("operation %lu of rank %d fails (injected fault)", number, comm->rank);
    return ncclSystemError;
}

static void append(const Operation *op) {
    Operation *copy = malloc(sizeof *copy), **end = &group.first;
    *copy = *op;
    while (*end)
        end = &(*end)->next;
    *end = copy;
}

static ncclResult_t add(Operation op, const char *function) {
    ncclResult_t result = comm_check(op.comm, function);
    if (!result)
        result = check_call(op.comm, function, &op);
    if (result)
        return result;
    pthread_mutex_lock(&op.comm->lock);
    result = check_state(op.comm, function);
    if (!result)
        result = strike(op.comm, &op);
    pthread_mutex_unlock(&op.comm->lock);
    if (!result)
        append(&op);
    return result;
}

static ncclResult_t issue(Operation op, const char *function) {
    ncclGroupStart();
    return group_leave(add(op, function));
}

#define CALL(FUNCTION, REDUCTION, ROOT) \
    .comm = comm, .stream = stream,     \
    .call = {.function = FUNCTION,      \
             .count = count,            \
             .dtype = dtype,            \
             .reduction = REDUCTION,    \
             .root = ROOT}

EXPORT ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, int dtype,
                                  int reduction, ncclComm_t comm, cudaStream_t stream) {
    return issue((Operation){.send = send, .recv = recv, CALL(ALL_REDUCE, reduction, -1)},
                 "AllReduce");
}

EXPORT ncclResult_t ncclReduce(const void *send, void *recv, size_t count, int dtype, int reduction,
                               int root, ncclComm_t comm, cudaStream_t stream) {
    return issue((Operation){.send = send, .recv = recv, CALL(REDUCE, reduction, root)}, "Reduce");
}

EXPORT ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, int dtype, int root,
                                  ncclComm_t comm, cudaStream_t stream) {
    return issue((Operation){.send = send, .recv = recv, CALL(BROADCAST, -1, root)}, "Broadcast");
}

EXPORT ncclResult_t ncclBcast(void *buffer, size_t count, int dtype, int root, ncclComm_t comm,
                              cudaStream_t stream) {
    return ncclBroadcast(buffer, buffer, count, dtype, root, comm, stream);
}

EXPORT ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, int dtype,
                                  ncclComm_t comm, cudaStream_t stream) {
    return issue((Operation){.send = send, .recv = recv, CALL(ALL_GATHER, -1, -1)}, "AllGather");
}

EXPORT ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, int dtype,
                                      int reduction, ncclComm_t comm, cudaStream_t stream) {
    return issue((Operation){.send = send, .recv = recv, CALL(REDUCE_SCATTER, reduction, -1)},
                 "ReduceScatter");
}

EXPORT ncclResult_t ncclSend(const void *send, size_t count, int dtype, int peer, ncclComm_t comm,
                             cudaStream_t stream) {
    return issue((Operation){.send = send, CALL(SEND, -1, peer)}, "Send");
}

EXPORT ncclResult_t ncclRecv(void *recv, size_t count, int dtype, int peer, ncclComm_t comm,
                             cudaStream_t stream) {
    return issue((Operation){.recv = recv, CALL(RECV, -1, peer)}, "Recv");
}

/* Communicators, which may be made in groups, too */

static ncclResult_t check_config(const ncclConfig_t *config) {
    if (config && config->blocking == 0)
        return refuse(ncclInvalidUsage, "the stand-in has no communicators with blocking=0");
    return ncclSuccess;
}

static ncclResult_t start(Comm **out, const ncclUniqueId *id, int size, int rank, int device) {
    if (!out)
        return refuse(ncclInvalidArgument, "CommInitRank: comm is NULL");
    *out = NULL;
    if (size < 1 || size > MAX_RANKS || rank < 0 || rank >= size)
        return refuse(ncclInvalidArgument,
                      "CommInitRank: rank %d of %d (the stand-in takes up to %d ranks)", rank, size,
                      MAX_RANKS);
    ncclResult_t result = comm_create(out, id, size, rank, device, true);
    if (!result)
        wait_add(*out, out, 0);
    return result;
}

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank,
                                           ncclConfig_t *config) {
    ncclGroupStart();
    ncclResult_t result = check_config(config);
    return group_leave(result ? result : start(comm, &id, size, rank, current_device));
}

EXPORT ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(comm, size, id, rank, NULL);
}

EXPORT ncclResult_t ncclCommInitAll(ncclComm_t *comms, int size, const int *devices) {
    ncclUniqueId id;
    ncclResult_t result = ncclGetUniqueId(&id);
    if (result)
        return result;
    if (!comms || size < 1 || size > MAX_RANKS)
        return refuse(ncclInvalidArgument, "CommInitAll: %d devices (the stand-in takes up to %d)",
                      size, MAX_RANKS);
    ncclGroupStart();
    for (int rank = 0; rank < size && !result; rank++)
        result = start(&comms[rank], &id, size, rank, devices ? devices[rank] : rank);
    return group_leave(result);
}

/* What is outstanding on one rank only would leave the others waiting, so it is told to all. */
static ncclResult_t check_quiet(Comm *comm) {
    char text[TEXT_BYTES];
    for (const Operation *op = group.first; op; op = op->next)
        if (op->comm == comm)
            return refuse(ncclInvalidUsage,
                          "CommSplit in one group with operations of its communicator");
    if (comm->issued == comm->finished)
        return ncclSuccess;
    snprintf(text, sizeof text,
             "CommSplit with %llu operations outstanding on rank %d: wait for their streams first",
             (unsigned long long)(comm->issued - comm->finished), comm->rank);
    segment_fail(comm->segment, ncclInvalidUsage, text);
    return comm_failure(comm);
}

static ncclResult_t add_split(Comm *comm, int color, int key, Comm **out) {
    ncclResult_t result = comm_check(comm, "CommSplit");
    if (result)
        return result;
    if (!out || color < -1)
        return refuse(ncclInvalidArgument, "CommSplit: color %d, newcomm %p", color, (void *)out);
    *out = NULL;
    pthread_mutex_lock(&comm->lock);
    result = check_state(comm, "CommSplit");
    if (!result)
        result = check_quiet(comm);
    pthread_mutex_unlock(&comm->lock);
    if (result)
        return result;
    Split *split = calloc(1, sizeof *split);
    *split = (Split){.color = color, .key = key, .out = out};
    append(&(Operation){.comm = comm,
                        .split = split,
                        .call = {.function = SPLIT, .dtype = -1, .reduction = -1, .root = -1}});
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *out,
                                  ncclConfig_t *config) {
    ncclGroupStart();
    ncclResult_t result = check_config(config);
    return group_leave(result ? result : add_split(comm, color, key, out));
}
