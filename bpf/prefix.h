/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * The beginning of a client's stream, put together by stream position. Segments may come in any size and order,
 * twice, and overlapping; of overlapping bytes the first seen stay.
 */
#ifndef TIDEGATE_PREFIX_H
#define TIDEGATE_PREFIX_H

#include "maps.h"

enum {
	WORD_BITS = 64,
	WORDS = TG_PREFIX_BYTES / WORD_BITS,
	LOCK_TRIES = 64,
};

struct copy {
	struct __sk_buff *skb;
	struct tg_prefix *prefix;
	__u32 offset;	/* in the packet, of stream position start */
	__u32 start;
	__u32 end;
	__u32 failed;
	__u64 fresh;	/* of the current word, the bytes that are not known yet */
};

static __always_inline __u64 bits(__u32 first, __u32 number)
{
	return (number < WORD_BITS ? (1ULL << number) - 1 : ~0ULL) << first;
}

static long copy_byte(__u32 bit, struct copy *copy)
{
	__u32 position = (copy->start & ~(WORD_BITS - 1)) + bit;

	if (!(copy->fresh & bits(bit & (WORD_BITS - 1), 1)))
		return 0;
	position &= TG_PREFIX_BYTES - 1;
	copy->failed |= !!bpf_skb_load_bytes(copy->skb, copy->offset + position - copy->start,
					     &copy->prefix->bytes[position], 1);
	return 0;
}

/* Copies up to the end of the word that start is in. */
static long copy_word(__u32 turn, struct copy *copy)
{
	struct tg_prefix *prefix = copy->prefix;
	__u32 start = copy->start & (TG_PREFIX_BYTES - 1);
	__u32 word = start / WORD_BITS;
	__u32 number = WORD_BITS - start % WORD_BITS;
	__u64 wanted;

	if (copy->start >= copy->end)
		return 1;
	if (number > copy->end - copy->start)
		number = copy->end - copy->start;
	wanted = bits(start % WORD_BITS, number);
	copy->fresh = wanted & ~prefix->known[word & (WORDS - 1)];
	/* The verifier has to see the bounds in the register that the call uses. */
	asm volatile("" : "+r"(number));
	if (number < 1 || number > WORD_BITS)
		return 1;
	if (copy->fresh == wanted)
		copy->failed |= !!bpf_skb_load_bytes(copy->skb, copy->offset,
						     &prefix->bytes[start], number);
	else if (copy->fresh)
		bpf_loop(WORD_BITS, copy_byte, copy, 0);
	prefix->known[word & (WORDS - 1)] |= copy->fresh;
	copy->start += number;
	copy->offset += number;
	return !!copy->failed;
}

static __always_inline __u32 trailing_zeros(__u64 word)
{
	__u32 zeros = 0;

	if (!(word & 0xffffffff)) { zeros += 32; word >>= 32; }
	if (!(word & 0xffff)) { zeros += 16; word >>= 16; }
	if (!(word & 0xff)) { zeros += 8; word >>= 8; }
	if (!(word & 0xf)) { zeros += 4; word >>= 4; }
	if (!(word & 0x3)) { zeros += 2; word >>= 2; }
	return zeros + !(word & 0x1);
}

static long extend_word(__u32 turn, struct tg_prefix **context)
{
	struct tg_prefix *prefix = *context;
	__u32 bit = prefix->have % WORD_BITS;
	__u64 missing;

	if (prefix->have >= TG_PREFIX_BYTES)
		return 1;
	missing = ~prefix->known[(prefix->have / WORD_BITS) & (WORDS - 1)] & bits(bit, WORD_BITS - bit);
	if (missing) {
		prefix->have += trailing_zeros(missing) - bit;
		return 1;
	}
	prefix->have += WORD_BITS - bit;
	return 0;
}

/* Takes in the bytes [start, end) of the stream, end <= TG_PREFIX_BYTES, found at offset in the packet. */
static __noinline int fill_prefix(struct __sk_buff *skb, struct tg_prefix *prefix, __u32 offset,
				  __u32 start, __u32 end)
{
	struct copy copy = {
		.skb = skb, .prefix = prefix, .offset = offset, .start = start, .end = end,
	};

	bpf_loop(WORDS + 1, copy_word, &copy, 0);
	bpf_loop(WORDS + 1, extend_word, &prefix, 0);
	return copy.failed;
}

/* Returns 0 with the prefix locked. */
static __always_inline int lock_prefix(struct tg_prefix *prefix)
{
	int i;

	for (i = 0; i < LOCK_TRIES; i++)
		if (!__sync_val_compare_and_swap(&prefix->lock, 0, 1))
			return 0;
	return -1;
}

static __always_inline void unlock_prefix(struct tg_prefix *prefix)
{
	__sync_lock_test_and_set(&prefix->lock, 0);
}

#endif
