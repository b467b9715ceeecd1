/* Pages of guest RAM, by bitmaps. */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BIT(bitmap, page) ((bitmap)[(page) / 64] >> ((page) % 64) & 1)
#define CLEAR(bitmap, page) ((bitmap)[(page) / 64] &= ~(1ull << ((page) % 64)))

/* Call the body for each marked page. */
#define EACH_PAGE(page, pages, bitmap)                                                    \
    for (uint64_t word_ = 0; word_ < ((pages) + 63) / 64; word_++)                          \
        for (uint64_t left_ = (bitmap)[word_], page;                                        \
             left_ && (page = 64 * word_ + (uint64_t)__builtin_ctzll(left_), 1);            \
             left_ &= left_ - 1)

/* Bits of an entry of pagemap (the kernel's Documentation/admin-guide/mm/pagemap.rst). */
#define PRESENT (1ull << 63)
#define SWAPPED (1ull << 62)
#define OF_FILE (1ull << 61)

static int64_t own_pages(int pagemap, const uint8_t *start, uint64_t pages, uint64_t *bitmap)
{
    uint64_t entries[512], found = 0;

    memset(bitmap, 0, (pages + 63) / 64 * 8);
    for (uint64_t page = 0; page < pages;) {
        uint64_t count = pages - page < 512 ? pages - page : 512;
        off_t offset = (off_t)(((uintptr_t)start / KVMPY_PAGE + page) * 8);
        ssize_t got = pread(pagemap, entries, count * 8, offset);
        if (got <= 0)
            return got < 0 ? -errno : -EIO;
        for (uint64_t at = 0; at < (uint64_t)got / 8; at++, page++) {
            if ((entries[at] & (PRESENT | SWAPPED)) && !(entries[at] & OF_FILE)) {
                bitmap[page / 64] |= 1ull << (page % 64);
                found++;
            }
        }
    }
    return (int64_t)found;
}

/* It is opened here, and not in Python, where a signal handler may raise before it is closed. */
int64_t kvmpy_own_pages(const uint8_t *start, uint64_t pages, uint64_t *bitmap)
{
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0)
        return -errno;
    int64_t result = own_pages(pagemap, start, pages, bitmap);
    close(pagemap);
    return result;
}

int64_t kvmpy_differing(const uint8_t *one, const uint8_t *other, uint64_t pages,
                        uint64_t *bitmap)
{
    int64_t found = 0;

    EACH_PAGE(page, pages, bitmap) {
        if (memcmp(one + page * KVMPY_PAGE, other + page * KVMPY_PAGE, KVMPY_PAGE))
            found++;
        else
            CLEAR(bitmap, page);
    }
    return found;
}

int64_t kvmpy_not_zero(const uint8_t *start, uint64_t pages, uint64_t *bitmap)
{
    static const uint8_t zeros[KVMPY_PAGE];
    int64_t found = 0;

    EACH_PAGE(page, pages, bitmap) {
        if (memcmp(start + page * KVMPY_PAGE, zeros, KVMPY_PAGE))
            found++;
        else
            CLEAR(bitmap, page);
    }
    return found;
}

int64_t kvmpy_copy_pages(uint8_t *to, const uint8_t *from, uint64_t pages,
                         const uint64_t *bitmap)
{
    int64_t copied = 0;

    EACH_PAGE(page, pages, bitmap) {
        memcpy(to + page * KVMPY_PAGE, from + page * KVMPY_PAGE, KVMPY_PAGE);
        copied++;
    }
    return copied;
}

/* All of them, however few bytes one call takes. */
static int write_all(int fd, const uint8_t *from, uint64_t size, uint64_t offset)
{
    while (size) {
        ssize_t done = pwrite(fd, from, size, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? -errno : -ENOSPC;
        from += done, offset += (uint64_t)done, size -= (uint64_t)done;
    }
    return 0;
}

int64_t kvmpy_write_pages(int fd, uint64_t offset, const uint8_t *start, uint64_t pages,
                          const uint64_t *bitmap)
{
    int64_t written = 0;

    for (uint64_t page = 0; page < pages; page++) {
        uint64_t first = page;
        while (page < pages && BIT(bitmap, page))
            page++;
        if (page == first)
            continue;
        uint64_t at = first * KVMPY_PAGE;
        int result = write_all(fd, start + at, page * KVMPY_PAGE - at, offset + at);
        if (result < 0)
            return result;
        written += (int64_t)(page - first);
    }
    return written;
}

int kvmpy_remap(uint8_t *start, uint64_t size, int fd, uint64_t offset)
{
    void *made = mmap(start, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, (off_t)offset);
    return made == MAP_FAILED ? -errno : 0;
}
