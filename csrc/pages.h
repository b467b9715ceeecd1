/* Pages of guest RAM, by bitmaps: which have changed, and copying those. */
#ifndef KVMPY_PAGES_H
#define KVMPY_PAGES_H

#include <stdint.h>

#define KVMPY_PAGE 4096

/* Bitmaps are of 64-bit words, a bit a page, lowest first. Each function gives a number of
 * pages, or -errno. */

/* Mark the pages of a private mapping that are the process's own: written since it was made,
 * by whomever (/proc/self/pagemap). */
int64_t kvmpy_own_pages(const uint8_t *start, uint64_t pages, uint64_t *bitmap);

/* Of the marked pages, leave those marked that differ between the two. */
int64_t kvmpy_differing(const uint8_t *one, const uint8_t *other, uint64_t pages,
                        uint64_t *bitmap);

/* Of the marked pages, leave those marked that are not all zeros. */
int64_t kvmpy_not_zero(const uint8_t *start, uint64_t pages, uint64_t *bitmap);

/* Copy the marked pages. */
int64_t kvmpy_copy_pages(uint8_t *to, const uint8_t *from, uint64_t pages,
                         const uint64_t *bitmap);

/* Write the marked pages to a file, each at its own offset from `offset` on. */
int64_t kvmpy_write_pages(int fd, uint64_t offset, const uint8_t *start, uint64_t pages,
                          const uint64_t *bitmap);

/* Put a private mapping of a file in the place of a mapping, which must not be a part of one. */
int kvmpy_remap(uint8_t *start, uint64_t size, int fd, uint64_t offset);

#endif
