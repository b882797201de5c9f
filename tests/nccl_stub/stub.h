/* What the files of the stand-in for libnccl share. NCCL's names and numbers are those of nccl.h.
 */

#ifndef STUB_H
#define STUB_H

#include <pthread.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    MAX_RANKS = 64,          /* of one communicator; bounds the tables below */
    CHUNK_BYTES = 1 << 18,   /* of one rank's contribution to one step of a collective */
    MAILBOX_BYTES = 1 << 16, /* of one step of a message */
    TEXT_BYTES = 512,
    NONCE_BYTES = 16,
};

typedef enum {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7,
} ncclResult_t;

enum { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4, REDUCTIONS = 5 };

typedef struct ncclComm *ncclComm_t;
typedef struct ncclComm Comm;
typedef void *cudaStream_t;
typedef struct {
    char internal[128];
} ncclUniqueId;

/* The first fields of ncclConfig_t, which has grown since but keeps them. */
typedef struct {
    size_t size;
    unsigned int magic;
    unsigned int version;
    int blocking;
} ncclConfig_t;

/* reduce.c: arithmetic. An average multiplies a float by 1/n before the sum and divides an integer
 * after it, as NCCL does. */
size_t dtype_bytes(int dtype); /* 0: unknown */
const char *dtype_name(int dtype);
const char *reduction_name(int reduction);
void reduce_prepare(void *to, const void *from, size_t count, int dtype, int reduction, int ranks);
void reduce_combine(void *to, const void *from, size_t count, int dtype, int reduction);
void reduce_finish(void *to, size_t count, int dtype, int reduction, int ranks);

/* segment.c: the memory that the ranks of one communicator share. */
typedef enum {
    ALL_REDUCE,
    REDUCE,
    BROADCAST,
    ALL_GATHER,
    REDUCE_SCATTER,
    SEND,
    RECV,
    SPLIT
} Function;

typedef struct { /* what all ranks must have issued alike; -1 where a function has no such argument
                  */
    int32_t function;
    int32_t dtype;
    int32_t reduction;
    int32_t root; /* or the peer of a message */
    uint64_t count;
} Call;

typedef struct {
    alignas(64) atomic_ullong arrived; /* steps whose contribution was put into this rank's slots */
    atomic_bool joined;
    int device;
    Call calls[2]; /* of an even and an odd step: a rank may be one step ahead of the slowest */
} RankCell;

typedef struct {
    alignas(64) atomic_ullong put;
    atomic_ullong taken;
    Call call;
} Mailbox;

typedef struct {
    char nonce[NONCE_BYTES];
    atomic_int size; /* ranks, 0 until the first has joined */
    atomic_int joined;
    atomic_bool closed; /* the process that made the segment has closed its descriptor */
    atomic_int failure; /* an ncclResult_t for all ranks; -1 while its text is being written */
    char text[TEXT_BYTES];
    RankCell ranks[MAX_RANKS];
} Segment;

ncclResult_t segment_create(ncclUniqueId *id);
ncclResult_t segment_map(const ncclUniqueId *id, int size, Segment **segment);
void segment_close_descriptor(Segment *segment, const ncclUniqueId *id);
void segment_unmap(Segment *segment);
char *segment_slot(Segment *segment, uint64_t step, int rank);
Mailbox *segment_mailbox(Segment *segment, int from, int to, char **data);
void segment_fail(Segment *segment, ncclResult_t code, const char *text);

/* faults.c: what NCCL_STUB_FAULTS asks of one rank; an operation number of 0 means never. */
typedef struct {
    unsigned long fail_at, async_at, hang_at;
    ncclResult_t async_code;
    bool hang_init, fail_init;
    unsigned long in_progress;
} Faults;

ncclResult_t faults_read(int rank,
                         Faults *faults); /* those set at run time, else the environment's */

/* communicator.c */
typedef struct { /* the rest of an operation that is a CommSplit */
    int color, key;
    Comm **out;
    ncclUniqueId id;
    int rank, size, leader;
    Comm *child;
} Split;

typedef enum { PUT, TAKE, JOIN, FINISHED } Phase;

typedef struct Operation {
    Comm *comm;
    Call call;
    const char *send;
    char *recv;
    cudaStream_t stream;
    size_t done; /* elements; for a split, steps */
    Phase phase;
    bool hangs;
    ncclResult_t fault;
    Split *split;
    struct Operation *next;
} Operation;

typedef struct Batch { /* the operations of one group on one communicator; they start together */
    Operation *first;
    uint64_t number;
    uint64_t *siblings; /* tickets of the group's other communicators on the same stream */
    int sibling_count;
    struct Batch *next;
} Batch;

typedef enum { JOINING, READY, FINALIZED, GONE } State;

struct ncclComm {
    uint64_t index;
    int rank, size, device;
    ncclUniqueId id;
    pthread_mutex_t lock; /* of all that follows; never held while something is waited for */
    State state;
    Segment *segment; /* NULL once gone */
    ncclResult_t failure;
    uint64_t step;             /* of collectives, finished */
    uint64_t collectives;      /* finished */
    uint64_t issued, finished; /* batches */
    Batch *queue, *last;
    Faults faults;
    unsigned long operations; /* counted for faults */
};

ncclResult_t refuse(ncclResult_t code, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
ncclResult_t ncclGetUniqueId(ncclUniqueId *id);
ncclResult_t comm_check(Comm *comm, const char *function);
ncclResult_t comm_create(Comm **out, const ncclUniqueId *id, int size, int rank, int device,
                         bool init);
ncclResult_t comm_poll_init(Comm *comm); /* ncclInProgress until all ranks have joined */
ncclResult_t comm_failure(Comm *comm);   /* locked; takes over what another rank found */
void comm_fail(Comm *comm, ncclResult_t code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void comm_leave(Comm *comm, ncclResult_t code); /* locked */
Comm *comm_at(uint64_t index);

/* operations.c: what a communicator does next, without blocking. All of these are called locked. */
void call_describe(const Call *call, char *text, size_t bytes);
ncclResult_t comm_advance(Comm *comm, uint64_t upto); /* ncclInProgress while there is more to do */
void batch_free(Batch *batch);

#endif
