/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * The bytes of ClientHellos, for a reader that wants to know more about them than their class. Without such a reader
 * the constant is 0, and nothing of this is in the loaded program.
 */
#ifndef TIDEGATE_REPORT_H
#define TIDEGATE_REPORT_H

#include "prefix.h"

/* Whether hellos are followed to their end and sent to the ring buffer. */
extern const volatile __u32 report;

struct telling {
	struct tg_prefix *prefix;
	struct tg_hello_chunk *chunk;
};

static long tell_byte(__u32 index, struct telling *telling)
{
	telling->chunk->bytes[index & (TG_PREFIX_BYTES - 1)] =
		*byte_at(telling->prefix, telling->prefix->told + index);
	return 0;
}

/* Sends what was walked over since the last time. */
static __noinline int tell_hello(const struct tg_flow_key *key, struct tg_prefix *prefix)
{
	struct telling telling = { .prefix = prefix };
	struct tg_scratch *scratched;
	__u32 length, zero = 0;

	scratched = bpf_map_lookup_elem(&scratch, &zero);
	if (!scratched)
		return 0;
	if (prefix->told < prefix->base)
		prefix->told = prefix->base;
	length = prefix->hello.position - prefix->told;
	if (!length || length > TG_PREFIX_BYTES)
		return 0;
	telling.chunk = &scratched->chunk;
	telling.chunk->opened = prefix->owner;
	telling.chunk->position = prefix->told - prefix->base;
	telling.chunk->length = length;
	telling.chunk->key = *key;
	bpf_loop(length, tell_byte, &telling, 0);
	if (bpf_ringbuf_output(&hellos, telling.chunk, offsetof(struct tg_hello_chunk, bytes) + length, 0))
		count(TG_HELLO_NOT_REPORTED);
	prefix->told += length;
	return 0;
}

#endif
