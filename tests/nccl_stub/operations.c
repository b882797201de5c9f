/* Operations as state machines: each call does what can be done without waiting.
 *
 * A collective goes through numbered steps. In each, a rank puts its chunk into its slot and says that it
 * has arrived; when all have arrived it takes its result from the slots. There are two slots, for even
 * and odd steps: who has taken a step knows that all have arrived there, and so have taken the step
 * before, whose slots the next step needs.
 * A message goes through the mailbox of its pair of ranks, and is sent only when all of it was
 * taken: as on a GPU, two ranks that send to each other first, outside a group, wait for ever. */

#include "stub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const FUNCTIONS[] = {"AllReduce",     "Reduce", "Broadcast", "AllGather",
                                        "ReduceScatter", "Send",   "Recv",      "CommSplit"};

void call_describe(const Call *call, char *text, size_t bytes) {
    const char *name = FUNCTIONS[call->function];
    unsigned long long count = call->count;
    char extra[32] = "";
    if (call->function == SPLIT) {
        snprintf(text, bytes, "%s", name);
        return;
    }
    if (call->function == SEND || call->function == RECV)
        snprintf(extra, sizeof extra, ", %s %d", call->function == SEND ? "to" : "from",
                 call->root);
    else if (call->root >= 0)
        snprintf(extra, sizeof extra, ", root %d", call->root);
    const char *comma = call->reduction >= 0 ? ", " : "";
    const char *reduction = call->reduction >= 0 ? reduction_name(call->reduction) : "";
    snprintf(text, bytes, "%s(count %llu, %s%s%s%s)", name, count, dtype_name(call->dtype), comma,
             reduction, extra);
}

static bool call_equal(const Call *a, const Call *b) {
    return a->function == b->function && a->dtype == b->dtype && a->reduction == b->reduction &&
           a->root == b->root && a->count == b->count;
}

static void fail_all(Comm *comm, const char *what, uint64_t number, int a, const Call *by_a, int b,
                     const Call *by_b) {
    char text[TEXT_BYTES], first[128], second[128];
    call_describe(by_a, first, sizeof first);
    call_describe(by_b, second, sizeof second);
    snprintf(text, sizeof text, "%s %llu: rank %d issued %s, rank %d issued %s", what,
             (unsigned long long)number, a, first, b, second);
    segment_fail(comm->segment, ncclInvalidUsage, text);
}

/* Collectives */

static bool all_have_arrived(const Comm *comm, uint64_t step) {
    for (int rank = 0; rank < comm->size; rank++) {
        RankCell *cell = &comm->segment->ranks[rank];
        if (atomic_load_explicit(&cell->arrived, memory_order_acquire) < step)
            return false;
    }
    return true;
}

/* Called when all have arrived, and so have finished what came before: a difference fails no earlier
 * operation, and the text is the same in each run. */
static bool same_calls(Comm *comm, uint64_t step) {
    const RankCell *cells = comm->segment->ranks;
    const Call *first = &cells[0].calls[step % 2];
    for (int rank = 1; rank < comm->size; rank++) {
        const Call *other = &cells[rank].calls[step % 2];
        if (!call_equal(first, other)) {
            fail_all(comm, "operation", comm->collectives + 1, 0, first, rank, other);
            return false;
        }
    }
    return true;
}

/* Elements of one step; a reduce-scatter's slot holds one piece per receiver. */
static size_t chunk_elements(const Operation *op) {
    size_t bytes = op->call.function == REDUCE_SCATTER ? CHUNK_BYTES / op->comm->size : CHUNK_BYTES;
    return bytes / dtype_bytes(op->call.dtype);
}

static size_t elements_now(const Operation *op, size_t most) {
    size_t left = op->call.count - op->done;
    return left < most ? left : most;
}

static void prepare(const Operation *op, char *to, size_t from_element, size_t count) {
    const Call *call = &op->call;
    if (count) /* without elements the pointer may be NULL */
        reduce_prepare(to, op->send + from_element * dtype_bytes(call->dtype), count, call->dtype,
                       call->reduction, op->comm->size);
}

static void put_chunk(const Operation *op, char *slot, size_t count) {
    const Call *call = &op->call;
    size_t piece = chunk_elements(op) * dtype_bytes(call->dtype);
    if (call->function == BROADCAST && call->root != op->comm->rank)
        return;
    if (call->function != REDUCE_SCATTER)
        prepare(op, slot, op->done, count);
    else
        for (int rank = 0; rank < op->comm->size; rank++)
            prepare(op, slot + rank * piece, rank * call->count + op->done, count);
}

/* All ranks add in the order of the ranks, so all get the same bits. */
static void reduce_slots(const Operation *op, uint64_t step, size_t offset, size_t count) {
    const Call *call = &op->call;
    Comm *comm = op->comm;
    size_t bytes = dtype_bytes(call->dtype);
    char *to = op->recv + op->done * bytes;
    memcpy(to, segment_slot(comm->segment, step, 0) + offset, count * bytes);
    for (int rank = 1; rank < comm->size; rank++)
        reduce_combine(to, segment_slot(comm->segment, step, rank) + offset, count, call->dtype,
                       call->reduction);
    reduce_finish(to, count, call->dtype, call->reduction, comm->size);
}

static void gather_slots(const Operation *op, uint64_t step, size_t count) {
    size_t bytes = dtype_bytes(op->call.dtype);
    for (int rank = 0; rank < op->comm->size; rank++)
        memcpy(op->recv + (rank * op->call.count + op->done) * bytes,
               segment_slot(op->comm->segment, step, rank), count * bytes);
}

static void take_chunk(const Operation *op, uint64_t step, size_t count) {
    const Call *call = &op->call;
    Comm *comm = op->comm;
    size_t bytes = dtype_bytes(call->dtype);
    if (count == 0)
        return;
    if (call->function == ALL_REDUCE || (call->function == REDUCE && call->root == comm->rank))
        reduce_slots(op, step, 0, count);
    else if (call->function == REDUCE_SCATTER)
        reduce_slots(op, step, comm->rank * chunk_elements(op) * bytes, count);
    else if (call->function == ALL_GATHER)
        gather_slots(op, step, count);
    else if (call->function == BROADCAST)
        memcpy(op->recv + op->done * bytes, segment_slot(comm->segment, step, call->root),
               count * bytes);
}

/* A split is a collective of two steps: colors and keys, then the unique ids that the new groups'
 * first ranks have made. */

typedef struct {
    int color, key;
    ncclUniqueId id;
} Ballot;

static const Ballot *ballot(Comm *comm, uint64_t step, int rank) {
    return (const Ballot *)segment_slot(comm->segment, step, rank);
}

static ncclResult_t put_ballot(Operation *op, char *slot) {
    Split *split = op->split;
    Ballot mine = {.color = split->color, .key = split->key};
    if (op->done == 1 && split->leader == op->comm->rank) {
        ncclResult_t result = segment_create(&split->id);
        if (result)
            return result;
        mine.id = split->id;
    }
    memcpy(slot, &mine, sizeof mine);
    return ncclSuccess;
}

static void count_votes(Operation *op, uint64_t step) {
    Split *split = op->split;
    split->leader = -1;
    for (int rank = 0; rank < op->comm->size && split->color >= 0; rank++) {
        const Ballot *vote = ballot(op->comm, step, rank);
        if (vote->color != split->color)
            continue;
        split->size++;
        split->rank += vote->key < split->key || (vote->key == split->key && rank < op->comm->rank);
        if (split->leader < 0 || vote->key < ballot(op->comm, step, split->leader)->key)
            split->leader = rank;
    }
}

static ncclResult_t take_votes(Operation *op, uint64_t step) {
    Split *split = op->split;
    if (op->done == 0)
        count_votes(op, step);
    else if (split->leader >= 0)
        return comm_create(&split->child, &ballot(op->comm, step, split->leader)->id, split->size,
                           split->rank, op->comm->device, false);
    return ncclSuccess;
}

static bool join_child(Operation *op) {
    Split *split = op->split;
    ncclResult_t result = split->child ? comm_poll_init(split->child) : ncclSuccess;
    if (result == ncclInProgress)
        return false;
    if (result)
        comm_fail(op->comm, result, "CommSplit: the new communicator failed");
    else
        *split->out = split->child;
    split->child = NULL;
    op->phase = FINISHED;
    return true;
}

/* Two phases of a collective; each returns whether it has got on. */

static bool put(Operation *op) {
    Comm *comm = op->comm;
    RankCell *mine = &comm->segment->ranks[comm->rank];
    uint64_t step = comm->step + 1;
    char *slot = segment_slot(comm->segment, step, comm->rank);
    if (op->split) {
        ncclResult_t result = put_ballot(op, slot);
        if (result)
            comm_fail(comm, result, "CommSplit: no shared memory");
    } else
        put_chunk(op, slot, elements_now(op, chunk_elements(op)));
    mine->calls[step % 2] = op->call;
    atomic_store_explicit(&mine->arrived, step, memory_order_release);
    op->phase = TAKE;
    return true;
}

static bool take(Operation *op) {
    Comm *comm = op->comm;
    uint64_t step = comm->step + 1;
    if (!all_have_arrived(comm, step) || !same_calls(comm, step))
        return false;
    size_t count = op->split ? 1 : elements_now(op, chunk_elements(op));
    if (op->split) {
        ncclResult_t result = take_votes(op, step);
        if (result)
            comm_fail(comm, result, "CommSplit: the new communicator cannot be made");
    } else
        take_chunk(op, step, count);
    comm->step = step;
    op->done += count;
    bool finished = op->done >= (op->split ? 2 : op->call.count);
    op->phase = !finished ? PUT : op->split ? JOIN : FINISHED;
    comm->collectives += finished;
    return true;
}

/* Messages */

static bool send_chunk(Operation *op) {
    char *data;
    Mailbox *box = segment_mailbox(op->comm->segment, op->comm->rank, op->call.root, &data);
    size_t bytes = dtype_bytes(op->call.dtype), now = elements_now(op, MAILBOX_BYTES / bytes);
    unsigned long long put = atomic_load_explicit(&box->put, memory_order_relaxed);
    if (atomic_load_explicit(&box->taken, memory_order_acquire) != put)
        return false;
    if (op->phase == TAKE) { /* what lay in the box was taken */
        op->done += now;
        op->phase = op->done >= op->call.count ? FINISHED : PUT;
        return true;
    }
    if (now)
        memcpy(data, op->send + op->done * bytes, now * bytes);
    box->call = op->call;
    atomic_store_explicit(&box->put, put + 1, memory_order_release);
    op->phase = TAKE;
    return true;
}

static bool receive_chunk(Operation *op) {
    char *data;
    Comm *comm = op->comm;
    Mailbox *box = segment_mailbox(comm->segment, op->call.root, comm->rank, &data);
    size_t bytes = dtype_bytes(op->call.dtype), now = elements_now(op, MAILBOX_BYTES / bytes);
    unsigned long long taken = atomic_load_explicit(&box->taken, memory_order_relaxed);
    if (atomic_load_explicit(&box->put, memory_order_acquire) == taken)
        return false;
    if (box->call.count != op->call.count || box->call.dtype != op->call.dtype) {
        fail_all(comm, "message at step", taken + 1, op->call.root, &box->call, comm->rank,
                 &op->call);
        return false;
    }
    if (now)
        memcpy(op->recv + op->done * bytes, data, now * bytes);
    atomic_store_explicit(&box->taken, taken + 1, memory_order_release);
    op->done += now;
    op->phase = op->done >= op->call.count ? FINISHED : PUT;
    return true;
}

/* Batches */

static bool is_message(const Operation *op) {
    return op->call.function == SEND || op->call.function == RECV;
}

static bool get_on(Operation *op) {
    if (op->hangs)
        return false;
    if (op->fault) {
        comm_fail(op->comm, op->fault, "injected fault: async error %d", (int)op->fault);
        return false;
    }
    if (is_message(op))
        return op->call.function == SEND ? send_chunk(op) : receive_chunk(op);
    return op->phase == PUT ? put(op) : op->phase == TAKE ? take(op) : join_child(op);
}

/* Collectives of a group run one after the other, its messages all at once, but those of one pair
 * of ranks and one direction in their order. */
static bool must_wait(const Batch *batch, const Operation *op) {
    for (const Operation *earlier = batch->first; earlier != op; earlier = earlier->next) {
        if (earlier->phase == FINISHED || is_message(earlier) != is_message(op))
            continue;
        if (!is_message(op) ||
            (earlier->call.function == op->call.function && earlier->call.root == op->call.root))
            return true;
    }
    return false;
}

/* Does all that can be done now; whether the batch is finished. */
static bool batch_run(Comm *comm, Batch *batch) {
    bool progress = true, finished = false;
    while (progress && !finished && !comm_failure(comm)) {
        progress = false;
        finished = true;
        for (Operation *op = batch->first; op && !comm_failure(comm); op = op->next) {
            if (op->phase != FINISHED && !must_wait(batch, op))
                progress |= get_on(op);
            finished &= op->phase == FINISHED;
        }
    }
    return finished && !comm_failure(comm);
}

static void split_free(Split *split) {
    if (split && split->child) { /* joined, but its parent has failed */
        pthread_mutex_lock(&split->child->lock);
        comm_leave(split->child, ncclInternalError);
        pthread_mutex_unlock(&split->child->lock);
    }
    free(split);
}

void batch_free(Batch *batch) {
    for (Operation *op = batch->first, *next; op; op = next) {
        next = op->next;
        split_free(op->split);
        free(op);
    }
    free(batch->siblings);
    free(batch);
}

ncclResult_t comm_advance(Comm *comm, uint64_t upto) {
    while (comm->finished < upto) {
        if (comm_failure(comm))
            return comm->failure;
        Batch *batch = comm->queue;
        if (!batch_run(comm, batch))
            return comm_failure(comm) ? comm->failure : ncclInProgress;
        comm->queue = batch->next;
        comm->finished = batch->number;
        batch_free(batch);
    }
    return ncclSuccess;
}
