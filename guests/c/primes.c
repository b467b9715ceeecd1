/*
 * primes - a sieve of Eratosthenes in ring 3, where guest code runs at full speed
 *
 * Shows: native computation, with SSE floating point, between two prints.
 * Output: "78498 primes below 1000000\nsum 37550402023\nsum of reciprocals 2.887328\n"
 */
#include "kvmpy.h"

KVMPY_RING(3);

#define LIMIT 1000000u

static uint8_t composite[LIMIT]; /* in .bss: zero when the guest starts */

int main(void)
{
    uint64_t count = 0, sum = 0, millionths;
    double reciprocals = 0.0;

    for (uint32_t n = 2; n < LIMIT; n++) {
        if (composite[n])
            continue;
        count++;
        sum += n;
        reciprocals += 1.0 / n;
        for (uint64_t multiple = (uint64_t)n * n; multiple < LIMIT; multiple += n)
            composite[multiple] = 1;
    }

    print_number(count);
    print(" primes below ");
    print_number(LIMIT);
    print("\nsum ");
    print_number(sum);
    print("\nsum of reciprocals ");
    millionths = (uint64_t)(reciprocals * 1e6 + 0.5);
    print_number(millionths / 1000000);
    putch('.');
    for (uint64_t place = 100000; place; place /= 10)
        putch((char)('0' + millionths / place % 10));
    putch('\n');
    return 0;
}
