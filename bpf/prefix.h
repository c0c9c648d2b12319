/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * A part of a client's stream, put together by stream position. Segments may come in any size and order, twice, and
 * overlapping; of overlapping bytes the first seen stay.
 *
 * Only a window is kept: what was looked at makes room for what comes behind it. So the bytes are a ring, and a bit
 * of `known` stands for a byte behind the first gap: in front of the gap, `have` says that all are known.
 */
#ifndef TIDEGATE_PREFIX_H
#define TIDEGATE_PREFIX_H

#include "maps.h"

enum {
	WORD_BITS = 64,
	WORDS = TG_PREFIX_BYTES / WORD_BITS,
	LOCK_TRIES = 64,
};

/* A part of the stream: its bytes [start, end), at offset in the packet. */
struct part {
	__u32 offset;
	__u32 start;
	__u32 end;
};

struct copy {
	struct __sk_buff *skb;
	struct tg_prefix *prefix;
	struct part part;
	__u32 failed;
	__u32 overlap;	/* bytes came again, and were others */
	__u64 wanted;	/* of the current word, the bytes that the part has */
};

static __always_inline __u32 least(__u32 a, __u32 b)
{
	return a < b ? a : b;
}

static __always_inline __u64 bits(__u32 first, __u32 number)
{
	return (number < WORD_BITS ? (1ULL << number) - 1 : ~0ULL) << first;
}

static __always_inline __u8 *byte_at(struct tg_prefix *prefix, __u32 position)
{
	return &prefix->bytes[position & (TG_PREFIX_BYTES - 1)];
}

/* Takes in one byte of a word of which some may be known. */
static long copy_byte(__u32 bit, struct copy *copy)
{
	struct tg_prefix *prefix = copy->prefix;
	__u32 position = (copy->part.start & ~(WORD_BITS - 1)) + bit;
	__u64 *known = &prefix->known[(position / WORD_BITS) & (WORDS - 1)];
	__u64 mask = bits(bit & (WORD_BITS - 1), 1);
	__u8 byte = prefix->again[bit & (WORD_BITS - 1)];

	if (!(copy->wanted & mask))
		return 0;
	if (position < prefix->have) {
		/* A known bit means that a later byte has its place. */
		copy->overlap |= !(*known & mask) && *byte_at(prefix, position) != byte;
	} else if (*known & mask) {
		copy->overlap |= *byte_at(prefix, position) != byte;
	} else {
		*byte_at(prefix, position) = byte;
		*known |= mask;
	}
	return 0;
}

/* Copies up to the end of the word that the part's start is in. */
static long copy_word(__u32 turn, struct copy *copy)
{
	struct tg_prefix *prefix = copy->prefix;
	__u32 start = copy->part.start & (TG_PREFIX_BYTES - 1);
	__u32 first = start % WORD_BITS;
	__u64 *known = &prefix->known[(start / WORD_BITS) & (WORDS - 1)];
	__u32 number = WORD_BITS - first;

	if (copy->part.start >= copy->part.end)
		return 1;
	if (number > copy->part.end - copy->part.start)
		number = copy->part.end - copy->part.start;
	copy->wanted = bits(first, number);
	/* It is 1 to WORD_BITS anyway; the verifier of Linux 6.1 sees it by this alone. */
	asm volatile("" : "+r"(number));
	number = ((number - 1) & (WORD_BITS - 1)) + 1;
	if (copy->part.start >= prefix->have && !(*known & copy->wanted)) {
		copy->failed |= !!bpf_skb_load_bytes(copy->skb, copy->part.offset,
						     &prefix->bytes[start], number);
		*known |= copy->wanted;
	} else {
		copy->failed |= !!bpf_skb_load_bytes(copy->skb, copy->part.offset,
						     &prefix->again[first], number);
		bpf_loop(WORD_BITS, copy_byte, copy, 0);
	}
	copy->part.start += number;
	copy->part.offset += number;
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

/* Moves the first gap on, up to the end of the word that it is in. */
static long extend_word(__u32 turn, struct tg_prefix **context)
{
	struct tg_prefix *prefix = *context;
	__u32 bit = prefix->have % WORD_BITS;
	__u64 *known = &prefix->known[(prefix->have / WORD_BITS) & (WORDS - 1)];
	__u64 missing = ~*known & bits(bit, WORD_BITS - bit);
	__u32 number = (missing ? trailing_zeros(missing) : WORD_BITS) - bit;

	*known &= ~bits(bit, number);
	prefix->have += number;
	return !!missing;
}

/* What became of a part that was taken in. */
enum {
	PART_FAILED = 1 << 0,	/* the packet could not be read */
	PART_OVERLAP = 1 << 1,
};

/* Takes in a part that lies in the window, or was in it. */
__noinline int fill_prefix(struct __sk_buff *skb, struct tg_prefix *prefix, const struct part *part)
{
	struct copy copy = { .skb = skb, .prefix = prefix };

	if (!prefix || !part)
		return PART_FAILED;
	copy.part = *part;
	bpf_loop(WORDS + 1, copy_word, &copy, 0);
	bpf_loop(WORDS + 1, extend_word, &prefix, 0);
	return (copy.failed ? PART_FAILED : 0) | (copy.overlap ? PART_OVERLAP : 0);
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
