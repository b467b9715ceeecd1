/*
 * A parser of a small file format, as a fuzz target, and the bug in it.
 *
 * A file is the magic "KVMP" and then records of a tag, a length of one byte, and so many bytes:
 * 'O' opens the stream, 'D' appends data to it, 'C' closes it. The parser forgets that it has
 * closed the stream: data after that is written to where the null pointer leads.
 */
#include <stddef.h>
#include <stdint.h>

_Noreturn void abort(void);

enum { NO_MAGIC = 1, CUT_SHORT, OPEN_TWICE, NOT_OPEN, TOO_MUCH, UNKNOWN };

static struct stream {
    size_t used;
    uint8_t data[64];
} stream;

static struct stream *current;
static int is_open;

static int append(const uint8_t *data, size_t size)
{
    if (!is_open)
        return NOT_OPEN;
    for (size_t at = 0; at < size; at++) {
        if (current->used == sizeof current->data)
            return TOO_MUCH;
        current->data[current->used++] = data[at];
    }
    return 0;
}

static int record(uint8_t tag, const uint8_t *data, size_t size)
{
    switch (tag) {
    case 'O':
        if (is_open)
            return OPEN_TWICE;
        current = &stream;
        is_open = 1;
        return 0;
    case 'D':
        return append(data, size);
    case 'C':
        if (!is_open)
            return NOT_OPEN;
        if (current && current->used > sizeof current->data)
            abort(); /* append() sees to it that this cannot be */
        current = NULL; /* and is_open = 0: that is the bug */
        return 0;
    default:
        return UNKNOWN;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char magic[4] = "KVMP";
    size_t at = 0;

    for (; at < sizeof magic; at++)
        if (at == size || data[at] != (uint8_t)magic[at])
            return NO_MAGIC;
    while (at < size) {
        if (size - at < 2 || data[at + 1] > size - at - 2)
            return CUT_SHORT;
        int result = record(data[at], data + at + 2, data[at + 1]);
        if (result)
            return result;
        at += 2u + data[at + 1];
    }
    return 0;
}
