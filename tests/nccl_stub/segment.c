/* The memory that the ranks of one communicator share.
 *
 * It has no name: the process that makes a unique id makes an unnamed file and writes its own
 * process and descriptor into the id, and the others open that descriptor through /proc. So nothing
 * can be left in /dev/shm, however the ranks end. Its size is bounded, and pages that nobody
 * touches take no memory. */

#define _GNU_SOURCE
#include "stub.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

static const char MAGIC[8] = "nccstub";

static const char USED_UP[] = "the memory behind this unique id is gone: a communicator has used it "
                              "up, or the process that made it has ended";

typedef struct {
    char magic[8];
    char nonce[NONCE_BYTES]; /* tells this segment from another file that got the same descriptor */
    int32_t process;
    int32_t descriptor;
} Id;

static size_t round_up(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

static size_t mailboxes_offset(void) { return round_up(sizeof(Segment)); }

static size_t slots_offset(int size) {
    return mailboxes_offset() + round_up((size_t)size * size * sizeof(Mailbox));
}

static size_t letters_offset(int size) {
    return slots_offset(size) + (size_t)2 * size * CHUNK_BYTES;
}

static size_t total_bytes(int size) {
    return letters_offset(size) + (size_t)size * size * MAILBOX_BYTES;
}

ncclResult_t segment_create(ncclUniqueId *out) {
    Id id = {.process = getpid()};
    memcpy(id.magic, MAGIC, sizeof MAGIC);
    if (getrandom(id.nonce, NONCE_BYTES, 0) != NONCE_BYTES)
        return refuse(ncclSystemError, "no random bytes for a unique id: %m");
    id.descriptor = memfd_create("nccl_stub", MFD_CLOEXEC);
    if (id.descriptor < 0)
        return refuse(ncclSystemError, "no memory file for a unique id: %m");
    if (pwrite(id.descriptor, id.nonce, NONCE_BYTES, offsetof(Segment, nonce)) != NONCE_BYTES) {
        close(id.descriptor);
        return refuse(ncclSystemError, "a unique id's memory file cannot be written: %m");
    }
    memset(out, 0, sizeof *out);
    memcpy(out, &id, sizeof id);
    return ncclSuccess;
}

static ncclResult_t map(int file, const Id *id, int size, Segment **out) {
    struct stat status;
    char nonce[NONCE_BYTES];
    if (pread(file, nonce, NONCE_BYTES, offsetof(Segment, nonce)) != NONCE_BYTES ||
        memcmp(nonce, id->nonce, NONCE_BYTES) != 0)
        return refuse(ncclSystemError, "%s", USED_UP);
    /* It only ever grows, so that a rank with a wrong size cannot take mapped pages away from
     * another. */
    if (fstat(file, &status) != 0 || ((size_t)status.st_size < total_bytes(size) &&
                                      ftruncate(file, (off_t)total_bytes(size)) != 0))
        return refuse(ncclSystemError, "the shared memory cannot grow to %zu bytes: %m",
                      total_bytes(size));
    Segment *segment = mmap(NULL, total_bytes(size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (segment == MAP_FAILED)
        return refuse(ncclSystemError, "the shared memory cannot be mapped: %m");
    int expected = 0;
    if (!atomic_compare_exchange_strong(&segment->size, &expected, size) && expected != size) {
        munmap(segment, total_bytes(size));
        return refuse(ncclInvalidArgument, "nranks is %d here and %d on another rank", size,
                      expected);
    }
    *out = segment;
    return ncclSuccess;
}

ncclResult_t segment_map(const ncclUniqueId *unique_id, int size, Segment **out) {
    Id id;
    char path[64];
    memcpy(&id, unique_id, sizeof id);
    if (memcmp(id.magic, MAGIC, sizeof MAGIC) != 0)
        return refuse(ncclInvalidArgument, "this unique id was not made by ncclGetUniqueId");
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)id.process, (int)id.descriptor);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return refuse(ncclSystemError, "%s (%s: %m)", USED_UP, path);
    ncclResult_t result = map(file, &id, size, out);
    close(file);
    return result;
}

void segment_close_descriptor(Segment *segment, const ncclUniqueId *unique_id) {
    Id id;
    memcpy(&id, unique_id, sizeof id);
    if (id.process == getpid() && !atomic_exchange(&segment->closed, true))
        close(id.descriptor);
}

void segment_unmap(Segment *segment) { munmap(segment, total_bytes(atomic_load(&segment->size))); }

char *segment_slot(Segment *segment, uint64_t step, int rank) {
    int size = atomic_load_explicit(&segment->size, memory_order_relaxed);
    size_t slot = (size_t)(step % 2) * size + rank;
    return (char *)segment + slots_offset(size) + slot * CHUNK_BYTES;
}

Mailbox *segment_mailbox(Segment *segment, int from, int to, char **data) {
    int size = atomic_load_explicit(&segment->size, memory_order_relaxed);
    size_t pair = (size_t)from * size + to;
    *data = (char *)segment + letters_offset(size) + pair * MAILBOX_BYTES;
    return (Mailbox *)((char *)segment + mailboxes_offset()) + pair;
}

void segment_fail(Segment *segment, ncclResult_t code, const char *text) {
    int expected = 0;
    if (!atomic_compare_exchange_strong(&segment->failure, &expected, -1))
        return; /* the first failure is told */
    snprintf(segment->text, TEXT_BYTES, "%s", text);
    atomic_store(&segment->failure, code);
}
