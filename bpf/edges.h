/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0) */
/*
 * Who talks to whom, and how. A connection is on exactly one edge at any time: on the edge of class empty from its
 * SYN on, and moved when its class changes. So the sum over all edges and the overflow is the number of connections
 * that were opened, at every moment.
 */
#ifndef TIDEGATE_EDGES_H
#define TIDEGATE_EDGES_H

#include "maps.h"
#include "packet.h"

enum {
	/* A verdict changes four times at most: for the time being, decided, decided by an upgrade, settled. */
	SETTLE_TRIES = 5,
	ADVANCE_TRIES = 8,
	/* RFC 7323 2.3: no window is larger. */
	WINDOW_MAX = 1 << 30,
};

static __always_inline enum tg_class flow_class(const struct tg_flow *flow)
{
	return flow->verdict & TG_VERDICT_CLASS;
}

static __always_inline int is_settled(const struct tg_flow *flow)
{
	return flow->verdict & TG_VERDICT_SETTLED;
}

static __always_inline int is_decided(const struct tg_flow *flow)
{
	return flow->verdict & (TG_VERDICT_DECIDED | TG_VERDICT_SETTLED);
}

static __always_inline void set_flag(struct tg_flow *flow, enum tg_flow_flag flag)
{
	__sync_fetch_and_or(&flow->flags, flag);
}

static __always_inline void edge_key(const struct tg_flow_key *key, const struct tg_flow *flow,
				     enum tg_class class, struct tg_edge_key *edge)
{
	edge->workload = key->workload;
	__builtin_memcpy(edge->peer, key->peer, sizeof(edge->peer));
	edge->port = flow->direction == TG_INBOUND ? key->local_port : key->peer_port;
	edge->direction = flow->direction;
	edge->flow_class = class;
	edge->pad = 0;
}

static __always_inline struct tg_edge_count *overflow_of(enum tg_class class)
{
	__u32 index = class;

	return bpf_map_lookup_elem(&overflow, &index);
}

/* The edge of this flow and class, made if it is not there; NULL where it does not fit. */
static __noinline struct tg_edge_count *edge_of(const struct tg_flow_key *key,
						const struct tg_flow *flow, enum tg_class class)
{
	struct tg_edge_count fresh = {}, *found;
	struct tg_edge_key edge;

	edge_key(key, flow, class, &edge);
	found = bpf_map_lookup_elem(&edges, &edge);
	if (found)
		return found;
	fresh.first_seen = flow->opened;
	fresh.last_seen = flow->opened;
	/* Another processor may have made it in between: then this fails and the look-up succeeds. */
	bpf_map_update_elem(&edges, &edge, &fresh, BPF_NOEXIST);
	return bpf_map_lookup_elem(&edges, &edge);
}

static __always_inline void add(__u64 *to, __u64 amount)
{
	__sync_fetch_and_add(to, amount);
}

/* Counts the connection, with what is credited to it so far, on the edge of its class. */
static __always_inline void credit(const struct tg_flow_key *key, struct tg_flow *flow,
				   enum tg_class class, __u64 to_server, __u64 to_client)
{
	struct tg_edge_count *edge = edge_of(key, flow, class);

	if (edge) {
		__sync_fetch_and_and(&flow->flags, ~TG_FLOW_OVERFLOW);
	} else {
		set_flag(flow, TG_FLOW_OVERFLOW);
		edge = overflow_of(class);
		if (!edge)
			return;
	}
	add(&edge->connections, 1);
	add(&edge->bytes[TG_CLIENT], to_server);
	add(&edge->bytes[TG_SERVER], to_client);
}

/* Takes back what credit counted. */
static __always_inline void debit(const struct tg_flow_key *key, const struct tg_flow *flow,
				  enum tg_class class, __u32 flags, __u64 to_server, __u64 to_client)
{
	struct tg_edge_count *edge;
	struct tg_edge_key where;

	edge_key(key, flow, class, &where);
	edge = flags & TG_FLOW_OVERFLOW ? overflow_of(class) : bpf_map_lookup_elem(&edges, &where);
	/* Edges that were forgotten have nothing to take back. */
	if (!edge)
		return;
	add(&edge->connections, -1);
	add(&edge->bytes[TG_CLIENT], -to_server);
	add(&edge->bytes[TG_SERVER], -to_client);
}

static __always_inline void add_bytes(const struct tg_flow_key *key, const struct tg_flow *flow,
				      __u64 to_server, __u64 to_client)
{
	enum tg_class class = flow_class(flow);
	struct tg_edge_count *edge = edge_of(key, flow, class) ?: overflow_of(class);

	if (!edge)
		return;
	if (to_server)
		add(&edge->bytes[TG_CLIENT], to_server);
	if (to_client)
		add(&edge->bytes[TG_SERVER], to_client);
	edge->last_seen = bpf_ktime_get_boot_ns();
}

/* Brings waiting bytes to the edge of the flow's class. Bytes of class empty wait until the class is known. */
static __noinline int flush(const struct tg_flow_key *key, struct tg_flow *flow)
{
	__u64 to_server, to_client;

	if (flow_class(flow) == TG_EMPTY)
		return 0;
	to_server = __sync_lock_test_and_set(&flow->pending[TG_CLIENT], 0);
	to_client = __sync_lock_test_and_set(&flow->pending[TG_SERVER], 0);
	if (!to_server && !to_client)
		return 0;
	if (!is_settled(flow)) {
		add(&flow->credited[TG_CLIENT], to_server);
		add(&flow->credited[TG_SERVER], to_client);
	}
	add_bytes(key, flow, to_server, to_client);
	return 0;
}

/* Gives the flow another verdict, unless it is surer of the one it has, and moves its connection to the edge of the new class. */
static __noinline int give_verdict(const struct tg_flow_key *key, struct tg_flow *flow, __u32 verdict)
{
	enum tg_class class = verdict & TG_VERDICT_CLASS, before;
	__u64 to_server, to_client;
	__u32 flags, old;
	int i;

	for (i = 0; i < SETTLE_TRIES; i++) {
		old = flow->verdict;
		if (old & TG_VERDICT_SETTLED || old == verdict)
			return 0;
		if (old & TG_VERDICT_DECIDED && !(verdict & (TG_VERDICT_DECIDED | TG_VERDICT_SETTLED)))
			return 0;
		if (__sync_val_compare_and_swap(&flow->verdict, old, verdict) == old)
			break;
	}
	if (i == SETTLE_TRIES) {
		count(TG_RACE_LOST);
		return 0;
	}
	before = old & TG_VERDICT_CLASS;
	if (before != class) {
		flags = flow->flags;
		to_server = __sync_lock_test_and_set(&flow->credited[TG_CLIENT], 0);
		to_client = __sync_lock_test_and_set(&flow->credited[TG_SERVER], 0);
		credit(key, flow, class, to_server, to_client);
		debit(key, flow, before, flags, to_server, to_client);
		if (!(verdict & TG_VERDICT_SETTLED)) {
			add(&flow->credited[TG_CLIENT], to_server);
			add(&flow->credited[TG_SERVER], to_client);
		}
	}
	return flush(key, flow);
}

static __always_inline void settle(const struct tg_flow_key *key, struct tg_flow *flow,
				   enum tg_class class)
{
	give_verdict(key, flow, class | TG_VERDICT_SETTLED);
	bpf_map_delete_elem(&prefixes, key);
}

/*
 * Moves the end of what was seen of one side's stream to the segment's end; returns by how many bytes it moved. A
 * segment without payload moves nothing: behind a FIN its sequence number is one beyond the stream.
 */
static __always_inline __u32 advance(struct tg_flow *flow, enum tg_role role,
				     const struct tg_segment *segment)
{
	__u32 end = segment->sequence + segment->length;
	__u32 seen, gain;
	int i;

	if (!segment->length)
		return 0;
	for (i = 0; i < ADVANCE_TRIES; i++) {
		seen = flow->next[role];
		gain = end - seen;
		if (!gain || (__s32)gain < 0)
			return 0;
		if (gain > WINDOW_MAX) {
			count(TG_OUT_OF_WINDOW);
			return 0;
		}
		if (__sync_val_compare_and_swap(&flow->next[role], seen, end) == seen)
			return gain;
	}
	count(TG_RACE_LOST);
	return 0;
}

/* Counts payload that one side sent. */
static __always_inline void count_bytes(const struct tg_flow_key *key, struct tg_flow *flow,
					enum tg_role role, __u32 bytes)
{
	if (is_settled(flow)) {
		add_bytes(key, flow, role == TG_CLIENT ? bytes : 0, role == TG_SERVER ? bytes : 0);
		return;
	}
	if (is_decided(flow)) {
		add(&flow->credited[role], bytes);
		add_bytes(key, flow, role == TG_CLIENT ? bytes : 0, role == TG_SERVER ? bytes : 0);
		return;
	}
	add(&flow->pending[role], bytes);
	flush(key, flow);
}

/* The flow's protocol is known. */
static __always_inline void note_hint(const struct tg_flow_key *key, struct tg_flow *flow, enum tg_hint hint)
{
	flow->hint = hint;
}

#endif
