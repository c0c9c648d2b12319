/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * How a packet finds its flow. The flow map is keyed by a hash of struct tg_flow_key, and what is found is compared with
 * that: for a key of 48 bytes the map's own hash and comparison take three times as long.
 *
 * The hash is NH (RFC 4418 5.2) with a 64-bit addition. Of any two keys, one seed in 2^32 at most gives both the same.
 * The second of two such flows is not stored, which is counted.
 *
 * The key is written and read by words of 64 bits: a load that spans two stores waits until both are done.
 */
#ifndef TIDEGATE_FLOWS_H
#define TIDEGATE_FLOWS_H

#include "maps.h"

/* What a key is written, read and compared by. */
typedef __u64 __attribute__((may_alias)) key_word;

/* Two neighbours in memory, as one word. */
static __always_inline __u64 one_word(__u32 first, __u32 second)
{
	union {
		__u32 halves[2];
		__u64 word;
	} both = { .halves = { first, second } };

	return both.word;
}

static __always_inline __u16 local_port(const struct tg_flow_key *key)
{
	return key->ports >> 16;
}

static __always_inline __u16 peer_port(const struct tg_flow_key *key)
{
	return key->ports;
}

static __always_inline __u64 flow_hash(const struct tg_flow_key *key)
{
	const key_word *words = (const key_word *)key;
	struct tg_flow_seed *seed;
	__u64 hash = 0, word;
	__u32 zero = 0, i;

	seed = bpf_map_lookup_elem(&flow_seed, &zero);
	if (!seed)
		return 0;
#pragma unroll
	for (i = 0; i < TG_FLOW_KEY_WORDS; i++) {
		word = words[i] + seed->words[i];
		hash += (word >> 32) * (__u32)word;
	}
	return hash;
}

static __always_inline int same_flow(const struct tg_flow_key *key, const struct tg_flow_key *other)
{
	const key_word *words = (const key_word *)key, *others = (const key_word *)other;
	__u64 differ = 0;
	__u32 i;

#pragma unroll
	for (i = 0; i < TG_FLOW_KEY_WORDS; i++)
		differ |= words[i] ^ others[i];
	return !differ;
}

static __always_inline struct tg_flow *find_flow(const struct tg_flow_key *key, __u64 hash)
{
	struct tg_flow *flow = bpf_map_lookup_elem(&flows, &hash);

	return flow && same_flow(key, &flow->key) ? flow : NULL;
}

#endif
